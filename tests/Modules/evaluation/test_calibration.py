import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import expit, logit
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score, recall_score

from Modules.cli import UserError
from Modules.evaluation.calibration import (
    MANY,
    calibrate,
    calibrated,
    check,
    choose_threshold,
    correct_prior,
    errors_at,
    fit,
    mix_weights,
    parse_rule,
    prior_offset,
    uncalibrated,
)
from Modules.evaluation.metrics import evaluate


def simulate(n=4000, prevalence=0.5, seed=0):
    """target, calibrated logit: log odds of two normal classes of unit variance, 1.5 apart."""
    rng = np.random.default_rng(seed)
    target = (rng.random(n) < prevalence).astype(int)
    return target, 1.5 * (rng.normal(size=n) + 1.5 * target - 0.75) + logit(prevalence)


def test_platt_equals_a_logistic_regression_on_smoothed_targets():
    target, logits = simulate(300)
    positives = target.sum()
    soft = np.where(target == 1, (positives + 1) / (positives + 2), 1 / (300 - positives + 2))
    model = LogisticRegression(C=np.inf, tol=1e-10, max_iter=1000)
    model.fit(np.r_[logits, logits][:, None], np.r_[np.ones(300), np.zeros(300)], sample_weight=np.r_[soft, 1 - soft])
    assert fit(logits, target) == pytest.approx((model.coef_[0, 0], model.intercept_[0]), abs=1e-4)


def test_the_distortion_is_found_and_undone():
    target, logits = simulate(20_000)
    scale, offset = fit(4 * logits - 3, target)
    assert (scale, offset) == pytest.approx((0.25, 0.75), abs=0.05)
    scale, offset = fit(4 * logits, target, "temperature")
    assert scale == pytest.approx(0.25, abs=0.01)
    assert offset == 0


@pytest.mark.parametrize("method", ["platt", "temperature"])
@pytest.mark.parametrize(
    ("logits", "target"),
    [
        ([-5.0, -4.0, 4.0, 5.0], [0, 0, 1, 1]),  # separable: plain maximum likelihood has no finite answer
        ([-900.0, 800.0, 900.0, -700.0], [0, 1, 1, 0]),
        ([3.0, 2.0, -2.0, -3.0], [0, 0, 1, 1]),  # worse than chance: the ranking must stay
        ([0.0, 0.0, 0.0], [0, 1, 1]),
        ([0.1, -0.3], [1, 0]),
    ],
)
def test_degenerate_input_gives_a_finite_line_that_keeps_the_ranking(logits, target, method):
    scale, offset = fit(np.array(logits), np.array(target), method)
    assert 0.01 <= scale <= 100
    assert np.isfinite(offset)


@pytest.mark.parametrize("target", [[0, 0, 0], [1, 1, 1]])
def test_one_class_leaves_the_logits_alone(target):
    assert fit(np.array([-1.0, 0.0, 2.0]), np.array(target)) == (1.0, 0.0)
    assert fit(np.array([]), np.array([])) == (1.0, 0.0)


def test_calibration_lowers_the_calibration_error_on_other_images():
    target, logits = simulate()
    scale, offset = fit(3 * logits + 1, target)
    target, logits = simulate(seed=1)
    before = evaluate(target, expit(3 * logits + 1), resamples=2)
    after = evaluate(target, expit(scale * (3 * logits + 1) + offset), resamples=2)
    assert after["ece"] < 0.5 * before["ece"]
    assert after["brier"] < before["brier"]
    assert after["roc_auc"] == before["roc_auc"]


def test_wrong_input_of_fit_is_an_error():
    with pytest.raises(UserError, match="unknown calibration plat: did you mean platt"):
        fit(np.zeros(2), np.array([0, 1]), "plat")
    with pytest.raises(ValueError, match="finite"):
        fit(np.array([np.inf, 0.0]), np.array([0, 1]))
    with pytest.raises(ValueError, match=r"\(2,\) and \(3,\)"):
        fit(np.zeros(2), np.array([0, 1, 1]))


def test_a_weight_counts_as_so_many_images():
    target, logits = simulate(60)
    times = np.random.default_rng(1).integers(1, 5, 60)
    times[target == 1] = 2  # keeps the smoothed targets of the repeated images near those of the weighted ones
    weighted = fit(logits, target, "temperature", weights=times)
    repeated = fit(np.repeat(logits, times), np.repeat(target, times), "temperature")
    assert weighted[0] == pytest.approx(repeated[0], rel=0.1)
    assert fit(logits, target, weights=np.full(60, 7.0)) == pytest.approx(fit(logits, target), rel=1e-4)


def test_calibration_aims_at_the_even_mix_of_training_whatever_the_mix_of_validation():
    """Logits that are right at 50/50 need no change, also where one image in ten is malignant."""
    target, logits = simulate(6000, 0.1)
    logits = logits - logit(0.1)
    found = calibrate(logits, target, np.arange(len(target)))
    assert found["method"] == "platt"
    assert (found["scale"], found["offset"]) == pytest.approx((1, 0), abs=0.12)
    assert found["training_prevalence"] == 0.5


