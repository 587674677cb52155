"""The main job through its real command, on a small drawn data set."""

import errno
import hashlib
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import tensorflow as tf
from wandb.proto import wandb_internal_pb2
from wandb.sdk.internal.datastore import DataStore

import modules
from dataset import load_manifest, select
from generate_balanced_dataset import generate
from Modules import safe_model
from Modules.data.images import read_image
from Modules.data.manifest import manifest_sha256
from Modules.data.synthetic import write_dataset
from tests.commands import ROOT, fails, run
from train import parse

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
    assert drawn >= {
        "curves_embedding",
        "curves_classifier",
        "confusion_matrix",
        "roc_and_precision_recall",
        "tsne",
        "distances",
        "k_shot",
        "inputs",
        "reliability",
        "reliability_at_prevalence",
        "decision_curves",
        "roc_and_precision_recall_full",
    }
    assert not list(trained.glob("state-*")) + list(trained.glob("*partial*"))


def test_calibration_and_threshold_come_from_validation_and_are_in_the_model(trained, balanced):
    facts = json.loads((trained / "best_epoch.json").read_text())
    calibration = facts["calibration"]
    assert (facts["threshold"], facts["threshold_rule"], facts["prevalence"]) == (0.5, "half", 0.0176)
    assert calibration["method"] == "temperature"  # validation is small
    assert calibration["training_prevalence"] == 0.5
    assert calibration["prior_offset"] == pytest.approx(np.log(0.0176 / 0.9824))
    for place, n in (("validation", None), ("test", facts["test"]["n"]), ("at_prevalence", facts["test_full"]["n"])):
        assert {"brier", "ece", "brier_ci95", "ece_ci95"} <= set(calibration[place]["before"])
        assert n is None or calibration[place]["after"]["n"] == n
    assert calibration["test"]["after"]["brier"] == pytest.approx(facts["test"]["brier"])
    assert calibration["at_prevalence"]["after"]["ece"] < calibration["at_prevalence"]["before"]["ece"]
    layer = modules.load(trained / "best_epoch.keras").get_layer("calibration")
    kernel, bias = (float(value) for value in layer.get_weights()[0].ravel().tolist() + layer.get_weights()[1].tolist())
    assert (kernel, bias) == pytest.approx((calibration["scale"], calibration["offset"]))


def test_the_report_holds_whom_and_what_the_model_fails(trained, balanced):
    facts = json.loads((trained / "best_epoch.json").read_text())
    n = facts["test_full"]["n"]
    for stratum in ("sex", "age", "site", "diagnosis"):
        assert sum(row["n"] for row in facts["subgroups"] if row["stratum"] == stratum) == n
    assert facts["shortcuts"]["n"] == n
    assert set(facts["shortcuts"]["views"]) == {"whole", "lesion_covered", "rim_alone"}
    assert facts["shortcuts"]["views"]["whole"]["roc_auc"] == facts["test_full"]["roc_auc"]
    assert set(facts["decision_curves"]) == {"own", "stated"}
    assert facts["used"]["splits"]["test"]["images"] == n
    known = set(select(load_manifest(balanced), "train")["isic_id"])
    for row in facts["errors"]:
        assert (row["probability"] >= 0.5) != row["target"]
        assert {neighbour["isic_id"] for neighbour in row["neighbours"]} <= known
    text, card = ((trained / name).read_text() for name in ("report.html", "MODEL_CARD.md"))
    for words in (facts["manifest_sha256"], "--backbone mobilenet", f"{facts['test']['roc_auc']:.3f}"):
        assert words in text
        assert words in card
    assert text.count("data:image/jpeg") >= 4 * min(len(facts["errors"]), 1)
    assert not re.search("https?:", text)


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
        "--classifier-views", "1", "--wandb", "disabled", "--precision", "float32", "--threshold-rule",
        "sensitivity=0.9", "--prevalence", "0.1", "--report-images", "no", "--gallery-thumbnails", "no", cwd=tmp_path,
    )  # fmt: skip
    facts = json.loads((tmp_path / "full" / "best_epoch.json").read_text())
    assert (facts["threshold_rule"], facts["prevalence"], facts["test"]["prevalence"]) == ("sensitivity=0.9", 0.1, 0.1)
    assert facts["threshold"] != 0.5
    assert "data:image/jpeg" not in (tmp_path / "full" / "report.html").read_text()
    everything = select(load_manifest(balanced), "train", full=True)
    assert facts["full_dataset"]
    assert facts["report_images"] == "no"  # which predict.py goes by
    with np.load(tmp_path / "full" / "gallery.npz") as gallery:
        assert len(gallery["thumbnails"]) == 0
        assert len(gallery["ids"]) == len(everything) > len(select(load_manifest(balanced), "train"))
    assert not (tmp_path / "wandb").exists()


