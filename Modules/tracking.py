"""Weights & Biases and TensorBoard: every epoch's figures of both stages, the final metrics and the pictures.

`auto` is online where a key is configured, else offline into `wandb/`: without a key nothing leaves the machine.
"""

import os
import shutil
from pathlib import Path

import numpy as np
import tensorflow as tf

from Modules.cli import UserError

PROJECT = "siamese-melanoma-classifier"
MODES = ("auto", "online", "offline", "disabled")


def start(mode: str, config: dict, name: str):
    """A W&B run with one axis of epochs for each stage; `mode` is one of MODES.

    Raises:
        UserError: `online` without a key.
    """
    os.environ.setdefault("WANDB_SILENT", "true")
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # W&B reports its own crashes, key or no key
    import wandb

    if mode == "online" and not wandb.api.api_key:
        raise UserError("--wandb online needs a key: run `wandb login` first, or use --wandb offline")
    if mode == "auto":
        mode = os.environ.get("WANDB_MODE") or ("online" if wandb.api.api_key else "offline")
    settings = {"project": PROJECT, "name": name, "config": config, "settings": wandb.Settings(console="off")}
    try:
        run = wandb.init(mode=mode, **settings)
    except wandb.errors.CommError:
        print("Warning: Weights & Biases can't be reached; the run is kept in wandb/ instead.")
        run = wandb.init(mode="offline", **settings)
    for stage in ("embedding", "classifier"):
        run.define_metric(f"{stage}/epoch")
        run.define_metric(f"{stage}/*", step_metric=f"{stage}/epoch")
    return run


def callbacks(run, stage: str, folder: Path, resume: bool) -> tuple:
    """What puts a stage's epochs into W&B and TensorBoard."""
    curves = folder / "tensorboard" / stage
    if not resume:
        shutil.rmtree(curves, ignore_errors=True)  # a former run's would be drawn over these
    board = tf.keras.callbacks.TensorBoard(str(curves), write_graph=False)
    return _LogEpochs(run, stage), board


class _LogEpochs(tf.keras.callbacks.Callback):
    """Logs an epoch's figures as `stage/name`; `WandbMetricsLogger` has one axis of epochs, and two stages need two."""

    def __init__(self, run, stage: str):
        super().__init__()
        self.run, self.stage = run, stage

    def on_epoch_end(self, epoch, logs=None):
        self.run.log({f"{self.stage}/epoch": epoch + 1} | {f"{self.stage}/{key}": value for key, value in logs.items()})


def finish(run, results: dict, figures: list[Path]) -> None:
    """Put the final metrics into the run's summary, its figures into its media, and close it."""
    import wandb

    run.summary.update(results)
    run.log({f"figures/{path.stem}": wandb.Image(str(path)) for path in figures})
    run.finish()


def write_projector(folder: Path, embeddings: np.ndarray, labels: list[str]) -> None:
    """Lay embeddings [N, D] and their labels out for TensorBoard's embedding projector."""
    from tensorboard.plugins import projector

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "labels.tsv").write_text("\n".join(labels) + "\n")
    checkpoint = tf.train.Checkpoint(embedding=tf.Variable(embeddings))
    checkpoint.save(str(folder / "embedding.ckpt"))
    config = projector.ProjectorConfig()
    entry = config.embeddings.add()
    entry.tensor_name = "embedding/.ATTRIBUTES/VARIABLE_VALUE"
    entry.metadata_path = "labels.tsv"
    projector.visualize_embeddings(str(folder), config)