@pytest.mark.parametrize(("images", "method"), [(2 * MANY - 2, "temperature"), (2 * MANY, "platt")])
def test_few_validation_images_get_no_offset(images, method):
    target = np.arange(images) % 2
    found = calibrate(simulate(images)[1] + 4 * target, target, np.arange(images))
    assert found["method"] == method
    assert (found["offset"] == 0) == (method == "temperature")


def test_a_calibration_says_what_it_did_and_can_be_taken_back():
    target, logits = simulate(600)
    found = calibrate(3 * logits, target, np.arange(600))
    assert found["validation"]["after"]["ece"] < found["validation"]["before"]["ece"]
    assert found["validation"]["after"]["brier"] < found["validation"]["before"]["brier"]
    probability = calibrated(found, logits)
    np.testing.assert_allclose(uncalibrated(found, probability), expit(logits), atol=1e-6)
    assert np.isfinite(uncalibrated(found, np.float32([0, 1]))).all()


def test_errors_without_weights_are_those_of_evaluate():
    target, logits = simulate(400)
    expected = evaluate(target, expit(logits))
    found = errors_at(target, expit(logits), target.mean(), np.arange(400))
    for name in ("brier", "ece", "brier_ci95", "ece_ci95"):
        assert found[name] == pytest.approx(expected[name], abs=1e-12)


@pytest.mark.parametrize("prevalence", [0.0176, 0.5, 0.9])
def test_mix_weights_make_the_share(prevalence):
    target = np.array([0] * 30 + [1] * 10)
    weights = mix_weights(target, prevalence)
    assert np.average(target, weights=weights) == pytest.approx(prevalence)
    assert weights.mean() == pytest.approx(1)
    assert mix_weights(np.zeros(3), prevalence).tolist() == [1, 1, 1]


def test_errors_at_a_prevalence_are_those_of_images_that_have_it():
    """A model of 50/50, judged on 50/50 images weighted to 1.76 % and on images of which 1.76 % are malignant."""
    prevalence = 0.0176
    many, logits = simulate(100_000, prevalence)
    balanced = expit(logits - logit(prevalence))
    half, half_logits = simulate(4000, 0.5, seed=1)
    corrected = (correct_prior(side, 0.5, prevalence) for side in (balanced, expit(half_logits)))
    for there, weighted in ((balanced, expit(half_logits)), tuple(corrected)):
        real = evaluate(many, there, resamples=2)
        found = errors_at(half, weighted, prevalence, np.arange(4000))
        assert found["brier"] == pytest.approx(real["brier"], abs=0.01)
        assert found["ece"] == pytest.approx(real["ece"], abs=0.02)


def test_prior_correction_is_bayes_rule():
    p, a, b = 0.3, 0.5, 0.0176
    expected = p * b / a / (p * b / a + (1 - p) * (1 - b) / (1 - a))
    assert correct_prior(np.array([p]), a, b)[0] == pytest.approx(expected)
    assert expit(logit(p) + prior_offset(a, b)) == pytest.approx(expected)
    assert correct_prior(np.array([0.0, 1.0]), a, b).tolist() == [0, 1]


@given(st.floats(0.001, 0.999), st.floats(0.01, 0.99), st.floats(0.01, 0.99))
def test_prior_correction_goes_there_and_back(probability, first, second):
    there = correct_prior(np.array([probability]), first, second)
    assert correct_prior(there, second, first)[0] == pytest.approx(probability, rel=1e-6)
    assert correct_prior(np.array([probability]), first, first)[0] == pytest.approx(probability)


def test_prior_correction_calibrates_a_model_of_50_50_at_the_true_prevalence():
    prevalence = 0.0176
    target, logits = simulate(30_000, prevalence)
    balanced = expit(logits - logit(prevalence))  # what a model trained at 50/50 would say
    before = evaluate(target, balanced, resamples=2)["ece"]
    after = evaluate(target, correct_prior(balanced, 0.5, prevalence), resamples=2)["ece"]
    assert before > 0.2
    assert after < 0.01


@pytest.mark.parametrize("prevalence", [0.0, 1.0, 1.76, np.nan])
def test_an_impossible_prevalence_is_an_error(prevalence):
    with pytest.raises(UserError, match="strictly between 0 and 1"):
        correct_prior(np.array([0.5]), 0.5, prevalence)


def outcomes(target, probability, thresholds):
    called = probability >= np.asarray(thresholds)[:, None]
    return called @ target, called @ (1 - target)  # hits, false alarms


