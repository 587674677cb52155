"""The folds' scores in one table: counts, thresholds, differences, and what the summary says of them."""

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import accuracy_score, roc_auc_score

from Modules.cli import UserError
from Modules.evaluation import cross_validation
from Modules.evaluation.cross_validation import pool, summary


def fold(folder, seed, threshold=0.5, n=60, good=1.0, shift=0.0):
    """Scores of n images of n / 2 patients: the classifier better than the logistic baseline, with some threshold."""
    rng = np.random.default_rng(seed)
    target = np.arange(n) % 2
    logit = good * (2 * target - 1) + rng.normal(size=n)
    patients = [f"{seed}-{i // 2}" for i in range(n)]
    test = pd.DataFrame(
        {
            "isic_id": [f"{seed}-{i}" for i in range(n)],
            "patient_id": patients,
            "group": patients,
            "target": target,
            "balanced": np.arange(n) < n - 10,
        },
        index=np.arange(n) + 7,
    )
    scores = {
        "probability": 1 / (1 + np.exp(-logit - shift)),
        "threshold": threshold,
        "knn": rng.uniform(size=n),
        "logistic": 1 / (1 + np.exp(-0.3 * (2 * target - 1) - rng.normal(size=n))),
    }
    folder.mkdir()
    table = cross_validation.score_table(test, scores)
    table.to_csv(folder / "test_scores.csv", index=False)
    return table


def test_pooled_scores_are_those_of_all_folds_together(tmp_path):
    table = pd.concat([fold(tmp_path / str(k), k) for k in range(3)])
    pooled = pool([tmp_path / str(k) for k in range(3)], 0.0176)
    assert pooled["images"] == 180
    for view, rows in (("test", table[table["balanced"]]), ("test_full", table)):
        assert list(pooled[view]) == ["probability", "knn", "logistic"]
        for name in pooled[view]:
            result = pooled[view][name]
            assert result["n"] == len(rows)
            assert result["prevalence"] == 0.0176
            assert result["roc_auc"] == pytest.approx(roc_auc_score(rows["target"], rows[name]))
            assert result["accuracy"] == pytest.approx(accuracy_score(rows["target"], rows[name] >= 0.5))
            assert result["roc_auc_ci95"][0] < result["roc_auc"] < result["roc_auc_ci95"][1]


def test_the_difference_is_paired_and_knows_its_sign(tmp_path):
    table = fold(tmp_path / "0", 0, n=200)
    pooled = pool([tmp_path / "0"], 0.0176)
    gain = pooled["difference"]["test_full"]["logistic"]["roc_auc"]
    aucs = [roc_auc_score(table["target"], table[name]) for name in ("probability", "logistic")]
    assert gain["estimate"] == pytest.approx(aucs[0] - aucs[1])
    assert 0 < gain["ci95"][0] < gain["estimate"] < gain["ci95"][1]
    text = summary(pooled)
    assert "beats frozen features" in text
    assert max(map(len, text.splitlines())) <= 80


def test_a_classifier_that_loses_is_told_so(tmp_path):
    fold(tmp_path / "0", 0, good=-0.5)
    assert "loses to frozen features + logistic regression" in summary(pool([tmp_path / "0"], 0.0176))


def test_each_fold_is_judged_at_its_own_threshold(tmp_path):
    """The same scores moved by a logit of 1, and the threshold with them, give the same decisions."""
    plain = fold(tmp_path / "plain", 0)
    moved = fold(tmp_path / "moved", 0, shift=1.0, threshold=1 / (1 + np.exp(-1.0)))
    one, other = (pool([tmp_path / name], 0.0176)["test_full"]["probability"] for name in ("plain", "moved"))
    assert not np.allclose(plain["probability"], moved["probability"])
    assert one["confusion_matrix"] == other["confusion_matrix"]
    assert one["roc_auc"] == pytest.approx(other["roc_auc"])


def test_missing_scores_name_the_file(tmp_path):
    with pytest.raises(UserError, match=r"test_scores\.csv .*train it with --fold"):
        pool([tmp_path], 0.0176)


def test_the_share_among_the_known_weighs_them_by_their_cosine(monkeypatch):
    monkeypatch.setattr(cross_validation, "K", 2)
    angles = np.radians([0, 10, 90, 100])
    known = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float16)
    gallery = {"embeddings": known, "targets": np.array([1, 1, 0, 1])}
    share = cross_validation.knn_share(np.array([[1.0, 0.0], [0.0, 1.0]], np.float32), gallery)
    malignant, benign = np.exp(np.cos(np.radians([10, 0])) / 0.07)
    assert share == pytest.approx([1.0, malignant / (malignant + benign)], abs=0.01)
