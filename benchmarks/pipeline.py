"""Images a second from files to augmented batches: ours beside bare decoding, Keras's layers and torchvision.

    .venv/bin/python benchmarks/pipeline.py [--peer-python PEER]      (benchmarks/loss.py says how to make PEER)

JPEGs of 256 x 256; flips, rotation, brightness and noise as in the recipe `lightweight`; batches of 32, all cores. Bare
decoding is OpenCV's in a thread a core, without batching. Keras's layers work on decoded batches of tf.data,
torchvision in a DataLoader with a worker a core. All but torchvision keep freed memory, as train.py does. Three minutes
on 2 cores with AMX.
"""

import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import common

COUNT, BATCH = 4096, 32


def ours(paths: list[Path]) -> dict:
    """Four ways through the same code: decoded for the first time, that from TFRecord, from memory, from a file."""
    from dataset import training_batches
    from Modules.config import recipe_named, with_options
    from Modules.data import cache, records

    recipe = with_options(recipe_named("lightweight"), {"batch_size": str(BATCH)})
    rows, folder = common.table(paths).assign(split="train"), paths[0].parent
    rows = rows.assign(path=[path.name for path in paths], home=str(folder), row=range(len(paths)))
    (folder / "manifest.csv").touch()
    records.write_table(folder, rows)
    shards = rows.assign(file=records.located(folder, rows["path"]))

    def batches(table=rows):
        return iter(training_batches(table, recipe, 0)[0])

    def epoch(stream) -> int:
        return sum(len(next(stream)[0]) for _ in range(COUNT // BATCH))

    def first(table) -> int:
        kept = dict(cache._memory), dict(cache._decoded)
        cache._memory.clear()
        cache._decoded.clear()
        count = epoch(batches(table))
        cache._memory.update(kept[0])
        cache._decoded.update(kept[1])
        return count

    free, cache.free_memory = cache.free_memory, lambda: 0
    file = batches()
    epoch(file)  # it is written, and checked
    cache.free_memory = free
    memory = batches()
    epoch(memory)
    return {
        "ours, first epoch": lambda: first(rows),
        "ours, first epoch, TFRecord": lambda: first(shards),
        "ours, from memory": lambda: epoch(memory),
        "ours, from a file": lambda: epoch(file),
    }


def bare(paths: list[Path]) -> int:
    import cv2

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return sum(1 for _ in pool.map(lambda path: cv2.imread(str(path), cv2.IMREAD_COLOR_RGB), paths))


def keras(paths: list[Path]):
    import tensorflow as tf

    layers = tf.keras.layers
    augment = tf.keras.Sequential(
        [
            layers.RandomFlip(),
            layers.RandomRotation(0.3),
            layers.RandomBrightness(0.2),
            layers.GaussianNoise(255 * 0.03),
        ]
    )
    files = tf.data.Dataset.from_tensor_slices([str(path) for path in paths])
    images = files.map(lambda file: tf.io.decode_jpeg(tf.io.read_file(file), 3), tf.data.AUTOTUNE).batch(BATCH)
    augmented = images.map(lambda batch: augment(tf.cast(batch, tf.float32), training=True), tf.data.AUTOTUNE)

    def epoch() -> int:
        return sum(len(batch) for batch in augmented.prefetch(2))

    return epoch


def torchvision(folder: str) -> dict:
    import torch
    from torchvision import io
    from torchvision.transforms import v2

    augment = v2.Compose(
        [
            v2.RandomHorizontalFlip(),
            v2.RandomVerticalFlip(),
            v2.RandomRotation(108, v2.InterpolationMode.BILINEAR),
            v2.ColorJitter(brightness=0.2),
            v2.ToDtype(torch.float32, scale=True),
            v2.GaussianNoise(sigma=0.03),
        ]
    )

    class Pictures(torch.utils.data.Dataset):
        paths = sorted(Path(folder).glob("*.jpg"))

        def __len__(self):
            return len(self.paths)

        def __getitem__(self, place):
            return augment(io.decode_image(str(self.paths[place]), io.ImageReadMode.RGB))

    loader = torch.utils.data.DataLoader(Pictures(), BATCH, num_workers=os.cpu_count(), persistent_workers=True)
    sum(len(batch) for batch in loader)  # the workers start
    return common.best({"speed": lambda: sum(len(batch) for batch in loader)}, 2)


def main() -> None:
    options = common.options(__doc__)
    from Modules import runtime

    runtime.keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        paths = common.files(folder, COUNT)
        speeds = common.best({"bare decoding": lambda: bare(paths), **ours(paths), "Keras layers": keras(paths)}, 5)
        if options.peer_python:
            speeds["torchvision"] = common.child(options.peer_python, "torchvision", folder)["speed"]
    for name, speed in speeds.items():
        print(f"{name:28}{speed:10.0f} images/s")
    limits = [
        ("ours, first epoch", "bare decoding", 0.3),
        ("ours, first epoch, TFRecord", "ours, first epoch", None),
        ("ours, first epoch", "Keras layers", None),
        ("ours, first epoch", "torchvision", None),
        ("ours, from memory", "bare decoding", 0.5),
        ("ours, from a file", "bare decoding", 0.5),
        ("ours, from memory", "Keras layers", 4),
        ("ours, from memory", "torchvision", 2),
    ]
    ratios = [(name, peer, speeds[name] / speeds[peer] if peer in speeds else None, at) for name, peer, at in limits]
    common.finish([common.figure("pipeline", f"{name} / {peer}", ratio, peer, at) for name, peer, ratio, at in ratios])


if __name__ == "__main__":
    common.start(main, {"torchvision": torchvision})
