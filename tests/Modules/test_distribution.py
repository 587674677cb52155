"""Several workers and devices train as one would; what can't be distributed is refused in one line."""

import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest

from dataset import load_manifest, select, training_batches
from Modules import distribution
from Modules.cli import UserError
from Modules.config import RECIPES
from Modules.distribution import Share
from tests.commands import ROOT, fails

JOBS = {
    "semi-hard": {},
    "joint": {"classification": 1.0, "positives": "other-patient"},
    "arcface": {"loss": "arcface"},
}
# Smooth losses where BatchNorm trains: the last bits of a sum may decide which negative is the nearest.
NORM = {"loss": "supervised-contrastive", "norm": "training"}
KILLED = NORM | {"augment": True, "batch": 16, "epochs": 3, "steps": None}
WORKERS = 2


def cluster(count):
    """One TF_CONFIG a worker, on free ports."""
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    addresses = [f"127.0.0.1:{one.getsockname()[1]}" for one in sockets]
    for one in sockets:
        one.close()
    return [
        json.dumps({"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}})
        for index in range(count)
    ]


def launch(commands):
    """Run the commands of all workers at the same time: what each returned, said, and said on stderr."""
    running = [
        subprocess.Popen(
            [sys.executable, *map(str, command)],
            cwd=ROOT,
            env=os.environ | {"TF_CONFIG": config},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for command, config in zip(commands, cluster(len(commands)), strict=True)
    ]
    try:
        return [(process.returncode, *said) for process in running for said in [process.communicate(timeout=300)]]
    finally:
        for process in running:
            process.kill()


def train(distribute, balanced, output, jobs, workers=1, **settings):
    """The histories that each worker wrote, and what each returned and said."""
    output.parent.mkdir(exist_ok=True)
    given = {"distribute": distribute, "data": str(balanced), "output": str(output), "jobs": jobs, **settings}
    done = launch([["tests/distributed.py", json.dumps(given)]] * workers)
    files = [output.with_suffix(f".{index}") for index in range(workers)]
    return [json.loads(file.read_text()) for file in files if file.exists()], done


@pytest.fixture(scope="module")
def alone(balanced, tmp_path_factory):
    output = tmp_path_factory.mktemp("alone") / "run"
    (histories,), done = train("none", balanced, output, JOBS | {"norm": NORM, "killed": KILLED})
    assert done[0][0] == 0, done[0][2]
    return histories


def assert_same(one, other):
    for figure, values in one.items():
        relative = 0 if "loss" in figure else 1e-4  # a sum of all weights' sizes goes into the thousands
        np.testing.assert_allclose(other[figure], values, rtol=relative, atol=1e-4, err_msg=figure)


@pytest.mark.slow
def test_two_workers_of_32_train_as_one_process_of_64(alone, balanced, tmp_path):
    histories, done = train("multiworker", balanced, tmp_path / "run", JOBS, WORKERS)
    assert [code for code, *_ in done] == [0] * WORKERS, done
    for history in histories:
        for name in JOBS:
            assert len(history[name]["loss"]) == 20
            assert_same(alone[name], history[name])
    assert histories[0] == histories[1]  # bit by bit, so that both always decide alike
    assert {file.name.split(".")[0] for file in tmp_path.glob("state-*")} == {f"state-{name}" for name in JOBS}


def test_two_devices_train_as_one_and_mining_in_each_alone_does_not(alone, balanced, tmp_path):
    jobs = JOBS | {"norm": NORM, "replica": {"mining": "replica"}}
    (history,), done = train("mirrored", balanced, tmp_path / "run", jobs, devices=2)
    assert done[0][0] == 0, done
    for name in (*JOBS, "norm"):
        assert_same(alone[name], history[name])
    difference = np.abs(np.subtract(history["replica"]["loss"], alone["semi-hard"]["loss"]))
    assert difference[0] > 1e-3  # from the same weights, on the same images
    assert difference.max() > 1e-2


@pytest.mark.slow
def test_two_devices_train_the_network_of_train_py_as_one(balanced, tmp_path):
    """With BatchNorm over the whole batch: half of it has other means."""
    jobs = {"real": NORM | {"norm": "mobilenet", "batch": 32, "epochs": 2}}
    alone, two = (
        train(*mode, balanced, tmp_path / mode[0] / "run", jobs, devices=devices)[0][0]["real"]
        for mode, devices in ((("none",), 1), (("mirrored",), 2))
    )
    # Adam makes a whole step of each gradient's sign, and 27 layers of float32 decide that of the smallest.
    np.testing.assert_allclose(two["loss"], alone["loss"], rtol=2e-3)


def cut_and_resume(balanced, folder, worker, moment, name, resumed_by=WORKERS):
    """A run in which a worker sends itself a signal at (epoch, step), and then its continuation by as many or fewer."""
    jobs = {"killed": KILLED}
    nothing, done = train("multiworker", balanced, folder / "run", jobs, WORKERS, kill=(worker, *moment, name))
    assert not nothing
    (code, _, said), other = done[worker], done[1 - worker]
    if name == "SIGTERM":  # one is asked to stop, and all do, in good order
        assert [code, other[0]] == [128 + 15] * 2, done
        assert "--resume" in said
    else:
        assert [code, other[0]] == [-9, 1], done
        # Keras may add that callbacks are slow: here the state is saved at every batch.
        lines = [line for line in other[2].strip().splitlines() if "is slow compared to the batch time" not in line]
        assert len(lines) == 1, lines
        assert "another worker is gone" in lines[0]
        assert "--resume" in lines[0]
    assert list(folder.glob("state-*.npz")) or (name, moment) == ("SIGKILL", (0, 0))  # before anything was saved
    mode = "multiworker" if resumed_by > 1 else "none"
    resumed, done = train(mode, balanced, folder / "run", jobs, resumed_by, resume=True)
    assert [code for code, *_ in done] == [0] * resumed_by, done
    return resumed


def test_a_run_whose_worker_was_killed_ends_as_the_undisturbed_one(alone, balanced, tmp_path):
    for history in cut_and_resume(balanced, tmp_path, 1, (1, 2), "SIGKILL"):
        assert_same(alone["killed"], history["killed"])


@pytest.mark.slow
def test_a_run_of_two_workers_goes_on_with_one(alone, balanced, tmp_path):
    (history,) = cut_and_resume(balanced, tmp_path, 1, (1, 2), "SIGKILL", resumed_by=1)
    assert_same(alone["killed"], history["killed"])


@pytest.mark.slow
def test_killed_anywhere_or_asked_to_stop_it_ends_the_same_bit_by_bit(balanced, tmp_path):
    whole, done = train("multiworker", balanced, tmp_path / "whole" / "run", {"killed": KILLED}, WORKERS)
    assert [code for code, *_ in done] == [0] * WORKERS, done
    rng = np.random.default_rng(0)
    for case in range(6):
        moment = int(rng.integers(3)), int(rng.integers(3))
        name = ("SIGKILL", "SIGTERM")[case % 2]
        resumed = cut_and_resume(balanced, tmp_path / str(case), int(rng.integers(WORKERS)), moment, name)
        assert resumed == whole, (moment, name)


@pytest.mark.slow
@pytest.mark.parametrize("killed", range(WORKERS))
def test_train_py_one_of_whose_workers_was_killed_ends_as_the_undisturbed_run(killed, balanced, tmp_path):
    options = [
        "--data", balanced, "--backbone", "mobilenet", "--image-size", "32", "--batch-size", "16", "--epochs", "2",
        "--classifier-epochs", "1", "--classifier-views", "1", "--weights", "none", "--wandb", "disabled",
        "--loss", "semi-hard", "--precision", "float32", "--distribute", "multiworker",
    ]  # fmt: skip

    def both(name, moments, *more):
        files = [tmp_path / f"{name}-{worker}" for worker in range(WORKERS)]
        commands = [
            ["tests/killing.py", moment, "train.py", *options, "--checkpoints", file, *more]
            for moment, file in zip(moments, files, strict=True)
        ]
        return launch(commands)

    never = ["never"] * WORKERS
    assert [code for code, *_ in both("whole", never)] == [0] * WORKERS
    batches = int((tmp_path / "whole-1.events").read_text())  # worker 1 writes no files
    moments = list(never)
    moments[killed] = np.random.default_rng(killed).integers(2, batches)
    done = both("cut", moments)
    assert (done[killed][0], done[1 - killed][0]) == (-9, 1), done
    assert "another worker is gone" in done[1 - killed][2].strip().splitlines()[-1]
    done = both("cut", never, "--resume")
    assert [code for code, *_ in done] == [0] * WORKERS, done
    whole, cut = (json.loads((tmp_path / f"{name}-0" / "best_epoch.json").read_text()) for name in ("whole", "cut"))
    for name in ("history", "best_epoch", "threshold", "calibration", "test", "test_full"):
        assert cut[name] == whole[name], name


def test_a_worker_with_other_options_is_refused(monkeypatch):
    chief = {"recipe": {"epochs": 2, "units": [4]}, "resume": False}
    monkeypatch.setattr(distribution, "from_chief", lambda strategy, make: ({"options": chief, "done": True}, {}))
    assert distribution.agree(None, {"recipe": {"epochs": 2, "units": (4,)}, "resume": False}, False)
    with pytest.raises(UserError, match="another recipe, resume than worker 0"):
        distribution.agree(None, {"recipe": {"epochs": 3, "units": (4,)}, "resume": True}, True)


def test_the_shares_are_the_batches_of_one(balanced):
    table = select(load_manifest(balanced), "train", full=True)
    recipe = RECIPES["lightweight"]()
    options = {"data": recipe.data.__class__(image_size=16, batch_size=24)}
    recipe = recipe.__class__("test", **options)
    whole, steps = training_batches(table, recipe, 0, True, 1)
    whole = list(whole.take(3).as_numpy_iterator())
    assert steps > 1
    for workers, here in ((2, 1), (2, 3), (4, 2)):
        of = workers * here
        parts = []
        for worker in range(workers):
            share = Share(range(worker * here, (worker + 1) * here), of)
            stream, same = training_batches(table, recipe, 0, True, 1, share)
            assert same == steps
            parts.append(list(stream.take(3 * here).as_numpy_iterator()))
        for i, wanted in enumerate(whole):
            for j, values in enumerate(wanted):
                got = [part[j] for worker in parts for part in worker[i * here : (i + 1) * here]]
                np.testing.assert_array_equal(np.concatenate(got), values)
    with pytest.raises(UserError, match="24 images can't be cut into 5"):
        training_batches(table, recipe, 0, True, 1, Share(range(1), 5))


def worker(**changes):
    config = {"cluster": {"worker": ["a:1", "b:2"]}, "task": {"type": "worker", "index": 0}} | changes
    return json.dumps(config)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (None, "needs TF_CONFIG"),
        ("", "needs TF_CONFIG"),
        ("{", "can't use TF_CONFIG"),
        ("[]", "can't use TF_CONFIG"),
        ('{"cluster": {}}', "no 'worker'"),
        (worker(task={"type": "worker"}), "no 'index'"),
        (worker(task={"type": "worker", "index": 2}), "an index from 0 to 1"),
        (worker(task={"type": "worker", "index": True}), "an index from 0 to 1"),
        (worker(task={"type": "chief", "index": 0}), "worker 0 is the chief"),
        (worker(cluster={"worker": ["a:1", "b:2"], "ps": ["c:3"]}), "worker 0 is the chief"),
        (worker(cluster={"worker": ["a:1"]}), "two or more different workers"),
        (worker(cluster={"worker": ["a:1", "a:1"]}), "two or more different workers"),
        (worker(cluster={"worker": ["a", "b:2"]}), "a worker is host:port"),
        (worker(cluster={"worker": "a:1"}), "a worker is host:port"),
    ],
)
def test_a_missing_or_garbled_cluster_is_one_line(config, named, balanced, monkeypatch, capsys):
    monkeypatch.delenv("TF_CONFIG", raising=False)
    if config is not None:
        monkeypatch.setenv("TF_CONFIG", config)
    line = fails(
        "train", "--distribute", "multiworker", "--data", balanced, "--wandb", "disabled",
        monkeypatch=monkeypatch, capsys=capsys,
    )  # fmt: skip
    assert named in line


def test_one_device_and_no_data_are_one_line(balanced, tmp_path, monkeypatch, capsys):
    assert "two or more GPUs" in fails(
        "train", "--distribute", "mirrored", "--data", balanced, monkeypatch=monkeypatch, capsys=capsys
    )
    monkeypatch.chdir(tmp_path)
    assert "makes no data set" in fails("train", "--distribute", "multiworker", monkeypatch=monkeypatch, capsys=capsys)
    assert "known" in fails("train", "--distribute", "horovod", monkeypatch=monkeypatch, capsys=capsys)


def test_without_a_strategy_nothing_is_changed():
    strategy = distribution.start("none")
    figures = {"val_loss": np.float32(0.5), "val_none": np.nan}
    assert distribution.is_chief(strategy)
    assert distribution.share(strategy) == distribution.WHOLE
    assert distribution.mean(strategy, figures) is figures
    assert distribution.from_chief(strategy, lambda: ({"a": 1}, {})) == ({"a": 1}, {})
    assert distribution.any_worker(strategy, True)
    assert not distribution.any_worker(strategy, False)
