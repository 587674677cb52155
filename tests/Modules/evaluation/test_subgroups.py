"""Whom a model fails: each group's numbers are those of its images alone, and small ones are marked."""

import numpy as np
import pandas as pd
import pytest

from Modules.evaluation.metrics import evaluate
from Modules.evaluation.subgroups import ENOUGH, NEIGHBOURS, WORST, described, subgroups, worst_errors


@pytest.fixture(scope="module")
def split():
    rng = np.random.default_rng(0)
    n = 200
    target = rng.integers(0, 2, n)
    table = pd.DataFrame(
        {
            "isic_id": [f"ISIC_{i}" for i in range(n)],
            "target": target,
            "patient_id": [f"P{i // 2}" for i in range(n)],
            "group": [f"G{i}" for i in range(n)],
            "sex": np.where(np.arange(n) % 10 < 8, "male", "female"),
            "age_approx": np.where(np.arange(n) % 4 == 0, np.nan, 45.0),
            "anatom_site_general_challenge": None,
            "diagnosis": np.where(target == 1, "melanoma", "nevus"),
        }
    )
    return table, np.clip(0.3 * target + 0.7 * rng.random(n), 0, 1)


def test_a_row_holds_the_metrics_of_its_images(split):
    table, probability = split
    rows = subgroups(table, probability, 0.5, described(table))
    (female,) = (row for row in rows if row["value"] == "female")
    chosen = (table["sex"] == "female").to_numpy()
    expected = evaluate(
        table["target"].to_numpy()[chosen], probability[chosen], 0.5, table["patient_id"].to_numpy()[chosen]
    )
    for name in ("n", "n_malignant", "n_patients", "roc_auc", "roc_auc_ci95", "recall", "specificity_ci95"):
        assert female[name] == expected[name]
    assert sum(row["n"] for row in rows if row["stratum"] == "sex") == len(table)


def test_what_the_table_does_not_tell_is_no_stratum(split):
    table, _ = split
    strata = described(table)
    assert list(strata) == ["sex", "age", "diagnosis"]
    assert set(strata["age"]) == {"40-59", "unknown"}


def test_numbers_on_few_images_are_marked(split):
    table, probability = split
    rows = subgroups(table, probability, 0.5, described(table))
    for row in rows:
        benign, malignant = row["n"] - row["n_malignant"], row["n_malignant"]
        assert ("recall" in row["too_few"]) == (malignant < ENOUGH)
        assert ("specificity" in row["too_few"]) == (benign < ENOUGH)
        assert ("roc_auc" in row["too_few"]) == (min(benign, malignant) < ENOUGH)
    (melanoma,) = (row for row in rows if row["value"] == "melanoma")
    assert melanoma["roc_auc"] is None
    assert melanoma["undefined"]["roc_auc"] == "no benign image"
    assert melanoma["too_few"] == ["roc_auc", "specificity"]


def test_the_worst_errors_are_the_surest_wrong_answers_with_their_nearest_known(split):
    table, probability = split
    rng = np.random.default_rng(1)
    vectors = rng.normal(size=(230, 5))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    gallery = {
        "embeddings": vectors[200:],
        "ids": np.array([f"known{i}" for i in range(30)]),
        "targets": np.arange(30) % 2,
    }
    rows = worst_errors(table, probability, vectors[:200], gallery, 0.5)
    target = table["target"].to_numpy()
    missed = np.sort(probability[(target == 1) & (probability < 0.5)])[:WORST]
    alarms = np.sort(probability[(target == 0) & (probability >= 0.5)])[::-1][:WORST]
    assert [row["probability"] for row in rows if row["target"] == 1] == pytest.approx(missed)
    assert [row["probability"] for row in rows if row["target"] == 0] == pytest.approx(alarms)
    for row in rows:
        place = table.index[table["isic_id"] == row["isic_id"]][0]
        cosines = vectors[200:] @ vectors[place]
        assert [known["cosine"] for known in row["neighbours"]] == pytest.approx(np.sort(cosines)[::-1][:NEIGHBOURS])
        assert [known["isic_id"] for known in row["neighbours"]] == [
            f"known{i}" for i in np.argsort(-cosines)[:NEIGHBOURS]
        ]


def test_no_error_gives_no_row(split):
    table, _ = split
    gallery = {"embeddings": np.ones((1, 2), np.float32), "ids": np.array(["a"]), "targets": np.array([0])}
    assert worst_errors(table, table["target"].to_numpy(float), np.ones((200, 2), np.float32), gallery, 0.5) == []
