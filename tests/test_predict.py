"""predict.py through its real command, with the checkpoint of the small drawn data set."""

import json
import shutil
import socket
import subprocess
import sys
import types
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import tensorflow as tf

import modules
import predict
from dataset import load_manifest, select
from Modules import export, runtime
from Modules.cli import UserError
from Modules.data.hashing import view
from Modules.data.images import read_image
from Modules.evaluation import report
from Modules.predictions import COLUMNS
from tests.commands import ROOT, fails, run


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
    for name, title in (("test", "Test set, 50/50"), ("test_full", "Whole test split")):
        assert report.summary(facts[name], title) in said
        assert report.class_report(facts[name]) in said


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
    rows = select(load_manifest(balanced), "test")
    run("predict.py", *rows["file"], "--checkpoint", trained / "best_epoch.keras", "--prevalence", "0.1", cwd=tmp_path)
    table = pd.read_csv(tmp_path / "predictions.csv").query("in_distribution")
    assert len(table) > 1
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


def test_neighbours_of_a_training_image_are_neither_itself_nor_of_its_patient(trained, balanced, tmp_path):
    training = select(load_manifest(balanced), "train")
    rows = training.head(6)
    for file in rows["file"][:2]:  # also where it comes under another name, turned and in another format
        turned = np.rot90(read_image(file))
        cv2.imwrite(str(tmp_path / f"{Path(file).stem}-copy.png"), turned[..., ::-1])
    run(
        "predict.py", *rows["file"], tmp_path / "*-copy.png", "--checkpoint", trained / "best_epoch.keras",
        "--neighbours", len(training), "--output", "out.csv", cwd=tmp_path,
    )  # fmt: skip
    table = pd.read_csv(tmp_path / "out.csv")
    groups = training.set_index("isic_id")["group"]
    assert len(table) == 8
    for path, neighbours in zip(table["path"], table["neighbours"].str.split(), strict=True):
        names, labels, _ = zip(*(neighbour.split(":") for neighbour in neighbours), strict=True)
        own = groups[Path(path).stem.removesuffix("-copy")]
        assert not (groups[list(names)] == own).any()
        assert len(names) >= (groups != own).sum() - 2  # hashes of drawn lesions may clash, rarely
        assert set(labels) <= {"benign", "malignant"}


def test_neighbours_of_test_images_give_the_accuracy_in_the_json(trained, balanced, tmp_path):
    test = select(load_manifest(balanced), "test")
    run(
        "predict.py", *test["file"], "--checkpoint", trained / "best_epoch.keras", "--neighbours", "30",
        "--output", "out.jsonl", cwd=tmp_path,
    )  # fmt: skip
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    right = []
    for row, target in zip(rows, test["target"], strict=True):
        malignant = [neighbour["label"] == "malignant" for neighbour in row["neighbours"]]
        assert row["malignant_share"] == pytest.approx(np.mean(malignant), abs=1e-6)
        votes = np.exp([neighbour["similarity"] / 0.07 for neighbour in row["neighbours"]])
        right.append((np.average(malignant, weights=votes) > 0.5) == target)
    facts = json.loads((trained / "best_epoch.json").read_text())
    assert np.mean(right) == pytest.approx(facts["test"]["embedding"]["knn_accuracy"])


