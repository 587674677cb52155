"""How each part of the work grows with the data: the measurements behind docs/scale.md.

    .venv/bin/python benchmarks/scale.py [--data datasets/balanced]

Each part runs at three sizes; its slope is that of log time against log size: 1 is linear, 2 quadratic. The first four
read the pictures of the data set, over and over; the others need numbers alone, and draw them: random hashes, patients
of 1 to 32 images, unit vectors of dimension 128. Eight minutes on 2 cores. The exit code is 1 if a slope misses its
limit.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from Modules import quiet  # noqa: E402, F401, before TensorFlow

# isort: split
import tensorflow as tf  # noqa: E402

import modules  # noqa: E402
from dataset import image_batches, load_manifest, training_batches  # noqa: E402
from Modules.cli import Parser, run  # noqa: E402
from Modules.config import Data, Embedding, Recipe  # noqa: E402
from Modules.data import duplicates, hashing, images, splits  # noqa: E402
from Modules.data.duplicates import SIDE, square  # noqa: E402
from Modules.evaluation import gallery, metrics, scoring  # noqa: E402
from Modules.metric_learning.losses import make_loss  # noqa: E402
from Modules.NeuralNetwork import NeuralNetwork, adam  # noqa: E402

REPEATS = 3  # of which the fastest counts: the machine may have other work
rng = np.random.default_rng(0)

# == The parts: a function of the size makes what is timed ===========================================================


def hashing_of(table: pd.DataFrame) -> Callable:
    """Scan and hash: what the search for duplicates does with each picture, but for its local features."""

    def make(n: int) -> Callable:
        files = np.resize(table["file"], n).tolist()

        def work() -> None:
            images.scan(files, progress=False)
            for file in files:
                hashing.phash(square(hashing.read_grey(file, SIDE)))

        return work

    return make


def near_copies_of(table: pd.DataFrame) -> Callable:
    """The whole search for copies that were changed, which generate_balanced_dataset.py makes; each picture once."""

    def make(n: int) -> Callable:
        files = table["file"][:n].tolist()
        return lambda: duplicates.near_duplicates(files)

    return make


def epoch_of(table: pd.DataFrame) -> Callable:
    """Read, augment and train on n pictures: MobileNet at 64 pixels, batches of 64."""
    recipe = Recipe("scale", Data(image_size=64, batch_size=64), Embedding(backbone="mobilenet"))
    loss = make_loss("semi-hard", 0.4)
    network = NeuralNetwork(
        modules.build_embedding(recipe.embedding, 64), "scale", Path("/nowhere"), loss, adam(1e-3), monitor="loss"
    )

    def make(n: int) -> Callable:
        rows = table.iloc[np.resize(np.arange(len(table)), n)].reset_index(drop=True)
        batches, steps = training_batches(rows, recipe, 0, full=True)
        return lambda: network.model.fit(batches, steps_per_epoch=steps, verbose=0)

    return make


def scoring_of(table: pd.DataFrame) -> Callable:
    """Read and embed n pictures with the same network."""
    model = modules.build_embedding(Embedding(backbone="mobilenet"), 64)

    def make(n: int) -> Callable:
        rows = table.iloc[np.resize(np.arange(len(table)), n)].reset_index(drop=True)
        return lambda: scoring.embed(model, image_batches(rows, Data(image_size=64, batch_size=64)), n, "scale")

    return make


def pairs(n: int) -> Callable:
    hashes = rng.integers(0, 2**64, n, np.uint64, endpoint=False)
    return lambda: hashing.close_pairs(hashes)


def split(n: int) -> Callable:
    group = np.repeat(np.arange(n), np.minimum(rng.geometric(0.15, n), 32))[:n].astype(str)
    table = pd.DataFrame({"group": group, "target": (rng.random(n) < 0.0176).astype(int)})
    return lambda: splits.assign_splits(table)


def loss(n: int) -> Callable:
    function = make_loss("semi-hard", 0.4)
    embeddings = tf.math.l2_normalize(tf.constant(rng.normal(size=(n, 128)), tf.float32), axis=1)
    labels = tf.constant(rng.integers(0, 2, n), tf.int32)

    @tf.function
    def step() -> tf.Tensor:
        with tf.GradientTape() as tape:
            tape.watch(embeddings)
            value = function(labels, embeddings)
        return tape.gradient(value, embeddings)

    return lambda: step().numpy()


def search(n: int) -> Callable:
    """32 pictures against a gallery of n."""
    known = rng.normal(size=(n, 128)).astype(np.float32)
    queries = known[:32] + 0.1
    return lambda: gallery.nearest_known(queries, {"embeddings": known}, 5)


def bootstrap(n: int) -> Callable:
    """All metrics with their intervals, 2000 resamples."""
    target = (rng.random(n) < 0.1).astype(int)
    probability = np.clip(0.3 * target + rng.random(n) * 0.7, 0, 1)
    return lambda: metrics.evaluate(target, probability, 0.5, np.arange(n) // 3)


# Name: (the part, its sizes, their unit, the steepest slope that keeps docs/scale.md true).
WITH_PICTURES = {
    "hashing": (hashing_of, (128, 1_024, 8_192), "pictures", 1.15),
    "near copies": (near_copies_of, (64, 256, 1_024), "pictures", 1.5),
    "epoch": (epoch_of, (256, 1_024, 2_048), "pictures", 1.15),
    "scoring": (scoring_of, (512, 2_048, 8_192), "pictures", 1.15),
}
DRAWN = {
    "pairs of hashes": (pairs, (16_000, 64_000, 256_000), "hashes", 2.1),
    "split": (split, (8_000, 32_000, 128_000), "images", 1.3),
    "loss": (loss, (256, 1_024, 4_096), "images in a batch", 2.4),
    "gallery search": (search, (16_000, 64_000, 256_000), "known lesions", 1.2),
    "bootstrap": (bootstrap, (1_000, 4_000, 16_000), "test images", 1.3),
}


def measure(make: Callable, sizes: tuple[int, ...]) -> list[float]:
    """Seconds at each size."""
    seconds = []
    for size in sizes:
        work, times = make(size), []
        for _ in range(REPEATS + 1):  # the first is warm-up
            start = time.perf_counter()
            work()
            times.append(time.perf_counter() - start)
        seconds.append(min(times[1:]))
    return seconds


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--data", type=Path, help="a data set (without one, the parts that need no pictures)")
    parser.add_argument("--peer-python", help="not needed: there is no peer")
    options = parser.parse_args()
    parts = dict(DRAWN)
    if options.data:
        table = load_manifest(options.data)
        table = table[table["split"].isin(("train", "validation", "test"))].reset_index(drop=True)
        parts = {name: (part(table), *rest) for name, (part, *rest) in WITH_PICTURES.items()} | parts
    holds = True
    for name, (make, sizes, unit, limit) in parts.items():
        seconds = measure(make, sizes)
        slope = np.polyfit(np.log(sizes), np.log(seconds), 1)[0]
        figures = [(f"{name}: slope", slope, limit)]
        figures += [(f"{name}: s at {size:,} {unit}", one, None) for size, one in zip(sizes, seconds, strict=True)]
        for figure, value, most in figures:
            good = None if most is None else bool(value <= most)
            holds &= good is not False
            line = {"benchmark": "scale", "figure": figure, "value": float(f"{value:.4g}"), "peer": None}
            line |= {"limit": most, "must": most and f"≤ {most}", "holds": good}
            print(json.dumps(line, ensure_ascii=False), flush=True)
    sys.exit(not holds)


if __name__ == "__main__":
    run(main)