RESULTS = ["best_epoch.keras", "gallery.npz", "best_epoch.json"]  # at the renaming of which a run may be killed too


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_a_fold_of_the_margin_system_killed_again_and_again_ends_like_the_undisturbed_run(kills, tmp_path):
    source = write_dataset(tmp_path / "source", images=120, size=64)
    generate(source, tmp_path / "data", size=64, folds=4)
    refit = ["--refit", "true", "--keep", "last", "--classifier-keep", "last"] if kills == 3 else []
    options = [
        *refit, "--recipe", "margin", "--fold", "0", "--data", tmp_path / "data", "--backbone", "mobilenet",
        "--image-size", "32", "--epochs", "3", "--classifier-epochs", "2", "--weights", "none",
        "--wandb", "disabled", "--deterministic",
    ]  # fmt: skip
    whole = tmp_path / "whole"

    def train(moment, folder, *more):
        command = ["tests/killing.py", moment, "train.py", *options, "--checkpoints", folder, *more]
        return subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True)

    assert train("never", whole).returncode == 0
    events = int((tmp_path / "whole.events").read_text())
    rng = np.random.default_rng(kills)
    finished, states, killed = [], set(), 0
    while killed < kills:
        folder = tmp_path / f"killed-{len(finished)}"
        # The last one late, at a place of its own, so that it comes to it whatever was done before.
        moment = rng.choice(RESULTS) if killed == kills - 1 else rng.integers(1, events // 2)
        done = train(moment, folder, "--resume")
        assert done.returncode in (-9, 0), done.stderr
        if done.returncode == 0:
            finished.append(folder)
        else:
            killed += 1
            states |= {file.name.split(".")[0] for file in folder.glob("state-*.npz")}
    folder = tmp_path / f"killed-{len(finished)}"
    last = train("never", folder, "--resume")
    assert last.returncode == 0, last.stderr
    assert states >= {"state-embedding", "state-classifier"}  # it was killed in both stages
    for resumed in (*finished, folder):
        assert_ended_alike(whole, resumed)


def assert_ended_alike(whole, killed):
    one, other = (json.loads((folder / "best_epoch.json").read_text()) for folder in (whole, killed))
    for name in "history refit_loss best_epoch threshold calibration test test_full baseline validation".split():
        assert one[name] == other[name], name
    assert one["fold"] == 0
    assert one["deterministic"]
    assert len(one["history"]["embedding"]["loss"]) == 3
    files = []
    for folder in (whole, killed):
        files.append({})
        with zipfile.ZipFile(folder / "best_epoch.keras") as archive, h5py.File(archive.open("model.weights.h5")) as h5:
            h5.visititems(lambda name, item: files[-1].update({name: item[()]} if hasattr(item, "shape") else {}))
        with np.load(folder / "gallery.npz") as gallery:
            files[-1] |= {name: gallery[name] for name in gallery if name != "checkpoint"}  # .keras files are dated
    assert files[0].keys() == files[1].keys()
    for name, value in files[0].items():
        np.testing.assert_array_equal(value, files[1][name], name)
    assert not list(killed.glob("state-*")) + list(killed.glob("*partial*")) + list(killed.glob("unfinished"))


@pytest.mark.slow
def test_a_disk_that_is_full_at_any_moment_costs_nothing_but_time(balanced, tmp_path):
    """Again and again, at moments all over the run; each time one line says so, and it can be resumed."""
    options = [
        "--data", balanced, "--backbone", "mobilenet", "--image-size", "32", "--batch-size", "16", "--epochs", "1",
        "--classifier-epochs", "1", "--classifier-views", "1", "--weights", "none", "--wandb", "disabled",
        "--checkpoints", tmp_path / "run",
    ]  # fmt: skip
    former, moment = None, 1
    while True:
        command = ["tests/killing.py", f"full:{moment}", "train.py", *options, *(["--resume"] if moment > 1 else [])]
        done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True)
        written = (tmp_path / "run" / "best_epoch.json").exists()
        if former:  # what was whole stays whole
            assert written
        if written:
            facts = json.loads((tmp_path / "run" / "best_epoch.json").read_text())
            safe_model.check_hashes(tmp_path / "run" / "best_epoch.keras", facts)
            modules.load(tmp_path / "run" / "best_epoch.keras")
        former = written
        if done.returncode == 0:
            break
        assert done.returncode == 2, done.stderr
        assert "No space left on device" in done.stderr.splitlines()[-1]
        assert "Traceback" not in done.stderr
        moment += 1 + moment // 8  # ever later: a resumed run has less to write
    assert moment > 10
    assert not list((tmp_path / "run").glob("state-*"))


