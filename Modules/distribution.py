"""One training on several devices or machines, as if on one: `train.py --distribute mirrored | multiworker`.

    mirrored      every GPU of this machine (without GPUs its logical CPU devices)
    multiworker   the same command on each machine, which finds the others through TF_CONFIG:
                  {"cluster": {"worker": ["a:12345", "b:12345"]}, "task": {"type": "worker", "index": 0}}

A global batch is cut into equal parts, one a replica, in the order that one device would see it in. `gathered` brings
the parts' outputs together again, so that triplets are mined over the whole batch. Worker 0 is the chief: it alone
reads and writes files of state, checkpoints and curves, and what it decides holds for all. What this module sums up
between workers must be asked for by all of them, in the same order.

Without a strategy (`--distribute none`) every function here is the identity.
"""

import io
import json
import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from Modules import state
from Modules.cli import UserError

State = tuple[dict, dict[str, list[np.ndarray]]]

MODES = ("none", "mirrored", "multiworker")
EXAMPLE = '{"cluster": {"worker": ["a:12345", "b:12345"]}, "task": {"type": "worker", "index": 0}}'
# What TensorFlow raises when a peer no longer answers.
LOST = (
    tf.errors.UnavailableError,
    tf.errors.AbortedError,
    tf.errors.CancelledError,
    tf.errors.DeadlineExceededError,
    tf.errors.InternalError,
)


class Share(NamedTuple):
    """The parts of every global batch that are read here, `of` how many."""

    parts: range
    of: int


WHOLE = Share(range(1), 1)


def start(mode: str) -> tf.distribute.Strategy:
    """The strategy of MODES. To be called before TensorFlow's first operation; waits for the other workers.

    Raises:
        UserError: one device under `mirrored`; no or a garbled TF_CONFIG, one worker, or a port in use.
    """
    if mode == "mirrored":
        devices = [device.name for kind in ("GPU", "CPU") for device in tf.config.list_logical_devices(kind)]
        devices = [name for name in devices if "GPU" in name] or devices
        if len(devices) < 2:
            raise UserError(
                f"--distribute mirrored needs two or more GPUs; here is {devices[0].split(':', 1)[1]} alone: "
                "use --distribute none"
            )
        return tf.distribute.MirroredStrategy(devices)
    if mode == "multiworker":
        task, workers = _cluster()
        print(f"Worker {task} of 0 to {workers - 1}: waiting for the others")
        try:
            return tf.distribute.MultiWorkerMirroredStrategy()
        except (tf.errors.OpError, RuntimeError) as error:
            raise UserError(f"worker {task} can't start: {error}; is its port in TF_CONFIG free?") from None
    return tf.distribute.get_strategy()


