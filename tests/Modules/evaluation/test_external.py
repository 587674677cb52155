"""Labelled sets of any make: what is read, what is left out and said so, what is refused."""

import cv2
import numpy as np
import pandas as pd
import pytest

from Modules.cli import UserError
from Modules.data.manifest import CLINICAL
from Modules.data.synthetic import draw
from Modules.evaluation import external
from Modules.evaluation.gallery import picture_hashes


def picture(file, value=120, size=40):
    file.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(len(file.name)).integers(-20, 20, (size, size, 3))
    cv2.imwrite(str(file), np.clip(np.zeros((size, size, 3)) + value + noise, 0, 255).astype(np.uint8))


@pytest.fixture
def clinic(tmp_path):
    """Class folders in splits, as Kaggle's melanoma sets have them, and a picture in no class."""
    for split in ("train", "test"):
        for number in range(3):
            picture(tmp_path / "clinic" / split / "Benign" / f"{split}_b{number}.jpg")
            picture(tmp_path / "clinic" / split / "melanoma" / f"{split}_m{number}.png")
    picture(tmp_path / "clinic" / "logo.png")
    return tmp_path / "clinic"


def test_class_folders_without_patients(clinic):
    table, notes = external.read_labelled(clinic)
    assert len(table) == 12
    assert table["target"].tolist() == [int("melanoma" in file) for file in table["file"]]
    assert table["patient_id"].isna().all()
    assert table["group"].nunique() == 12
    said = "\n".join(notes)
    assert "1 pictures left out, their folder is none of a known class: clinic (1)" in said
    assert "no patients are known" in said
    for column in ("sex", "age_approx", "diagnosis"):
        assert column in said


def test_a_table_like_isic_2017s(tmp_path):
    names = [f"ISIC_{i:07d}" for i in range(6)]
    for name in names[:5]:
        picture(tmp_path / "ISIC-2017_Test_v2_Data" / f"{name}.jpg")
    table = pd.DataFrame({"image_id": names, "melanoma": [0.0, 1.0] * 3, "seborrheic_keratosis": [1.0, 0.0] * 3})
    table.to_csv(tmp_path / "truth.csv", index=False)
    for path in (tmp_path / "truth.csv", tmp_path):
        read, notes = external.read_labelled(path)
        assert read["isic_id"].tolist() == names[:5]
        assert read["target"].tolist() == [0, 1, 0, 1, 0]
        assert any("1 of 6 rows left out: no picture" in note for note in notes)


def test_kaggles_layout_with_patients_keeps_what_it_tells(tmp_path):
    rows = {
        "isic_id": ["a", "b", "c"], "patient_id": ["P1", "P1", "P2"], "sex": ["male", "male", "female"],
        "age_approx": [50, 50, 300], "benign_malignant": ["benign", "malignant", "benign"],
    }  # fmt: skip
    pd.DataFrame(rows).to_csv(tmp_path / "train-metadata.csv", index=False)
    for name in rows["isic_id"]:
        picture(tmp_path / "train-image" / "image" / f"{name}.jpg")
    table, notes = external.read_labelled(tmp_path)
    assert table["patient_id"].tolist() == ["P1", "P1", "P2"]
    assert table["target"].tolist() == [0, 1, 0]
    assert table["age_approx"].tolist()[:2] == [50, 50]
    assert np.isnan(table["age_approx"][2])
    assert not any("patient" in note for note in notes)
    assert set(CLINICAL) <= set(table.columns)


def test_paths_count_from_the_tables_folder(tmp_path):
    picture(tmp_path / "pictures" / "one.png")
    picture(tmp_path / "two.png")
    text = "path;target\npictures/one.png;1\ntwo.png;0\ngone.png;1\npictures/one.png;\n"
    (tmp_path / "list.csv").write_text(text)
    table, notes = external.read_labelled(tmp_path / "list.csv")
    assert table["isic_id"].tolist() == ["one", "two"]
    assert table["target"].tolist() == [1, 0]
    assert sum("1 of 4 rows left out" in note for note in notes) == 2


@pytest.mark.parametrize(
    ("name", "text", "named"),
    [
        ("nowhere", None, "no such folder or table"),
        ("empty", "", "expected folders benign/ and malignant/"),
        ("list.csv", "path,name\na.jpg,x\n", "expected a column with the target"),
        ("list.csv", "target\n1\n", "one with the path or id"),
        ("list.csv", "path,target\na.jpg,bening\n", "'bening'; known: benign"),
        ("list.csv", "path,target\na.jpg,1\n", "none of its 1 rows"),
        ("list.csv", "", "empty"),
    ],
)
def test_what_is_no_labelled_set_is_refused_in_one_line(tmp_path, name, text, named):
    if name == "empty":
        (tmp_path / name).mkdir()
    elif text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=named):
        external.read_labelled(tmp_path / name)


