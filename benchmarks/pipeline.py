"""Images a second from files to augmented batches: ours beside bare decoding, Keras's layers and torchvision.

    .venv/bin/python benchmarks/pipeline.py [--peer-python PEER]      (benchmarks/loss.py says how to make PEER)

JPEGs of 256 x 256; flips, rotation, brightness and noise as in the recipe `lightweight`; batches of 32, all cores. Bare
decoding is OpenCV's in a thread a core, without batching. Keras's layers work on decoded batches of tf.data,
torchvision in a DataLoader with a worker a core. Two minutes on 2 cores.
"""

import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import common

COUNT, BATCH = 4096, 32


def ours(paths: list[Path]) -> dict:
    """Three ways through the same code: decoded for the first time, from memory, from a file."""
    import hashlib

    from dataset import training_batches
    from Modules.config import recipe_named, with_options
    from Modules.data import cache

    recipe = with_options(recipe_named("lightweight"), {"batch_size": str(BATCH)})
    rows = common.table(paths)
    rows["path"], rows["sha256"] = [path.name for path in paths], hashlib.sha256(b"").hexdigest()

    def epoch() -> int:
        batches = training_batches(rows, recipe, 0)[0]
        return sum(len(images) for images, _ in batches.take(COUNT // BATCH))

    def first() -> int:
        cache._memory.clear()
        return epoch()

    def from_file() -> int:
        kept, free = dict(cache._memory), cache.free_memory
        cache._memory.clear()
        cache.free_memory = lambda: 0
        count = epoch()
        cache._memory.update(kept)
        cache.free_memory = free
        return count

    from_file()  # it is written
    return {"ours, first epoch": first, "ours, from memory": epoch, "ours, from a file": from_file}


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
    with tempfile.TemporaryDirectory() as folder:
        paths = common.files(folder, COUNT)
        speeds = common.best({"bare decoding": lambda: bare(paths), **ours(paths), "Keras layers": keras(paths)})
        if options.peer_python:
            speeds["torchvision"] = common.child(options.peer_python, "torchvision", folder)["speed"]
    for name, speed in speeds.items():
        print(f"{name:20}{speed:10.0f} images/s")
    limits = [
        ("ours, first epoch", "bare decoding", 0.3),
        ("ours, from memory", "bare decoding", 0.5),
        ("ours, from a file", "bare decoding", 0.5),
        ("ours, from memory", "Keras layers", 4),
        ("ours, from memory", "torchvision", 2),
    ]
    ratios = [(name, peer, speeds[name] / speeds[peer] if peer in speeds else None, at) for name, peer, at in limits]
    common.finish([common.figure("pipeline", f"{name} / {peer}", ratio, peer, at) for name, peer, ratio, at in ratios])


if __name__ == "__main__":
    common.start(main, {"torchvision": torchvision})
