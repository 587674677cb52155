"""Two models on the same images: differences, their intervals, DeLong and McNemar."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom
from sklearn.metrics import accuracy_score, roc_auc_score

from Modules.evaluation.comparison import compare, delong, mcnemar


def simulate(n=300, seed=0, gain=0.0):
    rng = np.random.default_rng(seed)
    target = rng.integers(0, 2, n)
    shared = rng.normal(size=n)
    scores = [target * (1 + extra) + shared + rng.normal(size=n) for extra in (gain, 0)]
    return target, *(1 / (1 + np.exp(-score)) for score in scores)


def slow_delong(target, first, second):
    """The placements of the paper's equations 4 to 6 by a loop over all pairs; the variance of the difference."""
    placements = []
    for score in (first, second):
        x, y = score[target == 1], score[target == 0]
        kernel = np.array([[1.0 if a > b else 0.5 if a == b else 0.0 for b in y] for a in x])
        placements.append((kernel.mean(axis=1), kernel.mean(axis=0), kernel.mean()))
    (v1, w1, a1), (v2, w2, a2) = placements
    s10, s01 = np.cov(v1, v2), np.cov(w1, w2)
    s = s10 / len(v1) + s01 / len(w1)
    return a1 - a2, np.sqrt(s[0, 0] + s[1, 1] - 2 * s[0, 1])


@pytest.mark.parametrize("decimals", [8, 1])
@pytest.mark.parametrize("seed", range(3))
def test_delong_equals_a_loop_over_all_pairs(seed, decimals):
    target, first, second = simulate(80, seed, gain=0.5)
    first, second = first.round(decimals), second.round(decimals)
    found = delong(target, first, second)
    difference, error = slow_delong(target, first, second)
    assert found["difference"] == pytest.approx(difference)
    assert found["difference"] == pytest.approx(roc_auc_score(target, first) - roc_auc_score(target, second))
    assert found["standard_error"] == pytest.approx(error)
    assert found["z"] == pytest.approx(difference / error)


def test_delong_rejects_equal_models_in_one_of_twenty():
    p = np.array([delong(*simulate(120, seed))["p"] for seed in range(400)])
    assert 0.03 < np.mean(p < 0.05) < 0.08
    assert 0.4 < np.median(p) < 0.6


def test_delong_finds_a_better_model():
    assert delong(*simulate(600, gain=1.0))["p"] < 1e-4


@pytest.mark.parametrize(
    ("target", "first", "second", "reason"),
    [
        ([0, 0, 0], [0.1, 0.2, 0.3], [0.3, 0.2, 0.1], "two images of each class"),
        ([0, 0, 1], [0.1, 0.2, 0.3], [0.3, 0.2, 0.1], "two images of each class"),
        ([0, 0, 1, 1], [0.1, 0.2, 0.3, 0.4], [0.2, 0.4, 0.6, 0.8], "rank the images alike"),
        ([0, 0, 1, 1], [0.5] * 4, [0.4] * 4, "rank the images alike"),
    ],
)
def test_delong_without_an_answer_says_why(target, first, second, reason):
    found = delong(np.array(target), np.array(first), np.array(second))
    assert found["p"] is None
    assert reason in found["reason"]


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=30))
@settings(deadline=None)
def test_mcnemar_is_the_two_sided_binomial_test_of_the_discordant(pairs):
    first, second = np.array(pairs).T
    found = mcnemar(first, second)
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    assert (found["only_first"], found["only_second"]) == (only_first, only_second)
    total = only_first + only_second
    tail = binom.cdf(min(only_first, only_second), total, 0.5)
    assert found["p"] == pytest.approx(min(1, 2 * tail))


def test_differences_are_paired_and_have_the_sign_of_first_less_second():
    target, first, second = simulate(400, gain=1.0)
    codes = np.arange(400) // 2
    found = compare(target, first, second, (0.6, 0.4), codes)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    auc = found["differences"]["roc_auc"]
    assert auc["difference"] == pytest.approx(roc_auc_score(target, first) - roc_auc_score(target, second))
    assert 0 < auc["ci95"][0] < auc["difference"] < auc["ci95"][1]
    accuracy = accuracy_score(target, first >= 0.6) - accuracy_score(target, second >= 0.4)
    assert found["differences"]["accuracy"]["difference"] == pytest.approx(accuracy)
    right = (first >= 0.6) == (target == 1), (second >= 0.4) == (target == 1)
    assert found["mcnemar"] == mcnemar(*right)
    turned = compare(target, second, first, (0.4, 0.6), codes)["differences"]["roc_auc"]
    assert turned["ci95"] == pytest.approx([-auc["ci95"][1], -auc["ci95"][0]])


def test_a_model_does_not_differ_from_itself():
    target, first, _ = simulate()
    found = compare(target, first, first, (0.5, 0.5), np.arange(300))
    assert all(row["difference"] == 0 and row["ci95"] is None for row in found["differences"].values())
    assert found["mcnemar"]["p"] == 1
    assert found["delong"]["p"] is None


def test_one_class_leaves_the_ranking_undefined_with_a_reason():
    found = compare(np.zeros(5, int), np.linspace(0, 1, 5), np.linspace(1, 0, 5), (0.5, 0.5), np.arange(5))
    assert found["differences"]["roc_auc"]["difference"] is None
    assert found["differences"]["roc_auc"]["reason"] == "no malignant image"
    assert found["differences"]["accuracy"]["difference"] is not None
