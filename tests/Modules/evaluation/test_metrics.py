import json
import sys
import zipfile

import numpy as np
import pytest
from sklearn import metrics as sk
from sklearn.calibration import calibration_curve

from Modules.evaluation.calibration import correct_prior, errors_at
from Modules.evaluation.evaluations import restated
from Modules.evaluation.metrics import PREVALENCE, calibrated_ece, ece_interval, evaluate, weighted_metrics

NAMES = [
    "accuracy",
    "balanced_accuracy",
    "precision",
    "recall",
    "specificity",
    "f1",
    "ppv",
    "npv",
    "roc_auc",
    "average_precision",
    "pauc_above_80_tpr",
    "sensitivity_at_90_specificity",
    "specificity_at_90_sensitivity",
    "brier",
    "ece",
]


def predictions(kind):
    rng = np.random.default_rng(0)
    target = rng.integers(0, 2, 1000)
    scores = 1 / (1 + np.exp(-(1.5 * target - 0.75 + rng.normal(size=1000))))
    return {
        "random": (target, rng.random(1000)),
        "informative": (target, scores),
        "rare": ((rng.random(1000) < PREVALENCE).astype(int), scores),
        "ties": (target, scores.round(1)),
        "two values": (target, (scores > 0.6) * 0.9),
        "constant": (target, np.full(1000, 0.7)),
        "perfect": (target, target * 0.8 + 0.1),
        "inverted": (target, 1.0 - target),
        "two images": (np.array([0, 1]), np.array([0.2, 0.9])),
    }[kind]


