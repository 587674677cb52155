"""Training starts from a manifest that keeps its promises, or not at all."""

import hashlib
import json

import numpy as np
import pandas as pd
import pytest

from Modules.cli import UserError
from Modules.data.manifest import (
    CLINICAL,
    COLUMNS,
    LABELS,
    fold_view,
    is_data_set,
    manifest_sha256,
    read_manifest,
    write_manifest,
)

SIZES = {"train": 24, "validation": 8, "test": 8, "external": 4}
FOLDS = 4


def small_table() -> pd.DataFrame:
    """Two images a group and patient, half of them malignant, and one that was left out; the sets have no patients."""
    rows = []
    for split, size in SIZES.items():
        for number in range(size):
            name, group, target = f"{split}{number:02d}", f"{split}{number // 2 * 2:02d}", number % 2
            external = split == "external"
            rows.append(
                {
                    "isic_id": name,
                    "source": "more" if external else "set",
                    "path": f"{split}/{LABELS[target]}/{name}.jpg",
                    "patient_id": pd.NA if external else f"P-{group}",
                    "target": target,
                    "group": group,
                    "split": split,
                    "balanced": True,
                    "sha256": hashlib.sha256(name.encode()).hexdigest(),
                    "fold": -1 if external else number // 2 % FOLDS,
                }
            )
    left_out = {"isic_id": "z", "path": "../z.jpg", "target": 1, "group": "train00", "split": "excluded", "fold": -1}
    rows.append(
        {**left_out, "balanced": False, "source": "set", "reason": "duplicate: official", "duplicate_of": "train01"}
    )
    table = pd.DataFrame(rows, columns=[*COLUMNS, *CLINICAL])
    return table.assign(sex="female", age_approx=np.arange(len(rows)) * 5.0, diagnosis="nevus")


@pytest.fixture
def folder(tmp_path):
    table = small_table()
    for path, name in zip(table["path"], table["isic_id"], strict=True):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(name.encode())
    write_manifest(tmp_path, table, {"seed": 3, "source": "set"})
    return tmp_path


def sign_again(folder, table):
    """Write `table` as someone would who also knows about the hash."""
    table.to_csv(folder / "manifest.csv", index=False)
    facts = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**facts, "sha256": manifest_sha256(folder)}))


def test_what_was_written_is_read(folder):
    table = read_manifest(folder, verify=True)
    pd.testing.assert_frame_equal(table, small_table(), check_dtype=False)
    assert list(table.columns) == [*COLUMNS, *CLINICAL]
    kinds = table.dtypes.astype(str)
    assert kinds[["target", "fold", "balanced"]].tolist() == ["int64", "int64", "bool"]
    assert kinds["age_approx"] == "float64"
    assert set(kinds.drop(["target", "fold", "balanced", "age_approx"])) == {"str"}
    facts = json.loads((folder / "manifest.json").read_text())
    assert (facts["seed"], facts["source"]) == (3, "set")
    assert facts["counts"]["train"] == {"benign": 12, "malignant": 12}
    assert facts["counts"]["excluded"] == {"benign": 0, "malignant": 1}
    assert (
        facts["sha256"] == manifest_sha256(folder) == hashlib.sha256((folder / "manifest.csv").read_bytes()).hexdigest()
    )
    assert "numpy" in facts["versions"]


def test_an_edit_by_hand_is_recognised(folder):
    path = folder / "manifest.csv"
    path.write_text(path.read_text().replace("test,True", "test,False", 1))
    with pytest.raises(UserError, match="was changed after it was written"):
        read_manifest(folder)


