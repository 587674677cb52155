"""Cross-validation: one run of train.py after another, each tested on its own fold, and their scores together."""

import json
from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import tensorflow as tf

from dataset import load_manifest
from Modules import runtime, state
from Modules.cli import UserError
from Modules.config import Recipe, without_length
from Modules.data.manifest import manifest_sha256
from Modules.distribution import is_chief
from Modules.evaluation import cross_validation, report


def identify(options: Namespace, recipe: Recipe, data: Path) -> dict:
    """What a run may not change when it goes on."""
    names = "fold", "seed", "weights", "deterministic", "baseline", "on_collapse"
    identity = {
        "recipe": asdict(without_length(recipe)),
        "data": manifest_sha256(data),
        "words": sorted(options.words),
        "precision": runtime.chosen_precision(options.precision),
        **{name: getattr(options, name) for name in names},
    }
    return json.loads(json.dumps(identity))  # as it will be read back: lists, no tuples


def is_done(folder: Path, identity: dict, recipe: Recipe) -> bool:
    """Whether the run in `folder` has ended, so that there is nothing to resume.

    Raises:
        UserError: a run has ended there, but another one, or one of another length.
    """
    file = folder / "best_epoch.json"
    if not file.exists() or state.unfinished(folder):
        return False
    try:
        facts = json.loads(file.read_text())
        former = facts["identity"], facts["config"]
    except (ValueError, KeyError, TypeError):
        former = None
    if former != (identity, json.loads(json.dumps(asdict(recipe)))):
        raise UserError(f"{folder} is of another run: resume with the same options, or replace it without --resume")
    return True


def train_folds(
    options: Namespace, recipe: Recipe, data: Path, strategy: tf.distribute.Strategy, train: Callable
) -> None:
    """`train` each fold in its own folder; the chief pools their scores."""
    folds = sorted(set(load_manifest(data, verify=options.verify)["fold"]) - {-1})
    if not folds:
        raise UserError(f"{data} has no folds: make it with generate_balanced_dataset.py --folds 5")
    home, done = options.checkpoints, []
    if is_chief(strategy) and not options.resume:
        for fold in folds:  # before any is trained anew
            runtime.refuse_unfinished(home / f"fold-{fold}")
    for fold in folds:
        one = Namespace(**vars(options) | {"fold": fold, "checkpoints": home / f"fold-{fold}"})
        print(f"== Fold {fold} of {len(folds)}")
        tf.keras.backend.clear_session()
        train(one, recipe, data, False, strategy)
        done.append(one.checkpoints)
    if not is_chief(strategy):
        return
    models = [json.loads((folder / "best_epoch.json").read_text())["sha256"] for folder in done]
    pooled = cross_validation.pool(done, options.prevalence) | {"models": models}
    report.write_json(home / "cross_validation.json", pooled)
    print(cross_validation.summary(pooled))
    print(f"Wrote {home}/cross_validation.json")
