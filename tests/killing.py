"""`python killing.py MOMENT train.py ARGUMENTS`: a script that is killed (SIGKILL) at its MOMENT-th event, if any.

With `full:MOMENT` the disk is full from then on instead: whatever opens a file for writing meets ENOSPC.

Events are batches trained, files opened for writing, renamed and removed in the folder of --checkpoints, and moments
within the writing of arrays; MOMENT may also be the name of a file: at its renaming. The state is saved at every batch.
How many events there were without a kill is written to FOLDER.events.
"""

import errno
import os
import runpy
import signal
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from Modules import quiet  # noqa: E402, F401, before TensorFlow

# isort: split
import numpy as np  # noqa: E402

from Modules import NeuralNetwork  # noqa: E402

moment, script, *arguments = sys.argv[1:]
folder = os.path.abspath(arguments[arguments.index("--checkpoints") + 1])
events = arrays = 0


def event(name: str = "", before_it: Callable = lambda: None, writes: bool = False) -> None:
    global events
    events += 1
    if moment.startswith("full:"):
        if events >= int(moment.removeprefix("full:")) and writes:
            raise OSError(errno.ENOSPC, "No space left on device", folder)
    elif moment in (str(events), name):
        before_it()
        os.kill(os.getpid(), signal.SIGKILL)


def audit(kind: str, details: tuple) -> None:
    if kind not in ("open", "os.rename", "os.remove") or not isinstance(details[0], str | Path):
        return
    reading = kind == "open" and not (details[2] or 0) & (os.O_WRONLY | os.O_RDWR)
    if os.path.abspath(details[0]).startswith(folder + os.sep) and not reading:
        event(Path(details[1]).name if kind == "os.rename" else "", writes=kind == "open")


def write_array(stream, array, **options):
    global arrays
    arrays += 1
    if arrays % 97 == 0:
        event("", lambda: (stream.write(array.tobytes()[: array.nbytes // 2]), stream.flush()))
    former_write(stream, array, **options)


def on_train_batch_end(self, batch, logs=None):
    event()
    former_batch(self, batch, logs)


former_batch, former_write = NeuralNetwork._Epochs.on_train_batch_end, np.lib.format.write_array
NeuralNetwork._Epochs.on_train_batch_end, np.lib.format.write_array = on_train_batch_end, write_array
NeuralNetwork.SAVE_EVERY = 0
sys.addaudithook(audit)
sys.argv = [script, *arguments]
try:
    runpy.run_path(str(ROOT / script), run_name="__main__")
finally:
    Path(f"{folder}.events").write_text(str(events))