def test_all_folds_share_a_pretraining_are_pooled_and_not_trained_twice(tmp_path):
    source = write_dataset(tmp_path / "source", images=200, size=32)
    external = write_dataset(tmp_path / "external", images=40, size=32, seed=9)
    table = pd.read_csv(external / "train-metadata.csv").drop(columns=["patient_id", "lesion_id"])
    table.to_csv(external / "train-metadata.csv", index=False)
    generate(source, tmp_path / "data", external=[external], size=32, folds=2)
    options = [
        "--fold", "all", "--data", tmp_path / "data", "--checkpoints", tmp_path / "ck", "--backbone", "mobilenet",
        "--loss", "semi-hard", "--classification", "1", "--positives", "other-patient", "--batches", "class",
        "--schedule", "cosine", "--weight-decay", "0.01", "--keep", "last", "--external", "pretrain",
        "--pretrain-epochs", "1", "--averaged-views", "2", "--beside-original", "true",
        "--image-size", "32", "--batch-size", "8", "--epochs", "1", "--classifier-epochs", "1",
        "--classifier-views", "1", "--weights", "none", "--wandb", "disabled", "--baseline", "finetune",
    ]  # fmt: skip
    said = run("train.py", *options, cwd=tmp_path)
    assert said.count("Stage 0: ") == 2
    assert said.count("has it already") == 1
    pooled = json.loads((tmp_path / "ck" / "cross_validation.json").read_text())
    manifest = load_manifest(tmp_path / "data")
    assert pooled["images"] == (manifest["fold"] >= 0).sum() == pooled["test_full"]["probability"]["n"]
    assert list(pooled["test_full"]) == ["probability", "knn", "logistic", "finetune"]
    facts = json.loads((tmp_path / "ck" / "fold-1" / "best_epoch.json").read_text())
    assert set(facts["baseline_finetune"]["test"]) >= TEST_KEYS
    assert "metric_loss" in facts["history"]["embedding"]

    before = (tmp_path / "ck" / "fold-1" / "best_epoch.keras").stat().st_mtime_ns
    said = run("train.py", *options, "--resume", cwd=tmp_path)
    assert "fold-0 is done." in said
    assert "fold-1 is done." in said
    assert (tmp_path / "ck" / "fold-1" / "best_epoch.keras").stat().st_mtime_ns == before

    def refused(*more) -> str:
        command = [sys.executable, str(ROOT / "train.py"), *map(str, options), *more]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 2
        (line,) = done.stderr.strip().splitlines()
        return line

    assert "fold-0 is of another run" in refused("--resume", "--classifier-epochs", "2")
    first = (tmp_path / "ck" / "fold-0" / "best_epoch.keras").stat().st_mtime_ns
    (tmp_path / "ck" / "fold-1" / "state-embedding.npz").write_bytes(b"")
    assert "fold-1 holds a run that was cut off" in refused()
    assert (tmp_path / "ck" / "fold-0" / "best_epoch.keras").stat().st_mtime_ns == first


def test_what_folds_share_lies_where_all_of_them_do():
    alone, here, every = map(
        parse, (["--fold", "1"], ["--fold", "1", "--checkpoints", "one"], ["--fold", "all", "--checkpoints", "runs"])
    )
    assert (alone.home, alone.checkpoints) == (Path("checkpoints"), Path("checkpoints/fold-1"))
    assert here.home == here.checkpoints == Path("one")
    assert every.home == every.checkpoints == Path("runs")


SECOND_ROUND_COLLAPSES = """
import train
from Modules import cli
from Modules.metric_learning.collapse import Diagnosis, Watch, no_watch

fallen = Watch(lambda epochs: Diagnosis("collapse", 1, "it has collapsed"), lambda epochs: False)
watches = iter([no_watch, fallen])
train.watch = lambda *_: next(watches)
cli.run(train.main)
"""


