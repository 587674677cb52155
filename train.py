"""Train the Siamese melanoma classifier.

    python train.py                             the 50/50 set, InceptionV3
    python train.py full-dataset full-model     every image, ResNet50
    python train.py --recipe margin             the margin system (triplet margin loss, ResNet50, MLP)
    python train.py --recipe tuned              what we found best on real lesions
    python train.py --fold all                  cross-validation, on a data set made with --folds 5
    python train.py mnist                       the warm-up on handwritten digits
    python train.py --weights none --epochs 2 --image-size 128     any value of Modules/config.py

Reads `datasets/balanced` (made from `datasets/smaller` where only that is there, from a synthetic demo where neither
is) and writes `checkpoints/`: best_epoch.keras (image -> probability of melanoma), best_epoch.json (every number),
report.html and MODEL_CARD.md, gallery.npz (the known lesions), figures/ and tensorboard/. `--resume` goes on with a run
that was cut off. `--distribute` has several GPUs or machines do stage 1 (Modules/distribution.py says how).
"""

from Modules import quiet  # noqa: F401, before TensorFlow

# isort: split
import argparse
import os
import re
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import tensorflow as tf

import modules
from dataset import image_batches, load_manifest, select, training_batches, vector_batches, view_batches
from Modules import baselines, cli, distribution, runtime, safe_model, state, tracking
from Modules.cli import UserError
from Modules.config import RECIPES, Recipe, add_options, demo, recipe_named, with_options
from Modules.data.manifest import LABELS
from Modules.demo import BALANCED, find_data, pretrained
from Modules.evaluation import assessment, calibration, cross_validation, evidence, html, report, scoring
from Modules.evaluation.metrics import PREVALENCE
from Modules.evaluation.validation import classifier_figures, embedding_figures, watch
from Modules.folds import identify, is_done, train_folds
from Modules.inference import optimised
from Modules.metric_learning.losses import make_loss, with_head
from Modules.metric_learning.pretraining import pretrain
from Modules.metric_learning.sampling import oversampled
from Modules.mnist import warm_up
from Modules.NeuralNetwork import NeuralNetwork, adam

WORDS = ("full-dataset", "full-model", "mnist")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(prog="train.py", description=__doc__)
    parser.add_argument("words", nargs="*", metavar="WORD", help=f"{', '.join(WORDS)}: in any order")
    parser.add_argument("--recipe", metavar="NAME", help=", ".join(RECIPES))
    parser.add_argument("--data", type=Path, help=f"a folder with a manifest.csv ({BALANCED})")
    parser.add_argument("--checkpoints", type=Path, help="where to write (checkpoints)")
    parser.add_argument("--weights", default="imagenet", help="imagenet, none, a file, or a folder of files")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (0)")
    parser.add_argument("--fold", metavar="K|all", help="test on fold K, train on the others; all: each in turn")
    parser.add_argument("--baseline", default="logistic", choices=baselines.BASELINES, help="what else to compare with")
    parser.add_argument("--on-collapse", default="stop", choices=("stop", "recover"), help="recover: at a lower rate")
    rules = ", ".join(calibration.RULES)
    parser.add_argument("--threshold-rule", default="half", metavar="RULE", help=f"{rules}: on validation (half)")
    parser.add_argument("--prevalence", type=float, default=PREVALENCE, help="share malignant in practice (0.0176)")
    parser.add_argument("--report-images", default="yes", choices=("yes", "no"), help="show pictures of the data")
    parser.add_argument("--precision", default="auto", choices=("auto", *runtime.PRECISIONS))
    parser.add_argument("--wandb", default="auto", choices=tracking.MODES)
    parser.add_argument("--verify", action="store_true", help="check the hash of every picture, not of a sample")
    parser.add_argument("--gallery-thumbnails", default="yes", choices=("yes", "no"), help="in gallery.npz (yes)")
    parser.add_argument("--resume", action="store_true", help="go on with the run that was cut off")
    parser.add_argument(
        "--distribute", default="none", choices=distribution.MODES, help="stage 1, over GPUs or machines"
    )
    parser.add_argument("--deterministic", action="store_true", help="no operation whose result depends on timing")
    add_options(parser)
    options = parser.parse_args(arguments)
    for word in options.words:
        if word not in WORDS:
            raise UserError(f"unknown word {word!r}: {cli.nearest(word, WORDS)}")
    if options.recipe and "full-model" in options.words:
        raise UserError("full-model chooses a recipe, and so does --recipe: give one of them")
    calibration.check(options.threshold_rule, options.prevalence)
    if options.fold not in (None, "all"):
        if not options.fold.isdigit():
            raise UserError(f"--fold {options.fold}: expected the number of a fold, or all")
        options.fold = int(options.fold)
    if not 0 <= options.seed < 2**32:
        raise UserError(f"--seed {options.seed}: expected 0 to {2**32 - 1}")
    if "mnist" in options.words:
        given = {name for name, value in vars(options).items() if value != parser.get_default(name)}
        if len(options.words) > 1 or given - {"words", "seed", "checkpoints", "resume"}:
            raise UserError("mnist has no recipe: it goes with --seed, --checkpoints and --resume alone")
    options.home = options.checkpoints or Path("checkpoints")  # of what folds share
    if options.checkpoints is None:
        single = isinstance(options.fold, int)
        inner = "mnist" if "mnist" in options.words else f"fold-{options.fold}" if single else ""
        options.checkpoints = options.home / inner
    return options


