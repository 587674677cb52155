"""predict.py through its real command, with the checkpoint of the small drawn data set."""

import json
import shutil

import pandas as pd
import pytest

from dataset import load_manifest, select
from Modules.evaluation import report
from predict import COLUMNS
from tests.commands import fails, run


def test_without_paths_it_repeats_the_numbers_of_training_to_the_last_digit(trained, tmp_path):
    """And the other model on the same images: itself, from which it does not differ."""
    home = tmp_path / "checkpoints"
    shutil.copytree(trained, home)
    former = (home / "report.html").read_text()
    for name in ("report.html", "MODEL_CARD.md", "figures/decision_curves.png"):
        (home / name).unlink()
    said = run(
        "predict.py", "--checkpoint", home / "best_epoch.keras", "--compare", trained / "best_epoch.keras", cwd=tmp_path
    )
    assert max(map(len, said.splitlines())) <= 80
    text = (home / "report.html").read_text()
    assert text[: text.index('<h2 id="use">')].startswith(former[: former.index('<nav aria-label="Contents">')])
    assert "DeLong's test of equal ROC AUC: undefined, both models rank the images alike" in " ".join(text.split())
    assert (home / "figures" / "decision_curves.png").exists()
    compared = json.loads(next((home / "evaluations").iterdir()).read_text())
    assert set(compared["views"]) == {"test", "test_full"}
    assert compared["views"]["test"]["differences"]["roc_auc"]["difference"] == 0
    facts = json.loads((trained / "best_epoch.json").read_text())
    for view, title in (("test", "Test set, 50/50"), ("test_full", "Whole test split")):
        assert report.summary(facts[view], title) in said
        assert report.class_report(facts[view]) in said


def test_a_labelled_folder_without_patients(trained, balanced, tmp_path):
    home = tmp_path / "checkpoints"
    shutil.copytree(trained, home)
    test = select(load_manifest(balanced), "test", full=True)
    known = select(load_manifest(balanced), "train").head(2)
    for row in pd.concat([test, known]).itertuples():
        place = tmp_path / "clinic" / ("nevus", "melanoma")[row.target] / f"{row.isic_id}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(row.file, place)
    said = run("predict.py", "--checkpoint", home / "best_epoch.keras", "--data", tmp_path / "clinic", cwd=tmp_path)
    assert max(map(len, said.splitlines())) <= 80
    facts = json.loads((home / "best_epoch.json").read_text())
    found = json.loads((home / "evaluations" / "external-clinic.json").read_text())
    assert found["result"]["n"] == len(test)
    for name in ("roc_auc", "accuracy", "brier"):
        assert found["result"][name] == pytest.approx(facts["test_full"][name])
    for note in ("no patients are known", "2 images left out: training or validation knew their ids"):
        assert note in said
        assert any(note in each for each in found["notes"])
    assert "External data" in (home / "report.html").read_text()


def test_a_table_like_isic_2017s_says_what_it_could_not_compute(trained, balanced, tmp_path):
    home = tmp_path / "checkpoints"
    shutil.copytree(trained, home)
    test = select(load_manifest(balanced), "test", full=True)
    benign = test[test["target"] == 0].head(5)
    (tmp_path / "isic" / "Data").mkdir(parents=True)
    for row in benign.itertuples():
        shutil.copy(row.file, tmp_path / "isic" / "Data")
    table = pd.DataFrame({"image_id": benign["isic_id"], "melanoma": 0.0, "seborrheic_keratosis": 0.0})
    table.to_csv(tmp_path / "isic" / "truth.csv", index=False)
    said = run(
        "predict.py", "--checkpoint", home / "best_epoch.keras", "--data", tmp_path / "isic" / "truth.csv",
        "--report-images", "no", cwd=tmp_path,
    )  # fmt: skip
    assert "ROC AUC            undefined: no malignant image" in said
    assert "5 images, 0 malignant" in said


def test_the_probability_at_a_prevalence_is_bayes_rule(trained, balanced, tmp_path):
    rows = select(load_manifest(balanced), "test").head(4)
    run("predict.py", *rows["file"], "--checkpoint", trained / "best_epoch.keras", "--prevalence", "0.1", cwd=tmp_path)
    table = pd.read_csv(tmp_path / "predictions.csv")
    odds = table["probability"] / (1 - table["probability"]) * 0.1 / 0.9
    assert table["probability_at_prevalence"].tolist() == pytest.approx((odds / (1 + odds)).tolist(), abs=1e-4)


