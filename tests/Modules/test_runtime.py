"""The folder of a run, seeds, and the arithmetic chosen for a machine."""

import os
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

from Modules import runtime
from Modules.cli import UserError

# --- The folder -------------------------------------------------------------------------------------------------------


def test_a_folder_is_made_and_left_empty(tmp_path):
    runtime.claim(tmp_path / "one" / "two", resume=False)
    assert [path.name for path in (tmp_path / "one" / "two").iterdir()] == [".lock"]


def test_a_finished_run_may_be_replaced(tmp_path):
    (tmp_path / "best_epoch.keras").touch()
    runtime.claim(tmp_path, resume=False)
    assert {path.name for path in tmp_path.iterdir()} == {"best_epoch.keras", ".lock"}


def test_an_unfinished_run_is_refused_unless_resumed(tmp_path):
    (tmp_path / "state-embedding.npz").touch()
    (tmp_path / "state-classifier.npz").touch()
    with pytest.raises(UserError, match=r"--resume.*state-classifier\.npz and .*state-embedding\.npz"):
        runtime.claim(tmp_path, resume=False)
    runtime.claim(tmp_path, resume=True)
    assert (tmp_path / "state-embedding.npz").exists()


@pytest.mark.parametrize("inner", ["", "folder"])
def test_a_folder_that_cannot_be_written_is_refused(tmp_path, inner):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"can.t write to .*file.*--checkpoints"):
        runtime.claim(tmp_path / "file" / inner, resume=False)


# --- Seeds and time ---------------------------------------------------------------------------------------------------


def test_a_seed_decides_weights_and_numpy():
    def drawn(seed):
        runtime.set_seeds(seed)
        return tf.keras.layers.Dense(3)(tf.ones((1, 4))).numpy(), np.random.rand()  # noqa: NPY002

    (weights, number), (again, number_again), (other, other_number) = drawn(1), drawn(1), drawn(2)
    np.testing.assert_array_equal(weights, again)
    assert number == number_again != other_number
    assert not np.array_equal(weights, other)


def test_the_stopwatch_keeps_each_stage_in_order(monkeypatch):
    times = iter([10.0, 12.5, 12.5, 20.0])
    monkeypatch.setattr(runtime.time, "perf_counter", lambda: next(times))
    watch = runtime.Stopwatch()
    for stage in ("baseline", "embedding", "classifier"):
        watch.lap(stage)
    assert list(watch.seconds.items()) == [("baseline", 2.5), ("embedding", 0.0), ("classifier", 7.5)]
    assert watch.total == 10.0


# --- Precision --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "policy"), [("float32", "float32"), ("bfloat16", "mixed_bfloat16"), ("float16", "mixed_float16")]
)
def test_a_precision_becomes_the_policy(name, policy):
    assert runtime.set_precision(name) == name
    assert tf.keras.mixed_precision.global_policy().name == policy


def test_auto_is_the_fastest_of_this_machine():
    chosen = runtime.set_precision("auto")
    assert chosen == runtime.fastest_precision()
    assert tf.keras.mixed_precision.global_policy().name == runtime.PRECISIONS[chosen]


@pytest.mark.parametrize("name", ["float64", "mixed_float16", ""])
def test_an_unknown_precision_names_the_known(name):
    with pytest.raises(UserError, match=f"{name!r}.*auto, float32, bfloat16, float16"):
        runtime.set_precision(name)
    assert tf.keras.mixed_precision.global_policy().name == "float32"


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((9, 0), "bfloat16"), ((8, 0), "bfloat16"), ((7, 5), "float16"), ((7, 0), "float16"), ((6, 1), "float32")],
)
def test_a_gpu_is_used_as_its_generation_can(monkeypatch, capability, expected):
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: ["gpu"])
    monkeypatch.setattr(tf.config.experimental, "get_device_details", lambda gpu: {"compute_capability": capability})
    assert runtime.fastest_precision() == expected


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("sse avx512f amx_bf16 avx512_bf16", "bfloat16"),
        ("avx512f avx512_bf16", "bfloat16"),
        ("avx2 avx512f", "float32"),
        (None, "float32"),
    ],
)
def test_a_cpu_is_used_as_its_flags_say(monkeypatch, tmp_path, flags, expected):
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: [])
    if flags is not None:
        (tmp_path / "cpuinfo").write_text(f"model name : any\nflags\t\t: {flags}\n")
    monkeypatch.setattr(runtime, "Path", lambda path: tmp_path / "cpuinfo")
    assert runtime.fastest_precision() == expected


def test_versions_are_those_that_run():
    versions = runtime.versions()
    assert versions["tensorflow"] == tf.__version__
    assert versions["numpy"] == np.__version__
    assert set(versions) == {"python", "tensorflow", "keras", "numpy", "scikit-learn", "machine", "gpu"}


@pytest.mark.parametrize(("given", "expected"), [(None, "1"), ("0", "0")])
def test_onednn_is_on_unless_the_user_says_otherwise(given, expected):
    name = "TF_ENABLE_ONEDNN_OPTS"
    environment = {key: value for key, value in os.environ.items() if key != name} | ({name: given} if given else {})
    command = [sys.executable, "-c", f"import os; from Modules import quiet; print(os.environ[{name!r}])"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == expected