def train(
    options: argparse.Namespace, recipe: Recipe, data: Path, is_demo: bool, strategy: tf.distribute.Strategy
) -> None:
    # == Load: the splits, checked for leaks ===========================================================================
    full, seed, folder, stage = "full-dataset" in options.words, options.seed, options.checkpoints, recipe.embedding
    manifest = load_manifest(data, options.fold, options.verify)
    training = select(manifest, "train", full, external=recipe.data.external == "join")
    validation, test = select(manifest, "validation", full), select(manifest, "test", full=True)
    # With `refit` stages 1 and 2 have two rounds: from training, judged on validation; then from both, as long.
    rounds = {"": training}
    if recipe.data.refit:
        rounds["-refit"] = pd.concat([training, validation], ignore_index=True)
    identity = identify(options, recipe, data)
    chief, share = distribution.is_chief(strategy), distribution.share(strategy)
    if chief:
        runtime.claim(folder, options.resume)
    done = chief and options.resume and is_done(folder, identity, recipe)
    precision = runtime.set_precision(options.precision)
    alike = identity | {"recipe": asdict(recipe), "precision": precision, "resume": options.resume}
    if distribution.agree(strategy, alike, done):
        print(f"{folder} is done.")
        return
    runtime.set_seeds(seed, options.deterministic)
    runtime.keep_freed_memory()
    size = recipe.data.image_size
    print(f"Recipe {recipe.name}: {stage.backbone}, {size} x {size} pixels, seed {seed}")
    print(f"Images: {len(training)} training, {len(validation)} validation, {len(test)} test")

    # == Build: backbone -> dense -> unit length =======================================================================
    settings = stage.distance, stage.final_margin or None, stage.classification, stage.positives
    losses = {again: make_loss(stage.loss, stage.margin, *settings) for again in rounds}
    weights = pretrained(stage.backbone, options.weights, is_demo)
    with strategy.scope():
        embedding = modules.build_embedding(stage, size, weights)
    run = tracking.start(options.wandb, asdict(recipe), recipe.name) if chief else None
    stopwatch = runtime.Stopwatch()

    # == 0. Where there are external images with diagnoses: learn to tell those apart first ============================
    if recipe.data.external == "pretrain":
        external = manifest[manifest["split"] == "external"]
        pretrain(embedding, external, recipe, options.home, vars(options))
        stopwatch.lap("pretraining")
    start = modules.backbone_weights(embedding)

    # == 1. Metric learning: pull each class together, push the classes apart ==========================================
    # Validation is judged by what training ends with, so that its epochs compare under a schedule too.
    last = make_loss(stage.loss.split(",")[-1], stage.final_margin or stage.margin, *settings)
    judged = validation[validation["balanced"]].reset_index(drop=True)
    untrained, trained, networks = embedding.get_weights(), {}, {}
    for again, rows in rounds.items():
        embedding.set_weights(untrained)
        loss = losses[again]
        learner = with_head(embedding, loss, len(LABELS), seed)
        last.classes = loss.classes
        judge = tf.keras.Model(embedding.input, [embedding.output, learner.output])
        _, steps = training_batches(rows, recipe, seed, full, share=share)
        metric = networks["embedding" + again] = NeuralNetwork(
            learner,
            "embedding" + again,
            folder,
            loss,
            adam(stage.learning_rate, stage.weight_decay, stage.schedule, steps * stage.epochs),
            monitor="loss" if again else "val_loss",
            mode="min" if stage.keep == "best" else "last",
            metrics=loss.metrics,
            identity=identity,
        )
        print(f"Stage 1: {stage.loss} loss on {len(rows)} images, {steps} batches an epoch, {precision}")
        logged = tracking.callbacks(run, "embedding", folder, options.resume) if chief and not again else ()
        metric.fit(
            lambda epoch: training_batches(rows, recipe, seed, full, epoch, share)[0],
            steps,
            stage.epochs,
            lambda: embedding_figures(
                judge, image_batches(judged, recipe.data), judged, last, stage, recipe.data.batch_size
            ),
            stage.patience,
            options.resume,
            (loss.schedule(stage.epochs), *logged),
            watch(loss, stage.loss, stage.epochs),
            recover=options.on_collapse == "recover",
        )
        if again and metric.finished(0):
            print("The second round is given up: the model will be the first's.")
            break
        trained[again] = embedding.get_weights()  # of all workers
        if metric.finished(0):
            break
    stopwatch.lap("embedding")
    if not chief:
        print("Stage 1 is done; the chief does the rest.")
        return

    # == 2. Freeze it; train the classifier on its embeddings of augmented views =======================================
    # In float32 whatever the embedding was trained in: what is saved is what is measured.
    runtime.set_precision("float32")
    backbone = modules.build_backbone(stage, size, weights)
    for again, weights_ in trained.items():
        learned = rounds[again]
        frozen = modules.build_embedding(stage, size)
        frozen.set_weights(weights_)
        if stage.beside_original:
            frozen = modules.beside(frozen, backbone, stage.averaged_views == 1)
        frozen = modules.averaged(frozen, stage.averaged_views)
        ready = optimised(frozen)
        seen = learned.iloc[oversampled(learned["target"].to_numpy(), seed, 0)] if full else learned
        inputs = view_batches(seen, recipe.data, recipe.classifier.views, seed)
        views = recipe.classifier.views or 1
        vectors = scoring.embed(ready, inputs, views * len(seen), "views")[0]
        targets = np.tile(seen["target"].to_numpy(np.float32), views)
        held_out = scoring.embed(ready, image_batches(validation, recipe.data), len(validation), "validation")[0]

        _, steps = vector_batches(vectors, targets, recipe.classifier.batch_size, seed, views=views)
        classifier = networks["classifier" + again] = NeuralNetwork(
            modules.build_classifier(recipe.classifier, frozen.output_shape[-1]),
            "classifier" + again,
            folder,
            tf.keras.losses.BinaryCrossentropy(),
            adam(recipe.classifier.learning_rate),
            monitor="loss" if again else "val_loss",
            mode="min" if recipe.classifier.keep == "best" else "last",
            metrics=modules.classifier_metrics,
            identity=identity,
        )
        print(f"Stage 2: classifier on {len(vectors)} embeddings, {views} views of each image")
        classifier.fit(
            lambda epoch: vector_batches(vectors, targets, recipe.classifier.batch_size, seed, epoch, views)[0],
            steps,
            recipe.classifier.epochs,
            lambda: classifier_figures(classifier.model, held_out, validation["target"].to_numpy()),
            recipe.classifier.patience,
            options.resume,
            () if again else tracking.callbacks(run, "classifier", folder, options.resume),
        )
        if not again:
            logits = modules.logit_model(classifier.model).predict_on_batch(held_out)
    stopwatch.lap("classifier")

    # == The plain classifiers to beat, on the same split ==============================================================
    features = scoring.embed(backbone, image_batches(learned, recipe.data), len(learned), "baseline")[0]
    test_features = scoring.embed(backbone, image_batches(test, recipe.data), len(test), "baseline")[0]
    plain = {"logistic": baselines.logistic_regression(features, learned, test_features)}
    if options.baseline == "finetune":
        print("Baseline: the same backbone trained by cross-entropy")
        epochs, settings = networks["embedding"].epochs_done, vars(options) | {"identity": identity}
        plain["finetune"], networks["baseline"] = baselines.finetuned(
            learned, test, recipe, start, folder, full, epochs, settings
        )
    stopwatch.lap("baseline")

    # == 3. Calibrate and choose the threshold on validation; evaluate the test split, once, with the saved file =======
    line, threshold = assessment.decide(validation, logits, options.threshold_rule, options.prevalence)
    decided = {"config": asdict(recipe), "threshold": threshold, "calibration": line}
    new = folder / "unfinished"  # takes the place of the former results when all of it is there
    new.mkdir(exist_ok=True)
    modules.save(modules.join(frozen, classifier.model, (line["scale"], line["offset"])), new / "best_epoch.keras")
    model = modules.load(new / "best_epoch.keras")
    gallery, in_distribution = evidence.write_gallery(
        new / "gallery.npz",
        new / "best_epoch.keras",
        model,
        (learned, image_batches(learned, recipe.data)),
        (unseen := select(manifest, "validation", full=True), image_batches(unseen, recipe.data)),
        options.gallery_thumbnails == "yes",
    )
    results, probability, embeddings = assessment.assess(model, test, gallery, decided, options.prevalence)
    baseline = {name: scoring.evaluate_baseline(test, scores, options.prevalence) for name, scores in plain.items()}
    nearby = cross_validation.knn_share(embeddings, gallery)
    scores = {"probability": probability, "threshold": threshold, "knn": nearby, **plain}
    table = cross_validation.score_table(test, scores)
    table.to_csv(new / cross_validation.SCORES, index=False)
    stopwatch.lap("evaluation")

    # == 4. Write: every number, the figures, what W&B and TensorBoard show ============================================
    shown = {name: network for name, network in networks.items() if not name.endswith("-refit")}
    facts = {
        "identity": identity,
        "data": str(data),
        "fold": options.fold,
        "full_dataset": full,
        "seed": seed,
        **decided,
        "weights": options.weights if weights is not None else "none",
        "manifest_sha256": identity["data"],
        "command": runtime.command(),
        "sha256": safe_model.hashes(new / "best_epoch.keras"),
        "versions": runtime.versions(),
        "used": assessment.describe_data({"train": training, "validation": validation, "test": test}),
        "precision": precision,
        "deterministic": options.deterministic,
        "seconds": stopwatch.seconds,
        "history": {name: network.history for name, network in shown.items()},
        "rounds": len(trained),
        "refit_loss": {name: net.history["loss"] for name, net in networks.items() if name not in shown},
        "best_epoch": {name: network.best_epoch + 1 for name, network in shown.items()},
        "diagnosis": next((net.diagnosis.message for net in networks.values() if net.diagnosis), None),
        "recoveries": [line for network in networks.values() for line in network.recoveries],
        "threshold_rule": options.threshold_rule,
        "in_distribution": in_distribution,
        "validation": {name: network.best_figures() for name, network in shown.items()},
        **results,
        "baseline": baseline["logistic"],
        "baseline_finetune": baseline.get("finetune"),
        "difference": cross_validation.differences(table),
        "report_images": options.report_images,
    }
    report.write_json(new / "best_epoch.json", facts)
    state.publish(new, folder)

    sample = training.groupby("target").head(8).sort_values("target", kind="stable")
    pictures = [
        report.write_inputs(folder, sample, next(iter(view_batches(sample, recipe.data, 1, seed)))[0].numpy()),
        *report.write_curves(folder, {name: (net.history, net.best_epoch) for name, net in shown.items()}),
        *report.write_test_figures(folder, test, probability, embeddings, results, stage.final_margin or stage.margin),
    ]
    html.write_report(folder, facts, options.report_images == "yes")
    tracking.write_projector(folder / "tensorboard", embeddings, [LABELS[target] for target in test["target"]])
    for network in reversed(networks.values()):
        network.forget()  # nothing is left to resume
    print(report.summary(results["test"], "Test set, 50/50"))
    for name, result in baseline.items():
        print(report.summary(result["test"], f"On it, {cross_validation.SCORERS[name]}"))
    print(f"Wrote {folder}/best_epoch.keras and report.html in {stopwatch.total / 60:.1f} minutes.")
    print("Next: python predict.py")
    tracking.finish(run, {name: facts[name] for name in (*scoring.VIEWS, "diagnosis", "recoveries")}, pictures)