def test_what_is_no_lesion_is_said_to_be_none_and_gets_no_probability(trained, tmp_path):
    squares = (np.indices((64, 64)) // 8).sum(axis=0) % 2 * 255
    cv2.imwrite(str(tmp_path / "squares.png"), squares.astype(np.uint8))
    cv2.imwrite(str(tmp_path / "blank.png"), np.zeros((64, 64, 3), np.uint8))
    said = run("predict.py", tmp_path, "--checkpoint", trained / "best_epoch.keras", cwd=tmp_path)
    table = pd.read_csv(tmp_path / "predictions.csv")
    assert table["in_distribution"].tolist() == [False, False]
    assert table["prediction"].tolist() == ["unlike known lesions"] * 2
    assert table[["probability", "probability_at_prevalence"]].isna().all(axis=None)
    assert "2 are unlike anything the model knows" in said
    assert max(map(len, said.splitlines())) <= 80


def test_each_picture_gets_a_sheet_and_averaged_views_agree_with_the_views(trained, balanced, tmp_path):
    file = Path(select(load_manifest(balanced), "test")["file"][0])
    (tmp_path / "text.jpg").write_text("not a picture")
    for k in range(8):
        cv2.imwrite(str(tmp_path / f"view{k}.png"), view(read_image(file, 32), k)[..., ::-1])
    model = ["--checkpoint", trained / "best_epoch.keras"]
    run(
        "predict.py", "text.jpg", file, *model, "--explain", "sheets", "--tta", "8", "--output", "tta.csv", cwd=tmp_path
    )
    run("predict.py", *(f"view{k}.png" for k in range(8)), *model, "--output", "views.csv", cwd=tmp_path)
    assert [sheet.name for sheet in (tmp_path / "sheets").iterdir()] == [f"2-{file.stem}.png"]
    assert min(read_image(tmp_path / "sheets" / f"2-{file.stem}.png").shape[:2]) > 900
    averaged, views = (pd.read_csv(tmp_path / f"{name}.csv")["probability"] for name in ("tta", "views"))
    assert averaged[1] == pytest.approx(views.mean(), abs=1e-5)


def test_one_picture_needs_no_library_but_the_networks(trained, balanced, tmp_path):
    """So that it is answered in seconds. (Keras itself imports pandas, that pyarrow, and a part of SciPy.)"""
    script = (
        "import atexit, runpy, sys\n"
        "slow = 'sklearn scipy.stats scipy.optimize matplotlib tensorflow_addons tensorflow_datasets wandb faiss "
        "gradio fastapi jinja2 pandera Modules.evaluation.report dataset train'\n"
        "atexit.register(lambda: print('imported:', *sorted(set(slow.split()) & set(sys.modules))))\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        f"runpy.run_path({str(ROOT / 'predict.py')!r}, run_name='__main__')"
    )
    file = select(load_manifest(balanced), "test")["file"][0]
    done = subprocess.run(
        [sys.executable, "-c", script, file, "--checkpoint", trained / "best_epoch.keras"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "1 of 1 pictures scored" in done.stdout
    assert done.stdout.splitlines()[-1] == "imported:"


def test_a_lower_precision_scores_nearly_alike(trained, balanced, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runtime, "fastest_precision", lambda: "bfloat16")
    files = select(load_manifest(balanced), "test")["file"]
    tables = []
    for name in ("float32", "auto"):
        arguments = [*files, "--checkpoint", trained / "best_epoch.keras", "--precision", name]
        monkeypatch.setattr(sys, "argv", ["predict.py", *map(str, arguments)])
        predict.main()
        tables.append(pd.read_csv("predictions.csv"))
    assert "Scoring in bfloat16." in capsys.readouterr().out
    exact, fast = (table["probability"] for table in tables)
    assert not np.array_equal(exact, fast)
    np.testing.assert_allclose(fast.dropna(), exact[fast.notna()], atol=0.03)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:(tf2onnx|onnx)")
@pytest.mark.parametrize(
    ("kind", "name"),
    [("tflite", "best_epoch.tflite"), ("onnx", "best_epoch.onnx"), ("saved_model", "best_epoch_saved_model")],
)
def test_an_exported_model_says_the_same(trained, balanced, tmp_path, monkeypatch, capsys, kind, name):
    if kind == "onnx":
        pytest.importorskip("tf2onnx", reason="requirements-onnx.txt is not installed")
    shutil.copytree(trained, tmp_path / "checkpoints")
    checkpoint = tmp_path / "checkpoints" / "best_epoch.keras"
    monkeypatch.setattr(sys, "argv", ["predict.py", "--checkpoint", str(checkpoint), "--export", kind])
    predict.main()
    assert f"{name}; on 8 pictures it differs by at most" in " ".join(capsys.readouterr().out.split())
    image = read_image(select(load_manifest(balanced), "test")["file"][0], 32)[None].astype(np.float32)
    file = checkpoint.with_name(name)
    if kind == "tflite":
        interpreter = tf.lite.Interpreter(str(file))
        interpreter.allocate_tensors()
        interpreter.set_tensor(interpreter.get_input_details()[0]["index"], image)
        interpreter.invoke()
        said = interpreter.get_tensor(interpreter.get_output_details()[0]["index"])
    elif kind == "onnx":
        session = pytest.importorskip("onnxruntime").InferenceSession(str(file), providers=["CPUExecutionProvider"])
        said = session.run(["probability"], {"image": image})[0]
    else:
        said = tf.saved_model.load(str(file)).signatures["serving_default"](tf.constant(image))["probability"]
    np.testing.assert_allclose(said, modules.load(checkpoint)(image), atol=1e-4)


def test_onnx_says_what_it_needs_where_that_is_not_installed(trained, tmp_path, monkeypatch):
    shutil.copy(trained / "best_epoch.keras", tmp_path)
    monkeypatch.setitem(sys.modules, "tf2onnx", None)
    monkeypatch.setitem(sys.modules, "onnxruntime", types.ModuleType("onnxruntime"))
    model = modules.load(tmp_path / "best_epoch.keras")
    with pytest.raises(UserError, match=r"needs tf2onnx: pip install --no-deps -r requirements-onnx\.txt"):
        export.export(model, "onnx", tmp_path / "other.onnx", np.zeros((1, 32, 32, 3), np.uint8))
    assert [file.name for file in tmp_path.iterdir()] == ["best_epoch.keras"]


def test_an_export_that_says_something_else_is_not_kept(trained, tmp_path, monkeypatch):
    shutil.copy(trained / "best_epoch.keras", tmp_path)
    model = modules.load(tmp_path / "best_epoch.keras")
    half = tf.keras.layers.Rescaling(0.5)
    monkeypatch.setattr(export, "optimised", lambda model: tf.keras.Model(model.input, half(model.output)))
    pictures = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3))
    with pytest.raises(UserError, match="was not written: as saved_model the model says something else"):
        export.export(model, "saved_model", tmp_path / "other", pictures)
    assert [file.name for file in tmp_path.iterdir()] == ["best_epoch.keras"]


def test_an_export_that_cannot_be_written_says_why(trained, tmp_path, monkeypatch):
    def full(*_):
        raise tf.errors.ResourceExhaustedError(None, None, "No space left on device")

    monkeypatch.setattr(export, "_saved_model", full)
    model = modules.load(trained / "best_epoch.keras")
    with pytest.raises(UserError, match=r"can't write .*other \(No space left on device\)"):
        export.export(model, "saved_model", tmp_path / "other", np.zeros((1, 32, 32, 3), np.uint8))
    assert not list(tmp_path.iterdir())


def test_the_gallery_of_another_checkpoint_is_refused(trained, tmp_path, monkeypatch, capsys):
    shutil.copytree(trained, tmp_path / "checkpoints")
    with open(tmp_path / "checkpoints" / "best_epoch.keras", "ab") as stream:
        stream.write(b" ")
    line = fails(
        "predict", "--checkpoint", tmp_path / "checkpoints" / "best_epoch.keras", "--trust",
        monkeypatch=monkeypatch, capsys=capsys,
    )  # fmt: skip
    assert "gallery of another model" in line


def test_wrong_input_is_one_line_and_exit_code_2(trained, balanced, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    checkpoint = ["--checkpoint", trained / "best_epoch.keras"]
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.jpg").write_text("not a picture")
    (tmp_path / "foreign.keras").write_text("not a model")
    shutil.copy(trained / "best_epoch.json", tmp_path / "foreign.json")
    shutil.copy(trained / "gallery.npz", tmp_path)
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
        ([*checkpoint, "text.jpg", "--output", "out.json"], "ends in .csv, .jsonl, .ndjson"),
        ([*checkpoint, "text.jpg", "--explain", "text.jpg"], "--explain text.jpg"),
        ([*checkpoint, "text.jpg", "--tta", "9"], "--tta 9"),
        ([*checkpoint, "*.bmp"], "nothing matches *.bmp"),
        ([*checkpoint, "gone.txt"], "can't read the list gone.txt"),
        ([*checkpoint, "text.jpg", "--serve"], "--serve takes no PATH"),
        ([*checkpoint, "--serve", "--port", "70000"], "--port 70000"),
        ([*checkpoint, "--precision", "auto"], "evaluations are measured in float32"),
        ([*checkpoint, "text.jpg", "--export", "tflite"], "give no PATH"),
    ):
        assert named in fails("predict", *arguments, monkeypatch=monkeypatch, capsys=capsys)


def test_a_port_in_use_is_one_line(trained, monkeypatch, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = fails(
            "predict", "--serve", "--port", port, "--checkpoint", trained / "best_epoch.keras",
            monkeypatch=monkeypatch, capsys=capsys,
        )  # fmt: skip
    assert f"127.0.0.1:{port}" in line


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
    table = table.loc[test["isic_id"]].reset_index(drop=True)
    known = table[table["in_distribution"]]
    facts = json.loads((trained / "best_epoch.json").read_text())
    right = (known["probability"] >= 0.5) == test["target"][known.index]
    refused = len(test) - len(known)
    assert refused <= 0.2 * len(test)
    assert right.sum() <= round(facts["test_full"]["accuracy"] * len(test)) <= right.sum() + refused