KINDS = ["random", "informative", "rare", "ties", "two values", "constant", "perfect", "inverted", "two images"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_metric_equals_scikit_learns(kind):
    target, probability = predictions(kind)
    called = probability >= 0.5
    result = evaluate(target, probability, resamples=5)

    tn, fp, fn, tp = sk.confusion_matrix(target, called).ravel()
    assert result["confusion_matrix"] == [[tn, fp], [fn, tp]]
    assert result["accuracy"] == pytest.approx(sk.accuracy_score(target, called))
    assert result["balanced_accuracy"] == pytest.approx(sk.balanced_accuracy_score(target, called))
    assert result["recall"] == pytest.approx(sk.recall_score(target, called))
    assert result["specificity"] == pytest.approx(sk.recall_score(target, called, pos_label=0))
    assert result["f1"] == pytest.approx(sk.f1_score(target, called))
    assert result["precision"] == pytest.approx(sk.precision_score(target, called))
    assert result["roc_auc"] == pytest.approx(sk.roc_auc_score(target, probability))
    assert result["average_precision"] == pytest.approx(sk.average_precision_score(target, probability))
    assert result["brier"] == pytest.approx(sk.brier_score_loss(target, probability))
    assert result["pauc_above_80_tpr"] == pytest.approx(isic_2024(target, probability), abs=1e-12)


def isic_2024(target, probability):
    """The challenge's published scoring: both labels and scores turned round, then McClish's standardisation undone."""
    scaled = sk.roc_auc_score(1 - target, 1 - probability, max_fpr=0.2)
    return 0.5 * 0.2**2 + (0.2 - 0.5 * 0.2**2) / 0.5 * (scaled - 0.5)


def test_partial_area_is_a_fifth_at_best_and_a_fiftieth_by_chance():
    assert evaluate(*predictions("perfect"), resamples=2)["pauc_above_80_tpr"] == pytest.approx(0.2)
    assert evaluate(*predictions("constant"), resamples=2)["pauc_above_80_tpr"] == pytest.approx(0.02)


@pytest.mark.parametrize("kind", ["random", "informative", "rare"])
def test_calibration_error_is_the_mean_gap_of_scikit_learns_bins(kind):
    target, probability = predictions(kind)
    share, mean = calibration_curve(target, probability, n_bins=10, strategy="quantile")
    assert evaluate(target, probability, resamples=5)["ece"] == pytest.approx(np.abs(share - mean).mean(), abs=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_operating_points_equal_a_search_over_all_thresholds(kind):
    target, probability = predictions(kind)
    result = evaluate(target, probability, resamples=5)
    points = []
    for threshold in [np.inf, *np.unique(probability)]:
        called = probability >= threshold
        points.append((np.mean(called[target == 1]), np.mean(~called[target == 0])))
    best_sensitivity = max(sensitivity for sensitivity, specificity in points if specificity > 0.9 - 1e-9)
    best_specificity = max(specificity for sensitivity, specificity in points if sensitivity > 0.9 - 1e-9)
    assert result["sensitivity_at_90_specificity"] == pytest.approx(best_sensitivity)
    assert result["specificity_at_90_sensitivity"] == pytest.approx(best_specificity)


@pytest.mark.parametrize("kind", KINDS)
def test_the_resampled_metrics_at_weight_one_are_the_point_estimates(kind):
    target, probability = predictions(kind)
    result = evaluate(target, probability, threshold=0.6, resamples=5)
    values = weighted_metrics(target, probability, threshold=0.6)(np.ones((1, len(target))))
    assert set(values) == set(NAMES)
    for name in NAMES:
        assert values[name][0] == pytest.approx(np.nan if result[name] is None else result[name], nan_ok=True), name


def test_a_probability_at_the_threshold_is_called_malignant():
    assert evaluate([0, 1], [0.3, 0.6], threshold=0.6, resamples=2)["recall"] == 1


def test_predictive_values_follow_bayes_rule():
    target, probability = predictions("informative")
    result = evaluate(target, probability, prevalence=target.mean(), resamples=5)
    assert result["ppv"] == pytest.approx(result["precision"])
    rare = evaluate(target, probability, prevalence=0.0176, resamples=5)
    odds = 0.0176 / (1 - 0.0176) * rare["recall"] / (1 - rare["specificity"])  # prior odds x likelihood ratio
    assert rare["ppv"] == pytest.approx(odds / (1 + odds))
    assert rare["ppv"] < 0.1 < result["ppv"]
    assert rare["npv"] > result["npv"]


@pytest.mark.parametrize(
    ("target", "probability", "name", "reason"),
    [
        ([], [], "accuracy", "no images"),
        ([0, 0, 0], [0.1, 0.9, 0.4], "roc_auc", "no malignant image"),
        ([0, 0, 0], [0.1, 0.2, 0.4], "precision", "no image called malignant"),
        ([1, 1, 1], [0.1, 0.9, 0.4], "specificity", "no benign image"),
        ([0, 1, 1], [0.1, 0.2, 0.4], "precision", "no image called malignant"),
        ([0, 1, 1], [0.1, 0.2, 0.4], "ppv", "no image called malignant"),
        ([0, 1, 1], [0.9, 0.8, 0.7], "npv", "no image called benign"),
    ],
)
def test_what_is_undefined_is_none_with_its_reason(target, probability, name, reason):
    result = evaluate(target, probability, resamples=50)
    assert result[name] is None
    assert result[f"{name}_ci95"] is None
    assert result["undefined"][name] == reason
    for each in NAMES:  # every key is there, and every None has a reason
        assert (result[each] is None) == (each in result["undefined"])
        assert (result[f"{each}_ci95"] is None) == (f"{each}_ci95" in result["undefined"])


@pytest.mark.parametrize("kind", KINDS)
def test_the_result_is_json_and_every_interval_is_ordered(kind):
    target, probability = predictions(kind)
    result = evaluate(target, probability, patients=np.arange(len(target)) // 3, resamples=200)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    for name in NAMES:
        if result[f"{name}_ci95"] is not None:
            low, high = result[f"{name}_ci95"]
            assert 0 <= low < high <= 1
            assert low <= result[name] <= high


def test_a_sample_without_errors_claims_no_certainty():
    result = evaluate(*predictions("perfect"), resamples=100)
    assert result["accuracy"] == result["roc_auc"] == 1
    assert result["roc_auc_ci95"] is None
    assert "same value" in result["undefined"]["roc_auc_ci95"]


def test_the_seed_decides_the_interval():
    target, probability = predictions("informative")
    first, again, other = (evaluate(target, probability, resamples=50, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first["roc_auc_ci95"] != other["roc_auc_ci95"]
    assert first["roc_auc"] == other["roc_auc"]


@pytest.mark.parametrize(
    ("target", "probability", "message"),
    [
        ([0, 1], [0.1, np.nan], "1 of 2 probabilities .* nan at index 1"),
        ([0, 1], [0.1, np.inf], "between 0 and 1"),
        ([0, 1], [-0.1, 0.5], "between 0 and 1"),
        ([0, 2], [0.1, 0.5], "target must be 0 .* or 1"),
        ([0, 1], [0.1], r"\(2,\) and \(1,\)"),
        ([[0], [1]], [[0.1], [0.2]], r"must both be \[N\]"),
    ],
)
def test_wrong_input_is_an_error(target, probability, message):
    with pytest.raises(ValueError, match=message):
        evaluate(target, probability)


@pytest.mark.parametrize("kind", ["random", "informative", "rare", "ties", "two values", "perfect", "inverted"])
def test_equals_the_challenges_own_scoring(kind):
    sys.modules.setdefault("zipfile_deflate64", zipfile)  # needs a compiler; only opens archives, none here
    pytest.importorskip("isic_challenge_scoring", reason="not installed: make setup installs it")
    import pandas as pd
    from isic_challenge_scoring.classification import ClassificationScore

    target, probability = predictions(kind)
    above_half = np.nextafter(0.5, 1)  # the challenge calls 0.5 itself benign
    result = evaluate(target, probability, above_half, prevalence=target.mean(), resamples=5)
    score = ClassificationScore._category_score(
        pd.Series(target.astype(float)), pd.Series(probability), pd.Series(np.ones(len(target))), "malignant"
    )
    pairs = {"accuracy": "accuracy", "recall": "sensitivity", "specificity": "specificity", "f1": "dice", "ppv": "ppv"}
    pairs |= {"npv": "npv", "roc_auc": "auc", "average_precision": "ap"}
    for ours, theirs in pairs.items():
        assert result[ours] == pytest.approx(score[theirs]), ours
    # Theirs (of 2020) is the whole area under the curve right of where it reaches 80 %; ISIC 2024 takes the part above.
    fpr, tpr, _ = sk.roc_curve(target, probability, drop_intermediate=False)
    index = np.searchsorted(tpr, 0.8)
    start = np.interp(0.8, tpr[index - 1 : index + 1], fpr[index - 1 : index + 1])
    assert result["pauc_above_80_tpr"] == pytest.approx(score["auc_sens_80"] - 0.8 * (1 - start))


@pytest.mark.parametrize("prevalence", [0.0176, 0.3])
def test_restated_predictive_values_are_those_of_an_evaluation_at_the_prevalence(prevalence):
    rng = np.random.default_rng(0)
    target, probability = rng.integers(0, 2, 80), rng.random(80)
    here, there = (evaluate(target, probability, prevalence=share, resamples=20) for share in (0.1, prevalence))
    found = restated(here, prevalence)
    assert (found["ppv"], found["npv"]) == pytest.approx((there["ppv"], there["npv"]))
    assert (found["ppv_ci95"], found["prevalence"]) == (None, prevalence)
    assert restated(here, 0.1) == here
    assert restated(evaluate([0, 0], [0.1, 0.2], resamples=2), prevalence)["ppv"] is None


@pytest.mark.parametrize("n", [100, 1000])
def test_zero_belongs_to_the_interval_of_the_ece_of_a_calibrated_model(n):
    rng = np.random.default_rng(0)
    held, wrong = 0, 0
    for _ in range(300):
        probability = rng.beta(0.6, 0.6, n)
        ece = evaluate((rng.random(n) < probability).astype(int), probability, resamples=2)["ece"]
        held += ece <= calibrated_ece(probability)
        skewed = (rng.random(n) < np.clip(probability - 0.25, 0, 1)).astype(int)
        wrong += evaluate(skewed, probability, resamples=2)["ece"] <= calibrated_ece(probability)
    assert 0.95 <= held / 300 <= 1  # 97.5 % is meant
    assert wrong / 300 < 0.05


def test_the_ece_of_a_weighted_calibrated_model_is_chance_too():
    rng = np.random.default_rng(0)
    n, prevalence = 2000, 0.0176
    drawn = rng.beta(0.6, 0.6, n)
    probability = correct_prior(drawn, 0.5, prevalence)
    over = 0
    for _ in range(200):
        target = (rng.random(n) < drawn).astype(int)
        over += errors_at(target, probability, prevalence, np.arange(n), resamples=2)["ece"] > calibrated_ece(
            probability, drawn, prevalence
        )
    assert over / 200 < 0.06


def test_the_interval_of_an_ece_reaches_down_to_zero_unless_chance_is_ruled_out():
    assert ece_interval(0.05, [0.04, 0.09], by_chance=0.06) == [0.0, 0.09]
    assert ece_interval(0.08, [0.05, 0.12], by_chance=0.06) == pytest.approx([0.04, 0.12])
    assert ece_interval(0.08, None, by_chance=0.06) is None
    target, constant = np.array([0, 1] * 50), np.full(100, 0.5)  # what a collapsed embedding gives
    low, high = evaluate(target, constant)["ece_ci95"]
    assert low == 0
    assert high > 0.05