def main() -> None:
    options = parse()
    if "mnist" in options.words:
        warm_up(options.checkpoints, options.seed, options.resume)
        return
    named = recipe_named(options.recipe or ("full" if "full-model" in options.words else "lightweight"))
    recipe = with_options(named, vars(options))
    if recipe.data.refit and {recipe.embedding.keep, recipe.classifier.keep} != {"last"}:
        raise UserError("--refit true leaves no validation to choose an epoch on: --keep last --classifier-keep last")
    if options.distribute == "multiworker" and not (options.data or BALANCED).exists():
        raise UserError(
            f"--distribute multiworker makes no data set: name one with --data; no {options.data or BALANCED}"
        )
    data, is_demo = find_data(options.data)
    if is_demo:
        recipe = with_options(demo(named), vars(options))
    strategy = distribution.start(options.distribute)
    try:
        with distribution.losing_workers(strategy):
            if options.fold == "all":
                train_folds(options, recipe, data, strategy, train)
            else:
                train(options, recipe, data, is_demo, strategy)
    except tf.errors.OpError as error:
        if broken := re.search(r"ImageError: (.+)", str(error)):
            raise UserError(f"{broken[1]}; it was readable before: see --verify, then --resume") from None
        if full := next((text for text in map(os.strerror, cli.DISK) if text in str(error)), None):
            raise UserError(f"a file can't be written ({full}): make room, then --resume") from None
        raise


if __name__ == "__main__":
    cli.run(main)