@pytest.mark.parametrize("decimals", [8, 1])
@pytest.mark.parametrize("seed", range(3))
def test_each_rule_finds_the_best_of_all_thresholds(seed, decimals):
    target, logits = simulate(200, 0.3, seed)
    probability = expit(logits).round(decimals)
    every = [*np.unique(probability), 1.1]
    hits, alarms = outcomes(target, probability, every)
    positives, negatives = target.sum(), 200 - target.sum()

    def at(rule):
        threshold = choose_threshold(target, probability, rule)
        return tuple(float(value[0]) for value in outcomes(target, probability, [threshold]))

    tp, fp = at("youden")
    assert tp / positives - fp / negatives == pytest.approx(np.max(hits / positives - alarms / negatives))
    assert f1_score(target, probability >= choose_threshold(target, probability, "f1")) == pytest.approx(
        np.max(2 * hits / (hits + alarms + positives))
    )
    tp, fp = at("sensitivity=0.9")
    assert tp >= 0.9 * positives
    assert fp == np.min(alarms[hits >= 0.9 * positives])


def test_a_threshold_lies_between_scores():
    target, probability = np.array([0, 0, 1, 1]), np.array([0.1, 0.2, 0.6, 0.9])
    assert choose_threshold(target, probability, "youden") == pytest.approx(0.4)
    assert choose_threshold(target, probability, "sensitivity=0.5") == pytest.approx(0.75)
    assert choose_threshold(1 - target, probability, "sensitivity=1") == pytest.approx(0.05)
    assert choose_threshold(target, np.float32(probability), "youden") == pytest.approx(0.4)


def test_nine_of_ten_are_90_percent():
    target, probability = np.array([1] * 10 + [0] * 10), np.linspace(1, 0, 20)
    called = probability >= choose_threshold(target, probability, "sensitivity=0.9")
    assert recall_score(target, called) == 0.9


@pytest.mark.parametrize("value", [0.0, 0.3, 1.0])
def test_constant_probabilities_are_called_all_or_none(value):
    target, probability = np.array([0, 0, 0, 1]), np.full(4, value)
    assert (probability >= choose_threshold(target, probability, "sensitivity=0.9")).all()
    assert (probability >= choose_threshold(target, probability, "f1")).all()
    assert (probability < choose_threshold(target, probability, "youden")).all()


@pytest.mark.parametrize("prevalence", [0.0176, 0.5])
@pytest.mark.parametrize("ratio", [0.2, 1, 20])
def test_a_cost_is_weighed_at_the_prevalence_and_not_at_that_of_the_images(ratio, prevalence):
    target, logits = simulate(20_000, 0.5, 0)
    probability = expit(logits)  # calibrated at 50/50
    weights = mix_weights(target, prevalence)

    def cost(thresholds):
        called = probability >= np.reshape(thresholds, (-1, 1))
        return ratio * (~called @ (weights * target)) + called @ (weights * (1 - target))

    least = cost([*np.quantile(probability, np.linspace(0, 1, 400)), 1.1]).min()
    for images in (target, 1 - target, np.ones_like(target)):  # they have no say
        assert cost(choose_threshold(images, probability, f"cost={ratio}", prevalence)) <= 1.03 * least


def test_one_half_is_one_half_whatever_the_images():
    assert choose_threshold(np.array([0, 1]), np.array([0.1, 0.2]), "half") == 0.5
    assert choose_threshold(np.array([1, 1]), np.array([0.1, 0.2]), "half") == 0.5


def test_a_rule_and_a_prevalence_are_checked_before_any_work():
    check("cost=20", 0.0176)
    with pytest.raises(UserError, match="did you mean youden"):
        check("yuden", 0.0176)
    with pytest.raises(UserError, match="strictly between 0 and 1"):
        check("half", 1.76)


def test_rules_are_parsed():
    assert parse_rule("half") == ("half", None)
    assert parse_rule("youden") == ("youden", None)
    assert parse_rule(" F1 ") == ("f1", None)
    assert parse_rule("sensitivity=0.95") == ("sensitivity", 0.95)
    assert parse_rule("cost=20") == ("cost", 20.0)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("yuden", "did you mean youden"),
        ("accuracy", "unknown threshold rule accuracy"),
        ("", "known: half"),
        ("youden=1", "takes no number"),
        ("half=0.4", "takes no number"),
        ("sensitivity", r"a share in \(0, 1\]"),
        ("sensitivity=90", r"a share in \(0, 1\]"),
        ("sensitivity=nan", r"a share in \(0, 1\]"),
        ("cost=cheap", "a ratio above 0"),
        ("cost=-1", "a ratio above 0"),
        ("cost=inf", "a ratio above 0"),
    ],
)
def test_a_wrong_rule_is_an_error(rule, message):
    with pytest.raises(UserError, match=message):
        parse_rule(rule)


def test_a_threshold_needs_both_classes():
    with pytest.raises(UserError, match="0 benign and 2 malignant"):
        choose_threshold(np.array([1, 1]), np.array([0.2, 0.4]), "youden")