def test_every_input_gets_a_row_also_the_unreadable(trained, balanced, tmp_path):
    folder = tmp_path / "inbox" / "deeper"
    folder.mkdir(parents=True)
    lesion = select(load_manifest(balanced), "train")["file"][0]
    shutil.copy(lesion, folder / "lesion.jpg")
    (folder / "text.jpg").write_text("not a picture")
    (folder / "notes.txt").write_text("no picture by its suffix")
    said = run("predict.py", tmp_path / "inbox", "gone.png", "--checkpoint", trained / "best_epoch.keras", cwd=tmp_path)
    table = pd.read_csv(tmp_path / "predictions.csv")
    assert tuple(table.columns) == COLUMNS
    assert [path.split("/")[-1] for path in table["path"]] == ["lesion.jpg", "text.jpg", "gone.png"]
    assert table["error"].notna().tolist() == [False, True, True]
    assert table["probability"].isna().tolist() == [False, True, True]
    assert table["prediction"][0] == ("malignant" if table["probability"][0] >= table["threshold"][0] else "benign")
    assert "1 of 3 pictures scored" in said
    assert max(map(len, said.splitlines())) <= 80


def test_the_nearest_known_lesion_of_a_training_image_is_itself(trained, balanced, tmp_path):
    rows = select(load_manifest(balanced), "train").head(5)
    run(
        "predict.py", *rows["file"], "--checkpoint", trained / "best_epoch.keras", "--neighbours", "2", "--output",
        "out.csv", cwd=tmp_path,
    )  # fmt: skip
    table = pd.read_csv(tmp_path / "out.csv")
    for name, neighbours in zip(rows["isic_id"], table["neighbours"].str.split(), strict=True):
        assert len(neighbours) == 2
        names, labels, cosines = zip(*(neighbour.split(":") for neighbour in neighbours), strict=True)
        assert name in names or cosines[0] == cosines[1]  # ties may push it out
        assert set(labels) <= {"benign", "malignant"}
        assert set(names) <= set(select(load_manifest(balanced), "train")["isic_id"])
    assert table["in_distribution"].all()


def test_wrong_input_is_one_line_and_exit_code_2(trained, balanced, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    checkpoint = ["--checkpoint", trained / "best_epoch.keras"]
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.jpg").write_text("not a picture")
    (tmp_path / "foreign.keras").write_text("not a model")
    shutil.copy(trained / "best_epoch.json", tmp_path / "foreign.json")
    for arguments, named in (
        (["--checkpoint", "nowhere.keras"], "nowhere"),
        (["--checkpoint", "foreign.keras"], "foreign.keras"),
        (["--chekpoint", "x"], "did you mean --checkpoint?"),
        ([*checkpoint, "empty"], "no picture in empty"),
        ([*checkpoint, "text.jpg"], "none of 1 pictures could be read"),
        ([*checkpoint, "--neighbours", "0"], "--neighbours 0"),
        ([*checkpoint, "--data", "nowhere"], "nowhere"),
        ([*checkpoint, "--data", "empty"], "expected folders benign/ and malignant/"),
        ([*checkpoint, "--compare", "nowhere.keras"], "no checkpoint nowhere.keras"),
        ([*checkpoint, "--compare", "foreign.keras", "text.jpg"], "give no other PATH"),
        ([*checkpoint, "--prevalence", "0"], "strictly between 0 and 1"),
        ([*checkpoint, "text.jpg", "--output", "missing/out.csv"], "--output"),
    ):
        assert named in fails("predict", *arguments, monkeypatch=monkeypatch, capsys=capsys)


def test_another_data_set_is_refused(trained, balanced, tmp_path, monkeypatch, capsys):
    shutil.copytree(trained, tmp_path / "checkpoints")
    file = tmp_path / "checkpoints" / "best_epoch.json"
    facts = json.loads(file.read_text())
    file.write_text(json.dumps(facts | {"manifest_sha256": "0" * 64}))
    line = fails(
        "predict", "--checkpoint", file.with_suffix(".keras"), "--data", balanced,
        monkeypatch=monkeypatch, capsys=capsys,
    )  # fmt: skip
    assert "not the data set" in line


def test_scores_are_those_of_the_test_split(trained, balanced, tmp_path):
    test = select(load_manifest(balanced), "test", full=True)
    run("predict.py", balanced / "test", "--checkpoint", trained / "best_epoch.keras", cwd=tmp_path)
    table = pd.read_csv(tmp_path / "predictions.csv")
    table.index = table["path"].map(lambda path: path.split("/")[-1][:-4])
    right = (table["probability"][test["isic_id"]].to_numpy() >= 0.5) == test["target"]
    assert right.mean() == json.loads((trained / "best_epoch.json").read_text())["test_full"]["accuracy"]
