"""Several seeds of one cross-validation: means beside a plain loop, and runs that can't be compared."""

import json
import shutil
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
        (folder / f"fold-{fold}" / "best_epoch.json").write_text(json.dumps({"sha256": f"{seed}-{fold}"}))
    pooled = {"images": FOLDS * N, "models": [f"{seed}-{fold}" for fold in range(FOLDS)]}
    (folder / "cross_validation.json").write_text(json.dumps(pooled))
    return pd.concat(tables)


def test_the_mean_is_that_of_each_runs_figures(tmp_path):
    homes = [tmp_path / str(seed) for seed in range(3)]
    tables = [write_run(home, seed) for seed, home in enumerate(homes)]
    runs = list(seeds.read_runs(homes).values())
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
    text = seeds.summary(seeds.read_runs([tmp_path / "0", tmp_path / "1"]))
    assert text.splitlines()[-1] == "Left out, since not every run has it: frozen features + logistic regression"
    assert text.count("frozen features") == 1


def test_ids_may_be_numbers_in_one_fold_and_words_in_the_next(tmp_path):
    write_run(tmp_path / "0", 0)
    scores = tmp_path / "0" / "fold-1" / "test_scores.csv"
    table = pd.read_csv(scores)
    table.assign(isic_id=np.arange(len(table)), patient_id=7, group=7).to_csv(scores, index=False)
    run = seeds.read_run(tmp_path / "0")
    assert {type(value) for column in ("isic_id", "patient_id", "group") for value in run[column]} == {str}


def leftover(home):
    (home / "fold-3").mkdir()
    for name in ("test_scores.csv", "best_epoch.json"):
        (home / "fold-3" / name).write_bytes((home / "fold-0" / name).read_bytes())


def trained_again(home):
    (home / "fold-1" / "best_epoch.json").write_text(json.dumps({"sha256": "another"}))


def cut_short(home):
    (home / "fold-1" / "best_epoch.json").write_text('{"sha')


def of_something_else(home):
    (home / "cross_validation.json").write_text("[]")


def without_folds(home):
    for fold in home.glob("fold-*"):
        shutil.rmtree(fold)


@pytest.mark.parametrize("change", [leftover, trained_again, cut_short, of_something_else, without_folds])
def test_folds_that_are_not_those_pooled_are_refused(tmp_path, change):
    write_run(tmp_path / "0", 0)
    change(tmp_path / "0")
    with pytest.raises(UserError, match="not those of its cross_validation"):
        seeds.read_run(tmp_path / "0")


def test_runs_on_other_images_are_refused(tmp_path):
    write_run(tmp_path / "0", 0)
    write_run(tmp_path / "1", 1, first=5)
    with pytest.raises(UserError, match="other images or folds"):
        seeds.read_runs([tmp_path / "0", tmp_path / "1"])


def test_runs_on_other_folds_are_refused(tmp_path):
    write_run(tmp_path / "0", 0)
    write_run(tmp_path / "1", 1)
    one, two = (tmp_path / "1" / f"fold-{fold}" / "test_scores.csv" for fold in (0, 1))
    former = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(former)
    with pytest.raises(UserError, match="other images or folds"):
        seeds.read_runs([tmp_path / "0", tmp_path / "1"])


def test_a_run_that_is_not_finished_ends_the_command_with_one_line(tmp_path):
    write_run(tmp_path / "0", 0)
    (tmp_path / "1").mkdir()
    command = [sys.executable, "-m", "Modules.evaluation.seeds", tmp_path / "0", tmp_path / "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("seeds.py: no finished cross-validation in ")
    assert done.stderr.count("\n") == 1
