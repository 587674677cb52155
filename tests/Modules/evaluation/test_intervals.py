import numpy as np
import pytest
from scipy.stats import norm

from Modules.evaluation import intervals
from Modules.evaluation.intervals import bootstrap, interval, patient_codes
from Modules.evaluation.metrics import evaluate, weighted_metrics


def simulate(rng, patients, rate=0.3, shift=1.5):
    """target, probability, patient codes: 1 to 9 images a patient that resemble one another, ROC AUC Φ(shift / √2)."""
    codes = np.repeat(np.arange(patients), rng.integers(1, 10, patients))
    target = (rng.random(len(codes)) < rate).astype(int)
    score = shift * target + 0.6 * rng.normal(size=patients)[codes] + 0.8 * rng.normal(size=len(codes))
    return target, norm.cdf(score - shift / 2), codes


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("decimals", [8, 1])
def test_equals_a_loop_over_explicit_resamples(seed, decimals):
    target, probability, codes = simulate(np.random.default_rng(seed), 30)
    probability = probability.round(decimals)
    fast = bootstrap(weighted_metrics(target, probability, 0.4), codes, resamples=40, seed=seed)

    edges = np.percentile(probability, np.linspace(0, 100, 11))[1:-1]
    drawn = np.random.default_rng(seed).integers(30, size=(40, 30))
    for row, patients in enumerate(drawn):
        images = np.concatenate([np.flatnonzero(codes == patient) for patient in patients])
        slow = evaluate(target[images], probability[images], 0.4, resamples=1)
        bins = np.searchsorted(edges, probability[images])  # those of the sample: a resample's own would move
        gaps = [abs((target[images] - probability[images])[bins == b].sum()) for b in range(10)]
        slow["ece"] = sum(gaps) / len(images)
        for name, values in fast.items():
            assert values[row] == pytest.approx(np.nan if slow[name] is None else slow[name], nan_ok=True), name


def test_blocks_do_not_change_the_result(monkeypatch):
    target, probability, codes = simulate(np.random.default_rng(0), 40)
    whole = bootstrap(weighted_metrics(target, probability), codes, resamples=50)
    monkeypatch.setattr(intervals, "BLOCK", 7 * len(codes))
    for name, values in bootstrap(weighted_metrics(target, probability), codes, resamples=50).items():
        np.testing.assert_allclose(values, whole[name], rtol=1e-12)


def test_images_of_one_patient_are_drawn_together():
    seen = []
    codes = np.array([0, 1, 1, 2, 0, 3])
    bootstrap(lambda weights: seen.append(weights) or {"n": weights.sum(axis=1)}, codes, resamples=100)
    weights = np.concatenate(seen)
    assert weights.shape == (100, 6)
    np.testing.assert_array_equal(weights[:, 0], weights[:, 4])
    np.testing.assert_array_equal(weights[:, 1], weights[:, 2])
    np.testing.assert_array_equal(weights[:, [0, 1, 3, 5]].sum(axis=1), 4)


def test_copies_of_an_image_add_no_certainty():
    target, probability, _ = simulate(np.random.default_rng(0), 60)
    n = len(target)
    once = evaluate(target, probability, resamples=300)
    copies = evaluate(
        np.repeat(target, 9), np.repeat(probability, 9), patients=np.repeat(np.arange(n), 9), resamples=300
    )
    assert copies["roc_auc_ci95"] == pytest.approx(once["roc_auc_ci95"])
    naive = evaluate(np.repeat(target, 9), np.repeat(probability, 9), resamples=300)
    assert np.ptp(naive["roc_auc_ci95"]) < 0.5 * np.ptp(once["roc_auc_ci95"])


def test_a_paired_comparison_is_a_statistic_like_any_other():
    target, probability, codes = simulate(np.random.default_rng(0), 60)
    worse = np.clip(probability + np.random.default_rng(1).normal(0, 0.3, len(probability)), 0, 1)
    first, second = weighted_metrics(target, probability), weighted_metrics(target, worse)
    gain = bootstrap(lambda w: {"roc_auc": first(w)["roc_auc"] - second(w)["roc_auc"]}, codes, resamples=200)
    (low, _), _ = interval(gain["roc_auc"], 60)
    assert low > 0


def test_80_percent_of_272_images_is_75_to_85():
    target = np.tile([0, 1], 136)
    probability = np.where(np.arange(272) < 218, target, 1 - target)  # 80 % right
    assert evaluate(target, probability)["accuracy_ci95"] == pytest.approx([0.75, 0.85], abs=0.01)


def test_patient_codes_join_equal_names_and_leave_the_nameless_alone():
    assert patient_codes(None, 3).tolist() == [0, 1, 2]
    codes = patient_codes(["b", None, "a", "b", np.nan], 5)
    assert codes[0] == codes[3]
    assert len(set(codes)) == 4
    assert sorted(set(codes)) == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="2 entries, expected one for each of the 3 images"):
        patient_codes(["a", "b"], 3)


def test_interval_is_wider_for_few_patients():
    values = np.random.default_rng(0).normal(size=100_000)
    assert interval(values, 10_000)[0] == pytest.approx([-1.96, 1.96], abs=0.03)
    few = interval(values, 10)[0]
    assert few == pytest.approx([-2.385, 2.385], abs=0.06)  # Student's t with 9 degrees of freedom, times √(10 / 9)


def test_no_interval_without_spread_or_with_too_few_defined_resamples():
    assert interval(np.ones(100), 50)[0] is None
    bounds, reason = interval(np.r_[np.full(20, np.nan), np.linspace(0, 1, 80)], 50)
    assert bounds is None
    assert reason == "undefined in 20% of the resamples"
    assert interval(np.r_[np.nan, np.linspace(0, 1, 99)], 50)[0] is not None


def test_one_patient_gives_no_interval():
    target, probability, _ = simulate(np.random.default_rng(0), 20)
    result = evaluate(target, probability, patients=["p"] * len(target), resamples=20)
    assert result["roc_auc"] is not None
    assert result["roc_auc_ci95"] is None


@pytest.mark.slow
@pytest.mark.parametrize(("patients", "rate"), [(54, 0.5), (300, 0.3), (1400, 0.0176)])
def test_the_interval_holds_the_true_area_in_95_of_100_samples(patients, rate):
    """About 270, 1,500 and 7,000 images; the simulated area is known: Φ(1.5 / √2) = 0.856."""
    rng = np.random.default_rng(0)
    truth = norm.cdf(1.5 / np.sqrt(2))
    held = 0
    for repetition in range(1000):
        target, probability, codes = simulate(rng, patients, rate)
        resampled = bootstrap(weighted_metrics(target, probability), codes, resamples=500, seed=repetition)
        (low, high), _ = interval(resampled["roc_auc"], patients)
        held += low <= truth <= high
    print(f"{patients} patients: {held / 1000:.3f}")
    assert 0.93 <= held / 1000 <= 0.97
