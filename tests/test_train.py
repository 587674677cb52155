"""The main job through its real command, on a small drawn data set."""

import hashlib
import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from wandb.proto import wandb_internal_pb2
from wandb.sdk.internal.datastore import DataStore

from dataset import load_manifest, select
from generate_balanced_dataset import generate
from Modules.data.images import read_image
from Modules.data.manifest import manifest_sha256
from Modules.data.synthetic import write_dataset
from tests.commands import ROOT, fails, run

TEST_KEYS = set(
    "n n_malignant accuracy precision recall f1 confusion_matrix roc_auc roc_auc_ci95 average_precision brier ece "
    "pauc_above_80_tpr sensitivity_at_90_specificity specificity_at_90_sensitivity".split()
)
EMBEDDING_KEYS = set(
    "recall_at_1 knn_roc_auc silhouette mean_positive_distance mean_negative_distance collapsed".split()
)


def test_the_json_holds_the_whole_contract(trained, balanced):
    facts = json.loads((trained / "best_epoch.json").read_text())
    assert facts["manifest_sha256"] == manifest_sha256(balanced)
    assert facts["config"]["data"]["image_size"] == 32
    assert list(facts["seconds"]) == ["embedding", "classifier", "baseline", "evaluation"]
    for view in ("test", "test_full"):
        assert set(facts[view]) >= TEST_KEYS
        assert set(facts[view]["embedding"]) >= EMBEDDING_KEYS
        assert set(facts["baseline"][view]) >= TEST_KEYS
    assert facts["test"]["n_malignant"] * 2 == facts["test"]["n"] < facts["test_full"]["n"]


def test_both_stages_keep_a_value_for_every_epoch(trained):
    history = json.loads((trained / "best_epoch.json").read_text())["history"]
    assert all(len(values) == 2 for values in history["embedding"].values())
    assert all(len(values) == 3 for values in history["classifier"].values())
    figures = {"loss", "accuracy", "precision", "recall", "f1_score"}
    assert figures | {f"val_{name}" for name in figures} <= set(history["classifier"])
    assert {"loss", "val_loss", "val_mean_positive_distance", "val_knn_roc_auc"} <= set(history["embedding"])


def test_every_figure_is_drawn_and_nothing_is_left_to_resume(trained):
    drawn = {path.stem for path in (trained / "figures").glob("*.png")}
    assert drawn == {
        "curves_embedding",
        "curves_classifier",
        "confusion_matrix",
        "roc_and_precision_recall",
        "tsne",
        "distances",
        "inputs",
    }
    assert not list(trained.glob("state-*")) + list(trained.glob("*partial*"))


def test_the_gallery_holds_the_training_lesions_and_no_other(trained, balanced):
    training = select(load_manifest(balanced), "train")
    with np.load(trained / "gallery.npz", allow_pickle=False) as gallery:
        assert list(gallery["ids"]) == list(training["isic_id"])
        assert list(gallery["targets"]) == list(training["target"])
        np.testing.assert_allclose(np.linalg.norm(gallery["embeddings"].astype(float), axis=1), 1, atol=1e-2)
        assert gallery["embeddings"].dtype == np.float16
        assert len(gallery["thumbnails"]) > 500 * len(training)
        assert str(gallery["checkpoint"]) == hashlib.sha256((trained / "best_epoch.keras").read_bytes()).hexdigest()


def test_few_of_the_validation_pictures_are_called_unfamiliar(trained):
    facts = json.loads((trained / "best_epoch.json").read_text())["in_distribution"]
    assert np.isfinite(facts["limit"])
    assert facts["refused_of_validation"] <= 0.15


def test_a_bare_process_gives_the_same_probabilities(trained, balanced, tmp_path):
    files = list(select(load_manifest(balanced), "test", full=True)["file"][:20])
    run("predict.py", *files, "--checkpoint", trained / "best_epoch.keras", cwd=tmp_path)
    ours = pd.read_csv(tmp_path / "predictions.csv")["probability"]
    familiar = ours.notna()
    assert familiar.sum() > 10
    np.save(tmp_path / "images.npy", np.stack([read_image(file, 32) for file in files]).astype(np.float32))
    bare = (
        "import numpy, tensorflow as tf;"
        f"model = tf.keras.models.load_model({str(trained / 'best_epoch.keras')!r}, safe_mode=True);"
        "numpy.save('bare.npy', model.predict(numpy.load('images.npy'), verbose=0))"
    )
    subprocess.run([sys.executable, "-I", "-c", bare], cwd=tmp_path, check=True, capture_output=True)
    np.testing.assert_allclose(np.load(tmp_path / "bare.npy")[familiar, 0], ours[familiar], atol=1e-5)


def test_an_offline_run_of_wandb_holds_every_epoch_of_both_stages(trained):
    (file,) = (trained.parent / "wandb").glob("offline-run-*/*.wandb")
    store = DataStore()
    store.open_for_scan(str(file))
    logged: dict[str, list[float]] = {}
    while (data := store.scan_data()) is not None:
        record = wandb_internal_pb2.Record.FromString(data)
        for item in record.history.item:
            logged.setdefault(item.key or "/".join(item.nested_key), []).append(json.loads(item.value_json))
    store.close()
    history = json.loads((trained / "best_epoch.json").read_text())["history"]
    for stage, values in history.items():
        assert logged[f"{stage}/epoch"] == list(range(1, len(values["loss"]) + 1))
        for name, curve in values.items():
            if None not in curve:  # undefined in some epoch, as a single class's AUC
                assert logged[f"{stage}/{name}"] == pytest.approx(curve)
    assert any(key.startswith("figures/") for key in logged)


