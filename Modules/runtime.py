"""The run and its machine: the folder it writes to, seeds, arithmetic precision, time, versions."""

import ctypes
import os
import platform
import shlex
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import tensorflow as tf

from Modules import state
from Modules.cli import UserError

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h
PRECISIONS = {"float32": "float32", "bfloat16": "mixed_bfloat16", "float16": "mixed_float16"}


def claim(folder: Path, resume: bool) -> None:
    """Make `folder` ready for a run, and keep other processes out of it.

    Raises:
        UserError: it can't be written, another process runs there, or it holds a run that was cut off and `resume` is
            not asked for.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        state.lock(folder)
    except OSError as error:
        raise UserError(
            f"can't write to {folder} ({error.strerror}): choose another folder with --checkpoints"
        ) from None
    if not resume:
        refuse_unfinished(folder)


def refuse_unfinished(folder: Path) -> None:
    """Raise `UserError` if `folder` holds a run that was cut off."""
    if unfinished := state.unfinished(folder):
        files = " and ".join(map(str, unfinished))
        raise UserError(f"{folder} holds a run that was cut off: --resume goes on with it; remove {files} to forget it")


class Stopwatch:
    """Wall-clock seconds of each stage, in order."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self.seconds[stage], self._last = round(now - self._last, 1), now

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


def set_seeds(seed: int, deterministic: bool = False) -> None:
    """Seed Python, NumPy and TensorFlow; `deterministic` also forbids operations whose result depends on timing."""
    tf.keras.utils.set_random_seed(seed)
    if deterministic:
        tf.config.experimental.enable_op_determinism()


def fastest_precision() -> str:
    """The arithmetic that trains fastest here without losing quality.

    bfloat16 on GPUs from compute capability 8 (Ampere) on, and on CPUs with AMX or AVX-512 BF16, where oneDNN's
    convolutions use it. float16 on GPUs with tensor cores before that (7.x); Keras scales the loss then. Else float32.
    By what the machine has and not by a measurement: a run that is resumed must come to the same.
    """
    gpus = tf.config.list_physical_devices("GPU")
    if gpus:
        capability = tf.config.experimental.get_device_details(gpus[0]).get("compute_capability", (0, 0))
        return "bfloat16" if capability >= (8, 0) else "float16" if capability >= (7, 0) else "float32"
    info = Path("/proc/cpuinfo")
    flags = set(info.read_text().split()) if info.exists() else set()
    return "bfloat16" if flags & {"amx_bf16", "avx512_bf16"} else "float32"


def chosen_precision(name: str) -> str:
    """What `--precision` means here."""
    return fastest_precision() if name == "auto" else name


def keep_freed_memory() -> None:
    """Have glibc keep what is freed: a step's large arrays are the same each time, and new pages cost a tenth of it."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def set_precision(name: str) -> str:
    """Make `auto`, `float32`, `bfloat16` or `float16` the policy of the layers built from now on; returns its name.

    Raises:
        UserError: for any other name.
    """
    name = chosen_precision(name)
    if name not in PRECISIONS:
        raise UserError(f"unknown precision {name!r}: known are auto, {', '.join(PRECISIONS)}")
    tf.keras.mixed_precision.set_global_policy(PRECISIONS[name])
    return name


def command() -> str:
    """The command line that started this, as it can be typed again."""
    return shlex.join(["python", *sys.argv])


def _gpus() -> list[str]:
    details = tf.config.experimental.get_device_details
    return [details(gpu).get("device_name", gpu.name) for gpu in tf.config.list_physical_devices("GPU")]


def versions() -> dict[str, str]:
    """What a result depends on beside the code."""
    return {
        "python": platform.python_version(),
        "tensorflow": tf.__version__,
        "keras": version("keras"),
        "numpy": np.__version__,
        "scikit-learn": version("scikit-learn"),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "gpu": ", ".join(_gpus()) or "none",
    }