def test_a_second_round_learns_from_validation_too_and_leaves_the_first_where_it_collapses(balanced, tmp_path):
    options = [
        "--data", balanced, "--backbone", "mobilenet", "--image-size", "32", "--batch-size", "8", "--epochs", "1",
        "--keep", "last", "--classifier-epochs", "2", "--classifier-keep", "last", "--weights", "none",
        "--wandb", "disabled", "--deterministic", "--refit", "true",
    ]  # fmt: skip
    (tmp_path / "collapsing.py").write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{SECOND_ROUND_COLLAPSES}")
    given_up = run(tmp_path / "collapsing.py", *options, "--checkpoints", tmp_path / "one", cwd=tmp_path)
    assert "The second round is given up: the model will be the first's." in given_up
    said = run("train.py", *options, "--checkpoints", tmp_path / "two", cwd=tmp_path)
    assert "given up" not in said
    manifest = load_manifest(balanced)
    first, validation = (set(select(manifest, split)["isic_id"]) for split in ("train", "validation"))
    both = first | validation
    assert f"on {len(both)} images" in said
    one, two = (json.loads((tmp_path / name / "best_epoch.json").read_text()) for name in ("one", "two"))
    for name, learned in (("one", first), ("two", both)):
        with np.load(tmp_path / name / "gallery.npz") as gallery:
            assert set(gallery["ids"]) == learned
    for name in ("history", "best_epoch", "threshold", "validation"):
        assert one[name] == two[name], name
    for name in ("scale", "offset", "validation"):
        assert one["calibration"][name] == two["calibration"][name], name
    assert (one["rounds"], one["diagnosis"]) == (1, "it has collapsed")
    assert (two["rounds"], two["diagnosis"]) == (2, None)
    lengths = [{name: len(values) for name, values in facts["refit_loss"].items()} for facts in (one, two)]
    assert lengths == [{"embedding-refit": 1}, {"embedding-refit": 1, "classifier-refit": 2}]
    assert one["test"]["embedding"] != two["test"]["embedding"]
    assert one["test"]["brier"] != two["test"]["brier"]
    assert "scaling of the first round fitted here" in (tmp_path / "two" / "report.html").read_text()
    assert "In two rounds" in (tmp_path / "two" / "MODEL_CARD.md").read_text()
    assert "In two rounds" not in (tmp_path / "one" / "report.html").read_text()


@pytest.mark.slow
def test_the_published_failure_is_recognised_and_the_next_command_cures_it(tmp_path):
    generate(write_dataset(tmp_path / "source", images=400, size=32), tmp_path / "data", size=32)
    options = [
        "--data", tmp_path / "data", "--backbone", "mobilenet", "--image-size", "32", "--batch-size", "64",
        "--epochs", "9", "--classifier-epochs", "1", "--classifier-views", "1", "--weights", "none",
        "--batch-norm-momentum", "0.2", "--wandb", "disabled", "--precision", "float32",
    ]  # fmt: skip
    said = run("train.py", *options, "--normalisation", "batch", "--checkpoints", tmp_path / "failed", cwd=tmp_path)
    assert "normalise each row, not the batch" in said
    facts = json.loads((tmp_path / "failed" / "best_epoch.json").read_text())
    assert "collapsed" in facts["diagnosis"]
    assert 5 <= len(facts["history"]["embedding"]["loss"]) < 9  # it was stopped
    assert facts["history"]["embedding"]["loss"][-1] > 0.9 * facts["config"]["embedding"]["margin"]

    said = run("train.py", *options, "--checkpoints", tmp_path / "cured", cwd=tmp_path)
    facts = json.loads((tmp_path / "cured" / "best_epoch.json").read_text())
    assert "collapsed" not in (facts["diagnosis"] or "")
    assert facts["test"]["embedding"]["mean_negative_distance"] > 0.25
    assert not facts["test"]["embedding"]["collapsed"]


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
        (["--refit", "true"], "--keep last --classifier-keep last"),
        (["--wandb", "sometimes"], "offline"),
        (["--precision", "int8"], "float32"),
        (["--threshold-rule", "yuden"], "did you mean youden?"),
        (["--threshold-rule", "sensitivity=90"], "a share in (0, 1]"),
        (["--prevalence", "1.76"], "strictly between 0 and 1"),
        (["--report-images", "maybe"], "yes"),
        (["--backbone", "resnet51", "--weights", "none"], "did you mean resnet50?"),
        (["--loss", "semihard", "--weights", "none"], "did you mean semi-hard?"),
        (["--weights", "missing.h5"], "missing.h5"),
        (["--fold", "3"], "fold"),
        (["--seed", "-1"], "--seed -1"),
        (["--batches", "clas"], "expected shuffled, class"),
        (["--fold", "first"], "or all"),
        (["--external", "pretrain", "--weights", "none", "--backbone", "mobilenet"], "two or more diagnoses"),
        (["--loss", "tfa-semi-hard", "--positives", "other-patient"], "knows no patients"),
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


@pytest.mark.parametrize(("number", "kind"), [(errno.ENOSPC, "ResourceExhausted"), (errno.EFBIG, "OutOfRange")])
def test_a_disk_that_tensorflow_finds_full_is_one_line(number, kind, balanced, tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise getattr(tf.errors, f"{kind}Error")(None, None, f"events.out.tfevents; {os.strerror(number)}")

    monkeypatch.setattr("train.train", fail)
    line = fails("train", "--data", balanced, "--checkpoints", tmp_path, monkeypatch=monkeypatch, capsys=capsys)
    assert f"({os.strerror(number)}): make room, then --resume" in line


def test_help_names_every_word():
    help_text = subprocess.run(
        [sys.executable, "train.py", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for word in ("full-dataset", "full-model", "mnist", "--recipe", "--classifier-epochs", "--resume"):
        assert word in help_text
