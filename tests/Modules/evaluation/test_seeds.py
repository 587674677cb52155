"""Several seeds of one cross-validation: means beside a plain loop, and runs that can't be compared."""

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import accuracy_score, roc_auc_score

from Modules.cli import UserError
from Modules.evaluation import seeds

FOLDS, N = 3, 40
TARGETS = np.arange(N) % 2


def write_run(folder, seed, scorers=("probability", "knn", "logistic"), first=0):
    """A run on FOLDS folds of N images, two of a patient, in an order of its own; its scores by the images' ids."""
    rng = np.random.default_rng(seed)
    tables = []
    for fold in range(FOLDS):
        ids = [f"{first + fold}-{k:02}" for k in range(N)]
        patients = [f"{fold}-{k // 2}" for k in range(N)]
        table = pd.DataFrame({"isic_id": ids, "patient_id": patients, "group": patients, "target": TARGETS})
        table = table.assign(balanced=True, threshold=0.5)
        for name, good in zip(scorers, (1.5, 1.0, 0.3), strict=False):
            table[name] = 1 / (1 + np.exp(-good * (2 * TARGETS - 1) - rng.normal(size=N)))
        (folder / f"fold-{fold}").mkdir(parents=True)
        table.sample(frac=1, random_state=seed).to_csv(folder / f"fold-{fold}" / "test_scores.csv", index=False)
        tables.append(table)
    (folder / "cross_validation.json").write_text("{}")
    return pd.concat(tables)


def test_the_mean_is_that_of_each_runs_figures(tmp_path):
    homes = [tmp_path / str(seed) for seed in range(3)]
    tables = [write_run(home, seed) for seed, home in enumerate(homes)]
    runs = seeds.read_runs(homes)
    for name in ("probability", "knn", "logistic"):
        found = seeds.mean(runs, name)(np.ones((1, FOLDS * N)))
        assert found["roc_auc"][0] == pytest.approx(np.mean([roc_auc_score(t["target"], t[name]) for t in tables]))
        right = [accuracy_score(t["target"], t[name] >= 0.5) for t in tables]
        assert found["accuracy"][0] == pytest.approx(np.mean(right))


def test_the_summary_has_the_mean_each_run_and_the_paired_gain(tmp_path):
    homes = [tmp_path / str(seed) for seed in range(2)]
    tables = [write_run(home, seed) for seed, home in enumerate(homes)]
    text = seeds.summary(seeds.read_runs(homes))
    each = [[roc_auc_score(t["target"], t[name]) for t in tables] for name in ("probability", "logistic")]
    assert f"{np.mean(each[0]):.3f} [" in text
    assert all(f"{value:.3f}" in text for values in each for value in values)
    assert f"beats frozen features + logistic regression\n  by {np.mean(each[0]) - np.mean(each[1]):+.3f} [" in text
    assert max(map(len, text.splitlines())) <= 80


def test_a_scorer_that_one_run_lacks_is_left_out(tmp_path):
    write_run(tmp_path / "0", 0)
    write_run(tmp_path / "1", 1, scorers=("probability", "knn"))
    assert "logistic" not in seeds.summary(seeds.read_runs([tmp_path / "0", tmp_path / "1"]))


def test_runs_on_other_images_are_refused(tmp_path):
    write_run(tmp_path / "0", 0)
    write_run(tmp_path / "1", 1, first=5)
    with pytest.raises(UserError, match="other images"):
        seeds.read_runs([tmp_path / "0", tmp_path / "1"])


def test_a_run_that_is_not_finished_ends_the_command_with_one_line(tmp_path):
    write_run(tmp_path / "0", 0)
    (tmp_path / "1").mkdir()
    command = [sys.executable, "-m", "Modules.evaluation.seeds", tmp_path / "0", tmp_path / "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("seeds.py: no finished cross-validation in ")
    assert done.stderr.count("\n") == 1