def test_two_tables_ask_for_one(tmp_path):
    for name in ("train.csv", "test.csv"):
        (tmp_path / name).write_text("path,target\na.jpg,1\n")
    with pytest.raises(UserError, match="2 tables with a target"):
        external.read_labelled(tmp_path)


@pytest.fixture
def gallery():
    """One training lesion, as training saw it."""
    lesion, _ = draw(np.random.default_rng(3), True, 64)
    return {"hashes": picture_hashes(lesion)[:1]}, lesion


def test_images_that_training_knew_are_left_out(clinic, gallery):
    table, notes = external.read_labelled(clinic)
    left = external.without_known(table, ["train_b0", "other"], gallery[0], 64, notes)
    assert len(left) == 11
    assert "train_b0" not in set(left["isic_id"])
    assert "1 images left out: training or validation knew their ids" in notes
    with pytest.raises(UserError, match="all 12 images were known"):
        external.without_known(table, table["isic_id"], gallery[0], 64, [])


def test_a_copy_of_a_training_image_is_left_out_under_another_name(clinic, gallery):
    known, lesion = gallery
    turned = cv2.cvtColor(np.rot90(lesion), cv2.COLOR_RGB2BGR)
    cv2.imwrite(str(clinic / "test" / "melanoma" / "another name.jpg"), cv2.resize(turned, (150, 150)))
    table, notes = external.read_labelled(clinic)
    left = external.without_known(table, [], known, 64, notes)
    assert set(table["isic_id"]) - set(left["isic_id"]) == {"another name"}
    assert "1 images left out: copies of training images" in notes


def test_ids_with_a_suffix_are_those_of_training(tmp_path, gallery):
    picture(tmp_path / "ISIC_1.jpg")
    picture(tmp_path / "ISIC_2.jpg")
    (tmp_path / "truth.csv").write_text("image,melanoma\nISIC_1.jpg,1\nISIC_2.jpg,0\n")
    table, notes = external.read_labelled(tmp_path)
    assert external.without_known(table, ["ISIC_1"], gallery[0], 64, notes)["isic_id"].tolist() == ["ISIC_2"]


def test_paths_tell_pictures_of_one_name_apart(tmp_path):
    for folder in ("benign", "malignant"):
        picture(tmp_path / folder / "1.jpg")
    (tmp_path / "list.csv").write_text("path,target\nbenign/1.jpg,0\nmalignant/1.jpg,1\nbenign/1.jpg,0\n")
    table, notes = external.read_labelled(tmp_path / "list.csv")
    assert table["target"].tolist() == [0, 1]
    assert "1 rows left out: their path came before" in notes


def test_classes_that_are_not_known_are_named_and_counted(tmp_path):
    for folder in ("benign", "melanoma", "keratosis"):
        picture(tmp_path / folder / "1.jpg")
    assert any("1 pictures" in note and "keratosis (1)" in note for note in external.read_labelled(tmp_path)[1])
    rows = "benign/1.jpg,nevus\nmelanoma/1.jpg,melanoma\nkeratosis/1.jpg,keratosis\n"
    (tmp_path / "list.csv").write_text(f"path,label\n{rows}")
    assert any("1 of 3 rows" in note and "keratosis (1)" in note for note in external.read_labelled(tmp_path)[1])


def test_unreadable_pictures_are_left_out(clinic):
    table, notes = external.read_labelled(clinic)
    (clinic / "test" / "Benign" / "test_b0.jpg").write_text("no picture")
    left = external.readable(table, notes)
    assert len(left) == 11
    assert any(note.startswith("1 pictures left out: test_b0.jpg: unreadable") for note in notes)
    for file in table["file"]:
        open(file, "w").close()
    with pytest.raises(UserError, match="none of 12 pictures can be used"):
        external.readable(table, [])


def test_size_and_colour_are_those_of_the_pictures(tmp_path):
    grey = np.full((30, 50, 3), 119, np.uint8)  # L* 50, no colour
    files = [str(tmp_path / f"{i}.png") for i in range(3)]
    for file in files:
        cv2.imwrite(file, grey)
    found = external.picture_statistics(files)
    assert (found["n"], found["width"], found["height"]) == (3, 50, 30)
    assert found["lightness"] == pytest.approx({"mean": 50, "sd": 0}, abs=0.5)
    assert found["a"]["mean"] == pytest.approx(0, abs=0.5)


def test_differences_count_in_standard_deviations_of_training(clinic):
    table, _ = external.read_labelled(clinic)
    reference = external.picture_statistics(table["file"]) | {"prevalence": 0.02}
    reference["lightness"] = {"mean": reference["lightness"]["mean"] - 6, "sd": 3.0}
    rows = {row["what"]: row for row in external.differences(table, reference, np.array([True, False, True, True]))}
    assert rows["share malignant"]["here"] == 0.5
    assert rows["lightness L*"]["shift"] == pytest.approx(2)
    assert rows["green to red a*"]["shift"] == pytest.approx(0)
    assert rows["share of a familiar kind"]["here"] == 0.75
