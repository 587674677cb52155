"""Images a second in training: whole epochs, files to weights, beside the same step on a batch in memory and PyTorch.

    .venv/bin/python benchmarks/training.py [--peer-python PEER]      (benchmarks/loss.py says how to make PEER)

InceptionV3 and ResNet50 at 256 x 256 in batches of 32, random weights, the recipe's semi-hard triplets, Adam. Ours is
the training of train.py's stage 1, with augmentation, callbacks and the file of state after each epoch, on pictures
that the first epoch has decoded; after it comes the bare step of the same network on one batch in memory. PyTorch
steps on one batch in memory: torchvision's model, channels_last, autocast, pytorch-metric-learning's miner and loss.
Each has run a step before it is timed. In float32 and in what `--precision auto` takes here, each network in a process
of its own; the best epoch, or step, counts. Below each, the five kinds of operation that take most of a step's time on
the CPU.

20 minutes on 2 cores with AMX; --backbone takes one.
"""

import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import common

BACKBONES = "inception_v3", "resnet50"
BATCH, STEPS, TURNS = 32, 12, 2


def ours(backbone: str, precision: str) -> dict:
    from Modules import quiet, runtime  # noqa: F401

    # isort: split
    import tensorflow as tf

    import modules
    from dataset import training_batches
    from Modules.config import Embedding, recipe_named, with_options
    from Modules.metric_learning.losses import make_loss
    from Modules.NeuralNetwork import NeuralNetwork, adam

    runtime.set_seeds(0)
    runtime.keep_freed_memory()
    runtime.set_precision(precision)
    recipe = with_options(recipe_named("lightweight"), {"batch_size": str(BATCH)})
    with tempfile.TemporaryDirectory() as folder:
        rows = common.table(common.files(folder, BATCH * STEPS))
        model = modules.build_embedding(Embedding(backbone=backbone), common.SIZE)
        stage = recipe.embedding
        loss = make_loss(stage.loss, stage.margin, stage.distance)
        network = NeuralNetwork(model, "embedding", Path(folder), loss, adam(stage.learning_rate), "loss")

        def batches(epoch: int) -> tf.data.Dataset:
            return training_batches(rows, recipe, 0, start=epoch)[0]

        ends = []
        clock = tf.keras.callbacks.LambdaCallback(on_epoch_end=lambda *_: ends.append(time.perf_counter()))
        network.fit(batches, STEPS, 1 + TURNS, callbacks=(clock,))
        held = tf.data.Dataset.from_tensors(next(iter(batches(0)))).repeat()
        stream, step = iter(held), model.make_train_function()

        def memory() -> int:
            for _ in range(STEPS):
                step(stream)
            return BATCH * STEPS

        step(stream)
        epochs = max(BATCH * STEPS / (end - start) for start, end in pairwise(ends))
        return {
            "files": epochs,
            **common.best({"memory": memory}, TURNS),
            "shares": shares_of_operations(lambda: step(stream)),
        }


def shares_of_operations(step: Callable[[], object]) -> dict[str, float]:
    """The five kinds of operation that take most time of a step on the CPU's threads, and their shares of all."""
    import tensorflow as tf
    from tensorflow.tsl.profiler.protobuf.xplane_pb2 import XSpace

    with tempfile.TemporaryDirectory() as folder:
        with tf.profiler.experimental.Profile(folder):
            step()
        (file,) = Path(folder).rglob("*.xplane.pb")
        space = XSpace.FromString(file.read_bytes())
    seconds = Counter()
    for plane in space.planes:
        for event in (event for line in plane.lines for event in line.events):
            # An operation is called `name:kind`; the profile also has functions of C++, and whole steps.
            name = plane.event_metadata[event.metadata_id].name
            if kind := re.fullmatch(r"[^:]+:(?:_MklNative|_Mkl)?([A-Z]\w+)", name):
                seconds[kind[1]] += event.duration_ps
    return {kind: value / seconds.total() for kind, value in seconds.most_common(5)}


def pytorch(backbone: str, precision: str) -> dict:
    import torch
    import torchvision
    from pytorch_metric_learning.losses import TripletMarginLoss
    from pytorch_metric_learning.miners import TripletMarginMiner

    without = {"aux_logits": False, "init_weights": False} if backbone == "inception_v3" else {}
    model = getattr(torchvision.models, backbone)(weights=None, **without)
    model.fc = torch.nn.Sequential(torch.nn.Linear(2048, 256), torch.nn.ReLU(), torch.nn.Linear(256, 128))
    model = model.to(memory_format=torch.channels_last)
    loss, miner = TripletMarginLoss(0.4), TripletMarginMiner(0.4, type_of_triplets="semihard")
    optimizer = torch.optim.Adam(model.parameters())
    images = torch.rand(BATCH, 3, common.SIZE, common.SIZE).contiguous(memory_format=torch.channels_last)
    labels = torch.arange(BATCH) % 2

    def step() -> int:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            embeddings = model(images)
        embeddings = torch.nn.functional.normalize(embeddings.float())
        loss(embeddings, labels, miner(embeddings, labels)).backward()
        optimizer.step()
        return BATCH

    step()
    return common.best({"memory": step}, STEPS)


def main() -> None:
    options = common.options(__doc__, backbone={"choices": BACKBONES})
    figures = []
    print(f"{'images/s':24}{'files':>10}{'memory':>10}{'PyTorch':>10}")
    for backbone in [options.backbone] if options.backbone else BACKBONES:
        files, peers = {}, {}
        for precision in common.precisions():
            found = common.child(sys.executable, "ours", backbone, precision)
            files[precision], name = found["files"], f"{backbone}, {precision}"
            if options.peer_python:
                peers[precision] = common.child(options.peer_python, "pytorch", backbone, precision)["memory"]
            print(f"{name:24}{found['files']:10.2f}{found['memory']:10.2f}{peers.get(precision, 0):10.2f}", flush=True)
            print("   ", ", ".join(f"{kind} {share:.0%}" for kind, share in found["shares"].items()), flush=True)
            ratio = found["files"] / found["memory"]
            figures.append(common.figure("training", f"{name}: epoch / step in memory", ratio, "the same step", 0.95))
        ratio = max(files.values()) / max(peers.values()) if peers else None
        figures.append(
            common.figure("training", f"{backbone}: epoch / PyTorch, each at its best", ratio, "PyTorch", 1.1)
        )
    common.finish(figures)


if __name__ == "__main__":
    common.start(main, {"ours": ours, "pytorch": pytorch})