def _cluster() -> tuple[int, int]:
    """This worker's index in TF_CONFIG and how many there are."""
    text = os.environ.get("TF_CONFIG")
    if not text:
        raise UserError(f"--distribute multiworker needs TF_CONFIG in the environment, as in TF_CONFIG='{EXAMPLE}'")
    try:
        config = json.loads(text)
        workers, task = config["cluster"]["worker"], config["task"]
        if set(config["cluster"]) != {"worker"} or task["type"] != "worker":
            raise ValueError("tasks are of type worker alone; worker 0 is the chief")
        if not all(isinstance(worker, str) and worker.rpartition(":")[2].isdigit() for worker in workers):
            raise ValueError("a worker is host:port")
        if len(set(workers)) < max(len(workers), 2):
            raise ValueError("two or more different workers")
        if type(task["index"]) is not int or not 0 <= task["index"] < len(workers):
            raise ValueError(f"an index from 0 to {len(workers) - 1}")
    except (ValueError, KeyError, TypeError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(f"can't use TF_CONFIG ({reason}): expected the like of {EXAMPLE}") from None
    return task["index"], len(workers)


def _workers(strategy: tf.distribute.Strategy) -> tuple[int, int]:
    """This worker's index, and how many there are."""
    resolver = strategy.cluster_resolver
    if resolver is None or not resolver.cluster_spec():
        return 0, 1
    return resolver.task_id, resolver.cluster_spec().num_tasks("worker")


def is_chief(strategy: tf.distribute.Strategy) -> bool:
    return _workers(strategy)[0] == 0


def share(strategy: tf.distribute.Strategy) -> Share:
    """What this worker reads of every batch."""
    (worker, workers), replicas = _workers(strategy), strategy.num_replicas_in_sync
    here = replicas // workers
    return Share(range(worker * here, (worker + 1) * here), replicas)


def dataset(strategy: tf.distribute.Strategy, batches: tf.data.Dataset) -> tf.data.Dataset:
    """`batches`, the parts of a `Share` one after another, as what Keras's `fit` takes."""
    return strategy.distribute_datasets_from_function(lambda context: batches)


def gathered(*tensors: tf.Tensor) -> tuple[tf.Tensor, ...]:
    """In a replica: tensors [B / R, ...] of all R replicas, each as one [B, ...]; gradients go back to their owners.

    Every replica computes the same loss L of what is gathered. Keras takes L / R in each, and the gradient of gathering
    adds up those of all replicas: a replica's embeddings get R times dL / R.
    """
    context = tf.distribute.get_replica_context()
    if context is None or context.num_replicas_in_sync == 1:
        return tensors

    def all_of(tensor: tf.Tensor) -> tf.Tensor:
        # Identity: what comes from the data set has no device yet. The shape gets lost, and labels need theirs.
        return tf.ensure_shape(context.all_gather(tf.identity(tensor), axis=0), [None, *tensor.shape[1:]])

    return tuple(map(all_of, tensors))  # one by one: together they would have to be of one type


def total(strategy: tf.distribute.Strategy, array: np.ndarray) -> np.ndarray:
    """The sum over all workers of an array of one shape, float or whole numbers; bit by bit the same on each."""
    if _workers(strategy)[1] == 1:
        return np.asarray(array)
    first = share(strategy).parts[0]

    def value(context: tf.distribute.ReplicaContext) -> tf.Tensor:
        mine = context.replica_id_in_sync_group == first
        return tf.constant(array if mine else np.zeros_like(array))

    values = strategy.experimental_distribute_values_from_function(value)
    return strategy.reduce(tf.distribute.ReduceOp.SUM, values, axis=None).numpy()


def any_worker(strategy: tf.distribute.Strategy, flag: bool) -> bool:
    return bool(total(strategy, np.int64(flag)))


def mean(strategy: tf.distribute.Strategy, figures: dict[str, float]) -> dict[str, float]:
    """The mean over all workers of each figure, so that all of them decide alike, whatever their rounding."""
    if _workers(strategy)[1] == 1 or not figures:
        return figures
    values = total(strategy, np.array(list(figures.values()), np.float64)) / _workers(strategy)[1]
    return dict(zip(figures, values.tolist(), strict=True))


def from_chief(strategy: tf.distribute.Strategy, make: Callable[[], State]) -> State:
    """What `make` returns on the chief, where alone it is called: facts of JSON's kinds, and named lists of arrays."""
    if _workers(strategy)[1] == 1:
        return make()
    stream = io.BytesIO()
    if is_chief(strategy):
        state.pack(stream, *make())
    data = stream.getvalue()
    length = int(total(strategy, np.int64(len(data))))
    words = np.zeros(-(-length // 4), np.int32)  # collectives know no bytes
    words.view(np.uint8)[: len(data)] = np.frombuffer(data, np.uint8)
    return state.unpack(io.BytesIO(total(strategy, words).tobytes()[:length]))


def agree(strategy: tf.distribute.Strategy, options: dict, done: bool) -> bool:
    """Whether the chief finds the run `done`.

    Raises:
        UserError: this worker was given other options or other data than the chief.
    """
    options = json.loads(json.dumps(options))  # as the chief's arrive: lists, no tuples
    facts, _ = from_chief(strategy, lambda: ({"options": options, "done": done}, {}))
    if facts["options"] != options:
        changed = ", ".join(name for name, value in options.items() if facts["options"].get(name) != value)
        raise UserError(f"this worker has another {changed} than worker 0: start all with the same options and data")
    return facts["done"]


def by_itself(function: Callable):
    """Run `function` outside of the strategy that Keras's `fit` is in: what it predicts is not to be distributed.

    Strategies hold for a thread.
    """
    if not tf.distribute.has_strategy():
        return function()
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


@contextmanager
def losing_workers(strategy: tf.distribute.Strategy):
    """Turn the loss of another worker into one line and exit code 1."""
    try:
        yield
    except LOST as error:
        if _workers(strategy)[1] == 1:
            raise
        reason = re.sub(r"{{.*?}}|\s+", " ", error.message).strip()[:160]
        raise SystemExit(
            f"train.py: another worker is gone ({reason}): see what it said, then start all of them with --resume"
        ) from None
