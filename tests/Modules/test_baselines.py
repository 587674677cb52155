"""The plain classifier: it finds what is there, and its penalty is chosen between groups."""

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import brier_score_loss, roc_auc_score

from Modules import baselines
from Modules.cli import UserError


def table_of(target, groups=None):
    groups = np.arange(len(target)) if groups is None else groups
    return pd.DataFrame({"target": target, "group": [f"group {i}" for i in groups]})


def baseline_auc(strength, n=240):
    rng = np.random.default_rng(0)
    target = np.arange(2 * n) % 2
    features = rng.normal(size=(2 * n, 12)) + strength * target[:, None] * (np.arange(12) < 3)
    train = table_of(target[:n], groups=np.arange(n) // 3)
    return roc_auc_score(target[n:], baselines.logistic_regression(features[:n], train, features[n:]))


def test_the_baseline_finds_what_is_there_and_nothing_in_noise():
    assert baseline_auc(strength=1.0) > 0.85
    assert 0.4 < baseline_auc(strength=0.0) < 0.6


def test_the_baseline_does_not_care_for_the_scale_of_a_feature():
    rng = np.random.default_rng(0)
    target = np.arange(80) % 2
    features = rng.normal(size=(80, 4)) + target[:, None]
    scaled = features * [1e-4, 1, 1e3, 1] + [0, 100, 0, -100]
    one, other = (baselines.logistic_regression(x[:40], table_of(target[:40]), x[40:]) for x in (features, scaled))
    np.testing.assert_allclose(one, other, atol=1e-5)


def test_the_baseline_chooses_its_penalty_between_groups_and_with_both_classes(monkeypatch):
    folds = []
    split = baselines.StratifiedGroupKFold.split

    def recorded(self, features, target, groups):
        for parts in split(self, features, target, groups):
            folds.append([(set(groups.iloc[part]), set(target.iloc[part])) for part in parts])
            yield parts

    monkeypatch.setattr(baselines.StratifiedGroupKFold, "split", recorded)
    train = table_of((np.arange(60) % 10 == 0).astype(int), groups=np.arange(60) // 2)
    baselines.logistic_regression(np.random.default_rng(0).normal(size=(60, 6)), train, np.zeros((6, 6)))
    assert len(folds) == 5
    for (train_groups, train_classes), (test_groups, test_classes) in folds:
        assert not train_groups & test_groups
        assert train_classes == test_classes == {0, 1}


def test_the_baseline_holds_with_the_fewest_images_there_may_be():
    target = np.array([0, 0, 1, 1])
    features = np.array([[0.0], [0.1], [1.0], [1.1]])
    assert roc_auc_score(target, baselines.logistic_regression(features, table_of(target), features)) == 1
    with pytest.raises(UserError, match="one class of a single patient"):
        baselines.logistic_regression(features, table_of(target, groups=[0, 1, 2, 2]), features)


def test_the_baseline_weighs_both_classes_alike():
    """A feature that says nothing: probabilities stay near one half, however rare malignant images are."""
    rng = np.random.default_rng(0)
    target = (np.arange(300) % 10 == 0).astype(int)
    features = rng.normal(size=(2, 300, 1))
    probability = baselines.logistic_regression(features[0], table_of(target), features[1])
    assert brier_score_loss(target, probability) == pytest.approx(0.25, abs=0.02)
