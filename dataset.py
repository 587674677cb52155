"""From the manifest to batches: the only place where training and evaluation read pictures.

    manifest = load_manifest("datasets/balanced")
    table = select(manifest, "train")                     # the 50/50 set; full=True: every image
    batches, steps = training_batches(table, recipe, seed=0)

Every random choice (order, augmentation) comes stateless from (seed, epoch, place in the epoch): the same on any
machine, with any number of threads, and after any interruption.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from itertools import count
from pathlib import Path

import numpy as np
import pandas as pd
import tensorflow as tf

from Modules.cli import UserError, nearest
from Modules.config import Data, Recipe
from Modules.data.augmentation import augment, draws
from Modules.data.cache import reader
from Modules.data.manifest import fold_view, read_manifest
from Modules.data.records import located
from Modules.distribution import WHOLE, Share
from Modules.metric_learning.sampling import class_batches, metric_labels, oversampled, shuffled

PARALLEL = min(os.cpu_count(), 16)  # batches made at once; enough for a GPU, and each is held in memory
Plan = Callable[[], Iterable[tuple[int, int, np.ndarray]]]  # -> (epoch, place of the first in it, positions [B])


def load_manifest(folder: str | Path, fold: int | None = None, verify: bool = False) -> pd.DataFrame:
    """The checked manifest of a data set; `fold` becomes the test split where given.

    Three more columns: `home` (the folder), `row` (its number in the manifest), `file` (where the picture's bytes are).

    Raises:
        UserError: no manifest, or one in which a patient or a group crosses splits, or that was edited.
    """
    manifest = read_manifest(Path(folder), verify=verify)
    manifest = manifest.assign(home=str(folder), row=range(len(manifest)))
    if fold is not None:
        manifest = fold_view(manifest, fold)
    return manifest.assign(file=located(Path(folder), manifest["path"].fillna("")))


def select(manifest: pd.DataFrame, split: str, full: bool = False, external: bool = True) -> pd.DataFrame:
    """The rows of `train`, `validation` or `test`: the 50/50 set, or everything where `full`.

    `external` images are training images, unless they are to be left out.

    Raises:
        UserError: fewer than two images of a class: nothing could be learned or measured.
    """
    rows = manifest[manifest["split"].isin(("train", "external") if split == "train" and external else (split,))]
    rows = rows if full else rows[rows["balanced"]]
    smallest = rows["target"].value_counts().reindex([0, 1], fill_value=0).min()
    if smallest < 2:
        raise UserError(f"the {split} split has {smallest} images of one class; expected 2 or more: add images")
    return rows.reset_index(drop=True)


def epoch_batches(table: pd.DataFrame, recipe: Recipe, full: bool, seed: int, epoch: int) -> np.ndarray:
    """Positions in `table` [steps, B] that one epoch visits, but for a rest that fills no batch, another each epoch.

    Raises:
        UserError: unknown kind of batches.
    """
    kind, size = recipe.embedding.batches, recipe.data.batch_size
    targets = table["target"].to_numpy()
    if kind == "class":
        return class_batches(targets, table["patient_id"].to_numpy(), size, seed, epoch)
    if kind != "shuffled":
        raise UserError(f"unknown kind of batches {kind!r}: {nearest(kind, ('shuffled', 'class'))}")
    order = oversampled(targets, seed, epoch) if full else shuffled(len(table), seed, epoch)
    size = min(size, len(order))
    return order[: len(order) // size * size].reshape(-1, size)


def training_batches(
    table: pd.DataFrame, recipe: Recipe, seed: int, full: bool = False, start: int = 0, share: Share = WHOLE
) -> tuple[tf.data.Dataset, int]:
    """Endless augmented batches (uint8 [B, S, S, 3], labels) from epoch `start` on; steps an epoch.

    Labels are those of the metric losses: int32 [B], or [B, 2] where a positive must come from another patient. Of
    batches that several replicas share it gives the parts of this `share`, one after another, and reads no others.

    Raises:
        UserError: batches that can't be shared in equal parts.
    """
    steps, size = epoch_batches(table, recipe, full, seed, 0).shape
    if size % share.of:
        raise UserError(f"a batch of {size} images can't be cut into {share.of} equal parts: change --batch-size")

    def plan() -> Iterator[tuple[int, int, np.ndarray]]:
        for epoch in count(start):
            batches = epoch_batches(table, recipe, full, seed, epoch).reshape(steps, share.of, -1)
            for step, parts in enumerate(batches):
                for part in share.parts:
                    yield epoch, step * size + part * len(parts[part]), parts[part]

    labels = metric_labels(table["target"], table["patient_id"], recipe.embedding.positives)
    return _batches(table, recipe.data, plan, seed, labels=labels), steps


def vector_batches(
    vectors: np.ndarray, targets: np.ndarray, batch_size: int, seed: int, start: int = 0, views: int = 1
) -> tuple[tf.data.Dataset, int]:
    """Endless shuffled batches of arrays (float32 [B, ...], targets [B, 1]) from epoch `start` on; steps an epoch.

    Of `views` of each image, all first views first, as `view_batches` gives them, an epoch sees one, the next the next.
    """
    n = len(vectors) // views
    size = min(batch_size, n)
    steps = n // size

    def batches() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for epoch in count(start):
            order = epoch % views * n + shuffled(n, seed, epoch)
            for positions in order[: steps * size].reshape(steps, size):
                yield vectors[positions], targets[positions, None]

    signature = (tf.TensorSpec((size, *vectors.shape[1:]), tf.float32), tf.TensorSpec((size, 1), targets.dtype))
    return _without_autotuning(tf.data.Dataset.from_generator(batches, output_signature=signature).prefetch(8)), steps


def view_batches(table: pd.DataFrame, config: Data, views: int, seed: int) -> tf.data.Dataset:
    """`views` augmented views of every image in turn, in order: batches as above, `views` x N images in all.

    No views (0): every image once, as it is.
    """
    if not views:
        return image_batches(table, config)
    # Another stream than stage 1's, so that no view repeats one the embedding was trained on.
    return _batches(table, config, lambda: _in_order(len(table), config.batch_size, range(views)), seed, stream=1)


def image_batches(table: pd.DataFrame, config: Data) -> tf.data.Dataset:
    """Every image once, in order, as it is."""
    return _batches(table, config, lambda: _in_order(len(table), config.batch_size, range(1)), None)


def _in_order(n: int, batch_size: int, epochs: Iterable[int]) -> Iterator[tuple[int, int, np.ndarray]]:
    for epoch in epochs:
        for place in range(0, n, batch_size):
            yield epoch, place, np.arange(place, min(place + batch_size, n))


def _batches(
    table: pd.DataFrame, config: Data, plan: Plan, seed: int | None, stream: int = 0, labels: np.ndarray | None = None
) -> tf.data.Dataset:
    """Read what `plan` names; augment it where a seed is given. `labels` are the targets, unless given."""
    targets = table["target"].to_numpy(np.int32) if labels is None else labels
    size = config.image_size
    picture = reader(table, size)

    def read(epoch: np.ndarray, place: np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        images = np.empty((len(positions), size, size, 3), np.uint8)
        if seed is None:
            for image, position in zip(images, positions, strict=True):
                image[...] = picture(position)
        else:
            drawn = draws(seed, epoch, stream, place, len(positions))
            for image, position, numbers in zip(images, positions, drawn, strict=True):
                augment(picture(position), config, numbers, image)
        return images, targets[positions]

    def load(*item: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        # uint8 as far as the model, which casts: a quarter of the bytes to hand on and to bring to a device.
        images, labels = tf.numpy_function(read, item, (tf.uint8, tf.int32), stateful=False)
        images = tf.ensure_shape(images, (None, size, size, 3))
        return images, tf.ensure_shape(labels, (None, *targets.shape[1:]))

    signature = (tf.TensorSpec((), tf.int64), tf.TensorSpec((), tf.int64), tf.TensorSpec((None,), tf.int64))
    batches = tf.data.Dataset.from_generator(plan, output_signature=signature)
    return _without_autotuning(batches.map(load, num_parallel_calls=PARALLEL, deterministic=True).prefetch(2))


def _without_autotuning(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """`dataset` as it is: the thread that tunes it may sleep when the data end, and they only end when it wakes.

    It sleeps twice as long each time, so that a pass over the data could take twice its time.
    """
    options = tf.data.Options()
    options.autotune.enabled = False
    return dataset.with_options(options)
