"""`python distributed.py SETTINGS`, a JSON: small networks trained as train.py trains its embedding, by one worker.

SETTINGS has `jobs`, name: the values of JOB that differ. Writes the history of each and the size of every final weight
to OUTPUT.<worker>.
"""

import json
import os
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from Modules import quiet  # noqa: E402, F401, before TensorFlow

# isort: split
import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402

import modules  # noqa: E402
from dataset import load_manifest, select, training_batches  # noqa: E402
from Modules import NeuralNetwork as training  # noqa: E402
from Modules import cli, distribution, runtime  # noqa: E402
from Modules.config import Data, Embedding, Recipe  # noqa: E402
from Modules.metric_learning import losses  # noqa: E402

layers = tf.keras.layers
given = {"devices": 1, "kill": None, "resume": False} | json.loads(sys.argv[1])
JOB = {
    "loss": "semi-hard",
    "classification": 0.0,
    "positives": "any",
    "norm": "inference",  # BatchNorm; or training; or mobilenet: as in the network of train.py
    "mining": "global",  # or replica, the weaker method, to compare with
    "augment": False,
    "batch": 64,
    "epochs": 20,
    "steps": 1,  # an epoch; None: as many as there are
}
SIZE, RATE, CLASSES = 16, 1e-3, 2


def embedding_network(norm: str) -> tf.keras.Model:
    """Images [B, S, S, 3] -> embeddings [B, 8] of unit length."""
    if norm == "mobilenet":
        return modules.build_embedding(Embedding(backbone=norm, dense_units=(), embedding_size=8), 2 * SIZE)
    images = tf.keras.Input((SIZE, SIZE, 3))
    x = layers.Conv2D(8, 3, strides=2, use_bias=False)(layers.Rescaling(1 / 127.5, offset=-1.0)(images))
    trains = norm == "training"
    x = layers.BatchNormalization(momentum=0.5, synchronized=trains, trainable=trains)(x)
    x = layers.Dense(8)(layers.Flatten()(layers.ReLU()(x)))
    return tf.keras.Model(images, layers.UnitNormalization(axis=-1)(x))


def signal_at(worker: int, epoch: int, step: int, name: str) -> None:
    """Have that worker send itself a signal at that batch; the state is saved at every batch."""
    training.SAVE_EVERY = 0
    former = training._Epochs.on_train_batch_end

    def on_train_batch_end(self, batch, logs=None):
        if (self.network.epochs_done, self.network.step) == (epoch, step):
            os.kill(os.getpid(), getattr(signal, name))
        former(self, batch, logs)

    if worker == share.parts[0]:
        training._Epochs.on_train_batch_end = on_train_batch_end


def fit(name: str, job: dict, table, folder: Path) -> dict:
    still = {} if job["augment"] else {"flips": False, "rotation": 0.0, "brightness": 0.0, "noise": 0.0}
    size = (1 + (job["norm"] == "mobilenet")) * SIZE
    data = Data(image_size=size, batch_size=job["batch"], **still)
    recipe = Recipe("test", data, Embedding(positives=job["positives"]))
    loss = losses.make_loss(job["loss"], 0.4, classification=job["classification"], positives=job["positives"])
    losses.gathered = distribution.gathered if job["mining"] == "global" else lambda *tensors: tensors
    runtime.set_seeds(0)
    with strategy.scope():
        embedding = embedding_network(job["norm"])
    learner = losses.with_head(embedding, loss, CLASSES, 0)
    network = training.NeuralNetwork(
        learner,
        name,
        folder,
        loss,
        training.adam(RATE),
        monitor="loss",
        mode="last",
        metrics=loss.metrics,
    )
    probe = np.random.default_rng(0).uniform(0, 255, (4, size, size, 3))
    network.fit(
        lambda epoch: training_batches(table, recipe, 0, True, epoch, share)[0],
        job["steps"] or training_batches(table, recipe, 0, True, share=share)[1],
        job["epochs"],
        lambda: {"val_probe": float(np.abs(learner.predict(probe, verbose=0)).sum())},
        resume=given["resume"],
    )
    return network.history | {"weights": [float(np.abs(weights).sum()) for weights in learner.get_weights()]}


def main() -> None:
    global share, strategy
    if given["devices"] > 1:
        cpu = tf.config.list_physical_devices("CPU")[0]
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * given["devices"])
    strategy = distribution.start(given["distribute"])
    share = distribution.share(strategy)
    if given["kill"]:
        signal_at(*given["kill"])
    table = select(load_manifest(Path(given["data"])), "train", full=True)
    output = Path(given["output"])
    with distribution.losing_workers(strategy):
        results = {name: fit(name, JOB | job, table, output.parent) for name, job in given["jobs"].items()}
    output.with_suffix(f".{share.parts[0]}").write_text(json.dumps(results))


if __name__ == "__main__":
    cli.run(main)
