"""Net benefit against a count by hand, and its limits."""

import json

import numpy as np
import pytest

from Modules.evaluation.decision_curve import POINTS, decision_curve


def simulate(n=500, seed=0):
    rng = np.random.default_rng(seed)
    target = rng.integers(0, 2, n)
    return target, 1 / (1 + np.exp(-(target - 0.5 + rng.normal(size=n))))


def test_net_benefit_is_hits_less_weighted_false_alarms():
    target, probability = simulate()
    share = target.mean()
    curve = decision_curve(target, probability, share, np.arange(500))
    assert len(curve["thresholds"]) == len(curve["model"]) == len(curve["treat_all"]) == POINTS
    for threshold, model, everybody in zip(curve["thresholds"], curve["model"], curve["treat_all"], strict=True):
        called, odds = probability >= threshold, threshold / (1 - threshold)
        hits, alarms = (called & (target == 1)).sum(), (called & (target == 0)).sum()
        assert model == pytest.approx((hits - odds * alarms) / 500)
        assert everybody == pytest.approx((target.sum() - odds * (1 - target).sum()) / 500)


def test_at_another_prevalence_the_classes_count_as_they_would_there():
    target, probability = simulate()
    curve = decision_curve(target, probability, 0.02, np.arange(500))
    threshold = curve["thresholds"][30]
    called = probability >= threshold
    sensitivity, alarms = called[target == 1].mean(), called[target == 0].mean()
    expected = 0.02 * sensitivity - 0.98 * alarms * threshold / (1 - threshold)
    assert curve["model"][30] == pytest.approx(expected)
    assert curve["thresholds"][0] < 0.02 < curve["thresholds"][-1]


def test_a_perfect_model_gains_the_prevalence_and_one_that_calls_all_equals_treat_all():
    target, _ = simulate()
    perfect = decision_curve(target, target.astype(float), 0.1, np.arange(500))
    np.testing.assert_allclose(perfect["model"], 0.1)
    assert set(perfect["model_ci95"]) == {None}  # every resample gives the same
    everybody = decision_curve(target, np.ones(500), 0.1, np.arange(500))
    np.testing.assert_allclose(everybody["model"], everybody["treat_all"])
    nobody = decision_curve(target, np.zeros(500), 0.1, np.arange(500))
    np.testing.assert_allclose(nobody["model"], 0)


def test_intervals_hold_the_estimate_and_are_json():
    target, probability = simulate()
    curve = decision_curve(target, probability, 0.3, np.arange(500) // 3)
    assert json.loads(json.dumps(curve, allow_nan=False)) == curve
    bands = [(value, *band) for value, band in zip(curve["model"], curve["model_ci95"], strict=True) if band]
    assert len(bands) > POINTS / 2
    assert all(low <= value <= high for value, low, high in bands)


@pytest.mark.parametrize("label", [0, 1])
def test_one_class_has_no_curve(label):
    curve = decision_curve(np.full(4, label), np.linspace(0, 1, 4), 0.02, np.arange(4))
    assert "both classes" in curve["undefined"]