@pytest.mark.parametrize(
    ("row", "changes", "words"),
    [
        ("test00", {"patient_id": "P-train00"}, "a patient on two sides of the split: P-train00"),
        ("test00", {"group": "train00"}, "a group on two sides of the split: train00"),
        ("external00", {"group": "test00"}, "a group on two sides of the split: test00"),
        ("external00", {"group": "train02"}, "external images grouped with others: external00"),
        ("test00", {"sha256": hashlib.sha256(b"train00").hexdigest()}, "a picture on two sides"),
        ("train00", {"fold": 2}, "a patient in two folds: P-train00"),
        ("train00", {"fold": 2, "patient_id": "new"}, "a group in two folds: train00"),
        ("train00", {"fold": -1, "patient_id": "new", "group": "new"}, "folds for some images only: train00"),
        ("train00", {"target": 1}, "a balanced set that is not half malignant: train"),
        ("train00", {"target": 1, "balanced": False}, "not half malignant"),
        ("train00", {"target": 2}, "a target that isn't 0 or 1: train00"),
        ("train00", {"isic_id": "train01"}, "more than one row of an id: train01"),
        (
            "train00",
            {"split": "holdout"},
            "a split that isn't one of train, validation, test, external, excluded: train00",
        ),
        ("z", {"balanced": True}, "excluded images in the balanced set: z"),
        ("train00", {"path": "train/malignant/train00.jpg"}, "a path that contradicts split, target or id: train00"),
        ("train00", {"isic_id": "../../outside", "path": "train/benign/../../outside.jpg"}, "an id that is none"),
        ("train00", {"target": "one"}, "is no manifest"),
        ("train00", {"target": "9" * 30}, "is no manifest"),
        ("train00", {"fold": None}, "is no manifest"),
    ],
)
def test_a_broken_promise_is_refused_by_name(folder, row, changes, words):
    table = small_table().astype(object).set_index("isic_id", drop=False)
    for column, value in changes.items():
        table.loc[row, column] = value
    sign_again(folder, table)
    with pytest.raises(UserError) as error:
        read_manifest(folder)
    assert words in str(error.value)
    if "no manifest" not in words:
        with pytest.raises(UserError) as error:
            write_manifest(folder, table.infer_objects(), {})
        assert words in str(error.value)


def test_a_missing_or_damaged_part_is_named(folder, tmp_path_factory):
    with pytest.raises(UserError, match=r"no data set in .*generate_balanced_dataset.py makes it"):
        read_manifest(tmp_path_factory.mktemp("empty"))
    sign_again(folder, small_table().drop(columns="group"))
    with pytest.raises(UserError, match=r"is no manifest: .*group"):
        read_manifest(folder)
    for text in ("{", "[]"):
        (folder / "manifest.json").write_text(text)
        with pytest.raises(UserError, match="is damaged"):
            read_manifest(folder)
    assert not is_data_set(folder)


def test_a_missing_picture_is_noticed_and_a_changed_one_where_it_is_looked_at(folder, monkeypatch):
    monkeypatch.setattr("Modules.data.manifest.SAMPLE", 2)  # the first and the last
    second = folder / "train/malignant/train01.jpg"
    second.write_bytes(b"another")
    read_manifest(folder)
    with pytest.raises(UserError, match=r"train01.jpg is another picture"):
        read_manifest(folder, verify=True)
    (folder / "train/benign/train00.jpg").write_bytes(b"another")
    with pytest.raises(UserError, match=r"train00.jpg is another picture"):
        read_manifest(folder)
    second.unlink()
    with pytest.raises(UserError, match=r"pictures are missing: train/malignant/train01.jpg"):
        read_manifest(folder)


@pytest.mark.parametrize("fold", range(FOLDS))
def test_a_fold_is_tested_and_the_rest_split_without_a_leak(folder, fold):
    table = read_manifest(folder)
    view = fold_view(table, fold)
    used = view[view["split"] != "excluded"]
    assert ((used["fold"] == fold) == (used["split"] == "test")).all()
    assert (used.groupby("group")["split"].nunique() == 1).all()
    assert set(used["split"]) == set(SIZES)
    assert (used[used["balanced"]].groupby("split")["target"].mean() == 0.5).all()
    untouched = table["fold"] < 0
    pd.testing.assert_frame_equal(view[untouched], table[untouched])
    pd.testing.assert_frame_equal(view.drop(columns=["split", "balanced"]), table.drop(columns=["split", "balanced"]))
    pd.testing.assert_frame_equal(fold_view(table.sample(frac=1, random_state=1), fold).sort_index(), view)


def test_a_fold_that_is_not_there(folder):
    table = read_manifest(folder)
    with pytest.raises(UserError, match=r"no fold 4: there are 0 to 3"):
        fold_view(table, 4)
    with pytest.raises(UserError, match=r"--folds 5 makes them"):
        fold_view(table.assign(fold=-1), 0)
    with pytest.raises(UserError, match="no fold -1"):
        fold_view(table, -1)