def test_the_full_data_set_trains_on_every_image(balanced, tmp_path):
    run(
        "train.py", "full-dataset", "--data", balanced, "--checkpoints", tmp_path / "full", "--backbone", "mobilenet",
        "--image-size", "32", "--batch-size", "16", "--epochs", "1", "--classifier-epochs", "1", "--weights", "none",
        "--classifier-views", "1", "--wandb", "disabled", "--precision", "float32", "--gallery-thumbnails", "no",
        cwd=tmp_path,
    )  # fmt: skip
    facts = json.loads((tmp_path / "full" / "best_epoch.json").read_text())
    everything = select(load_manifest(balanced), "train", full=True)
    assert facts["full_dataset"]
    with np.load(tmp_path / "full" / "gallery.npz") as gallery:
        assert len(gallery["thumbnails"]) == 0
        assert len(gallery["ids"]) == len(everything) > len(select(load_manifest(balanced), "train"))
    assert not (tmp_path / "wandb").exists()


def test_a_fold_of_the_margin_system_cut_off_and_resumed_ends_like_the_undisturbed_run(tmp_path):
    source = write_dataset(tmp_path / "source", images=120, size=64)
    generate(source, tmp_path / "data", size=64, folds=4)
    options = [
        "--recipe", "margin", "--fold", "0", "--data", tmp_path / "data", "--backbone", "mobilenet",
        "--image-size", "32", "--epochs", "3", "--classifier-epochs", "2", "--weights", "none",
        "--wandb", "disabled", "--deterministic",
    ]  # fmt: skip
    run("train.py", *options, "--checkpoints", tmp_path / "whole", cwd=tmp_path)

    cut = (
        "import sys, train, Modules.NeuralNetwork as network\n"
        "record = network.NeuralNetwork.record\n"
        "def record_two(self, logs):\n"
        "    record(self, logs)\n"
        "    if self.epochs_done == 2: sys.exit('cut off')\n"
        "network.NeuralNetwork.record = record_two\n"
        "train.main()"
    )
    command = [sys.executable, "-c", cut, *map(str, options), "--checkpoints", str(tmp_path / "cut")]
    assert "cut off" in subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stderr
    assert (tmp_path / "cut" / "state-embedding.npz").exists()
    run("train.py", *options, "--checkpoints", tmp_path / "cut", "--resume", cwd=tmp_path)

    whole, resumed = (json.loads((tmp_path / name / "best_epoch.json").read_text()) for name in ("whole", "cut"))
    assert whole["history"] == resumed["history"]
    assert whole["test"] == resumed["test"]
    assert whole["fold"] == 0
    assert len(whole["history"]["embedding"]["loss"]) == 3


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["full-datset"], "did you mean full-dataset?"),
        (["--gallery-thumbnails", "perhaps"], "--gallery-thumbnails"),
        (["--recipe", "margn"], "did you mean margin?"),
        (["--imagesize", "32"], "did you mean --image-size?"),
        (["--image-size", "big"], "--image-size"),
        (["--data", "nowhere"], "nowhere"),
        (["full-model", "--recipe", "margin"], "one of them"),
        (["--wandb", "sometimes"], "offline"),
        (["--precision", "int8"], "float32"),
        (["--backbone", "resnet51", "--weights", "none"], "did you mean resnet50?"),
        (["--loss", "semihard", "--weights", "none"], "did you mean semi-hard?"),
        (["--weights", "missing.h5"], "missing.h5"),
        (["--fold", "3"], "fold"),
        (["--seed", "-1"], "--seed -1"),
        (["--batches", "clas", "--weights", "none", "--backbone", "mobilenet", "--image-size", "32"], "mean class?"),
        (["mnist", "--epochs", "3"], "mnist"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(arguments, named, balanced, tmp_path, monkeypatch, capsys):
    where = [] if "--data" in arguments else ["--data", balanced]
    quick = ["--checkpoints", tmp_path / "checkpoints"]
    quick += [] if "--wandb" in arguments else ["--wandb", "disabled"]
    monkeypatch.chdir(tmp_path)
    assert named in fails("train", *arguments, *where, *quick, monkeypatch=monkeypatch, capsys=capsys)


def test_an_unfinished_run_is_not_overwritten(balanced, tmp_path, monkeypatch, capsys):
    (tmp_path / "state-embedding.npz").write_bytes(b"half")
    line = fails(
        "train", "--data", balanced, "--checkpoints", tmp_path, "--wandb", "disabled",
        monkeypatch=monkeypatch, capsys=capsys,
    )  # fmt: skip
    assert "--resume" in line
    assert (tmp_path / "state-embedding.npz").read_bytes() == b"half"


def test_help_names_every_word():
    help_text = subprocess.run(
        [sys.executable, "train.py", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for word in ("full-dataset", "full-model", "mnist", "--recipe", "--classifier-epochs", "--resume"):
        assert word in help_text
