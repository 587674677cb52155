"""Stage 0: the embedding learns the diagnoses of external images before it meets the lesions it is for.

Seven diagnoses make more of triplets than two classes do. The result depends on the external images and the recipe
alone, never on a split or the run's seed, so that its file is kept and used again by the runs that find it: the folds
of one checkpoint folder do, and others it can be copied to.
"""

import hashlib
import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import pandas as pd
import tensorflow as tf

from dataset import image_batches, training_batches
from Modules import distribution, runtime, state
from Modules.cli import UserError
from Modules.config import Recipe
from Modules.evaluation.validation import embedding_figures, watch
from Modules.metric_learning.losses import make_loss, with_head
from Modules.NeuralNetwork import NeuralNetwork, adam

SEED = 0
LOOKED_AT = 500  # images on which the collapse watch judges an epoch


def pretrain(embedding: tf.keras.Model, external: pd.DataFrame, recipe: Recipe, folder: Path, options: dict) -> str:
    """Train `embedding` in place on the diagnoses of `external`; the name of the file in `folder` that keeps it.

    Same loss, augmentation and schedule as stage 1. `options`: weights, resume and deterministic of the run.

    Raises:
        UserError: fewer than two diagnoses; another process is at it, or one was cut off and `resume` is not asked for;
            the collapse watch ended it.
    """
    diagnosis = external["diagnosis"].str.lower()
    known = external[diagnosis.notna()].reset_index(drop=True)
    codes, names = pd.factorize(diagnosis.dropna(), sort=True)
    if len(names) < 2:
        raise UserError(
            f"--external pretrain needs external images of two or more diagnoses, here are {len(names)}: make the data "
            "set with --external DIR, or use --external ignore"
        )
    stage = recipe.embedding
    facts = {
        "images": known["sha256"].tolist(),
        "diagnoses": codes.tolist(),
        "data": {name: value for name, value in asdict(recipe.data).items() if name != "refit"},
        "embedding": asdict(stage) | {"epochs": 0, "patience": 0, "averaged_views": 0, "beside_original": 0},
        "weights": options["weights"],
        "policy": tf.keras.mixed_precision.global_policy().name,
        "deterministic": options["deterministic"],
    }
    identity = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]
    file = folder / f"pretrained-{identity}.npz"
    strategy = embedding.distribute_strategy
    share = distribution.share(strategy)
    _, kept = distribution.from_chief(strategy, lambda: ({}, _read(file)))
    if kept:
        print(f"Stage 0: {file} has it already")
        try:
            embedding.set_weights(kept["weights"])
        except ValueError as error:
            raise _damaged(file, error) from None
        return file.name

    if distribution.is_chief(strategy):
        runtime.claim(folder, options["resume"])  # which the folds share
    loss = make_loss(
        stage.loss, stage.margin, stage.distance, stage.final_margin or None, stage.classification, stage.positives
    )
    table = known.assign(target=codes)
    # Each image once an epoch: with as many of every diagnosis the rarest would come by the dozen.
    recipe = replace(recipe, embedding=replace(stage, batches="shuffled"))
    _, steps = training_batches(table, recipe, SEED, share=share)
    network = NeuralNetwork(
        with_head(embedding, loss, len(names), SEED),
        f"pretraining-{identity}",
        folder,
        loss,
        adam(stage.learning_rate, stage.weight_decay, stage.schedule, steps * stage.pretrain_epochs),
        monitor="loss",
        mode="last",
    )
    print(f"Stage 0: {len(table)} external images of {len(names)} diagnoses, {steps} batches an epoch")
    judge = tf.keras.Model(embedding.input, [embedding.output, network.model.output])
    looked_at = table.sample(min(LOOKED_AT, len(table)), random_state=SEED).reset_index(drop=True)
    network.fit(
        lambda epoch: training_batches(table, recipe, SEED, start=epoch, share=share)[0],
        steps,
        stage.pretrain_epochs,
        lambda: embedding_figures(
            judge, image_batches(looked_at, recipe.data), looked_at, loss, stage, recipe.data.batch_size
        ),
        resume=options["resume"],
        callbacks=(loss.schedule(stage.pretrain_epochs),),
        watch=watch(loss, stage.loss, stage.pretrain_epochs),
    )
    if network.finished(0):
        network.forget()
        raise UserError(f"pretraining failed: {network.diagnosis.message}")
    weights = embedding.get_weights()  # of all workers
    if network.is_chief:
        partial = file.with_suffix(".partial")
        with open(partial, "wb") as stream:
            np.savez(stream, *weights)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(file)
        state.sync(folder)
    network.forget()
    return file.name


def _read(file: Path) -> dict[str, list[np.ndarray]]:
    """The weights that a former run kept, if one did."""
    if not file.is_file():
        return {}
    try:
        with np.load(file, allow_pickle=False) as saved:
            return {"weights": [saved[name] for name in saved.files]}
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        raise _damaged(file, error) from None


def _damaged(file: Path, error: Exception) -> UserError:
    return UserError(f"{file} is damaged ({error}): remove it to pretrain anew")
