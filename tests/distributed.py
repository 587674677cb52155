"""`python distributed.py SETTINGS`, a JSON: a small network trained as train.py trains its embedding.

Writes the loss of every step, with the figures of the watch, to `output`; each worker to a file of its own.
"""

import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from Modules import quiet  # noqa: E402, F401, before TensorFlow

# isort: split
import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402

from dataset import load_manifest, select, training_batches  # noqa: E402
from Modules import NeuralNetwork as module  # noqa: E402
from Modules import cli, distribution, runtime  # noqa: E402
from Modules.config import Data, Embedding, Recipe  # noqa: E402
from Modules.metric_learning import losses  # noqa: E402

layers = tf.keras.layers


def network(norm: str, normalised: bool) -> tf.keras.Model:
    """Images [B, 16, 16, 3] -> embeddings [B, 8] of unit length, or [B, 8] where not `normalised`."""
    x = images = tf.keras.Input((16, 16, 3))
    x = layers.Rescaling(1 / 127.5, offset=-1.0)(x)
    x = layers.Conv2D(8, 3, strides=2, use_bias=False)(x)
    if norm != "none":
        layer = layers.BatchNormalization(momentum=0.5, synchronized=norm != "inference", trainable=norm != "inference")
        x = layer(x)
    x = layers.Dense(8)(layers.Flatten()(layers.ReLU()(x)))
    return tf.keras.Model(images, layers.UnitNormalization(axis=-1)(x) if normalised else x)


def main() -> None:
    given = json.loads(sys.argv[1])
    if devices := given.get("devices"):
        cpu = tf.config.list_physical_devices("CPU")[0]
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * devices)
    strategy = distribution.start(given["distribute"])
    worker = distribution.share(strategy).parts[0]
    if given.get("mine") == "replica":  # the weaker method, for comparison
        losses.gathered = lambda *tensors: tensors
    still = {"flips": False, "rotation": 0.0, "brightness": 0.0, "noise": 0.0}
    data = Data(image_size=16, batch_size=given["batch"], **(still if given.get("still", True) else {}))
    recipe = Recipe("test", data, Embedding(loss=given["loss"], positives=given.get("positives", "any")))
    table = select(load_manifest(Path(given["data"])), "train", full=True)
    share, results = distribution.share(strategy), {}

    for name in given["loss"].split("|"):
        recipe = replace(recipe, embedding=replace(recipe.embedding, loss=name.split("+")[0]))
        weight = 1.0 if "+" in name else 0.0
        loss = losses.make_loss(name.split("+")[0], 0.4, classification=weight, positives=recipe.embedding.positives)
        runtime.set_seeds(0)
        with strategy.scope():
            embedding = network(given.get("norm", "inference"), True)
        learner = losses.with_head(embedding, loss, 2, 0)
        metrics = (loss.metric_loss,) if weight else ()
        folder = Path(given["output"]).parent
        net = module.NeuralNetwork(
            learner,
            f"net-{len(results)}",
            folder,
            loss,
            module.adam(given.get("rate", 1e-3)),
            monitor="loss",
            mode="last",
            metrics=metrics,
        )
        if (kill := given.get("kill")) and kill[0] == worker:
            former = module._Epochs.on_train_batch_end

            def on_train_batch_end(self, batch, logs=None, former=former, net=net):
                if (net.epochs_done, net.step) == tuple(kill[1]):
                    os.kill(os.getpid(), getattr(signal, kill[2]))
                former(self, batch, logs)

            module._Epochs.on_train_batch_end = on_train_batch_end
        module.SAVE_EVERY = given.get("save_every", 600)
        with distribution.losing_workers(strategy):
            net.fit(
                lambda epoch, recipe=recipe: training_batches(table, recipe, 0, True, epoch, share)[0],
                given.get("steps", 1),
                given["epochs"],
                lambda learner=learner: {
                    "val_mean": float(np.mean(learner.predict(np.ones((4, 16, 16, 3)), verbose=0)))
                },
                resume=given.get("resume", False),
            )
        results[name] = net.history | {"weights": [float(np.abs(weight).sum()) for weight in learner.get_weights()]}
    Path(f"{given['output']}.{worker}").write_text(json.dumps(results))


if __name__ == "__main__":
    cli.run(main)
