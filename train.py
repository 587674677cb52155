"""Train the Siamese melanoma classifier.

    python train.py                             the 50/50 set, InceptionV3
    python train.py full-dataset full-model     every image, ResNet50
    python train.py --recipe margin             the margin system (triplet margin loss, ResNet50, MLP)
    python train.py mnist                       the warm-up on handwritten digits
    python train.py --weights none --epochs 2 --image-size 128     any value of Modules/config.py

Reads `datasets/balanced` (made from `datasets/smaller` where only that is there, from a synthetic demo where neither
is) and writes `checkpoints/`: best_epoch.keras (image -> probability of melanoma), best_epoch.json (every number),
gallery.npz (the known lesions), figures/ and tensorboard/. `--resume` goes on with a run that was cut off.
"""

from Modules import quiet  # noqa: F401, before TensorFlow

# isort: split
import argparse
import re
from dataclasses import asdict
from pathlib import Path

import numpy as np
import tensorflow as tf

import modules
from dataset import image_batches, load_manifest, select, training_batches, vector_batches, view_batches
from generate_balanced_dataset import generate
from Modules import cli, runtime, tracking
from Modules.cli import UserError
from Modules.config import RECIPES, Recipe, add_options, demo, recipe_named, with_options, without_length
from Modules.data.manifest import LABELS, manifest_sha256
from Modules.data.synthetic import write_dataset
from Modules.evaluation import evidence, report, scoring
from Modules.evaluation.validation import classifier_figures, embedding_figures, watch
from Modules.metric_learning.losses import make_loss, with_head
from Modules.metric_learning.sampling import oversampled
from Modules.mnist import warm_up
from Modules.NeuralNetwork import NeuralNetwork

WORDS = ("full-dataset", "full-model", "mnist")
DEMO_SIZE = 128  # pixels
BALANCED, SMALLER, DEMO = Path("datasets/balanced"), Path("datasets/smaller"), Path("datasets/demo")
THRESHOLD = 0.5  # training is balanced, so one half is where the two classes are equally likely


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(prog="train.py", description=__doc__)
    parser.add_argument("words", nargs="*", metavar="WORD", help=f"{', '.join(WORDS)}: in any order")
    parser.add_argument("--recipe", metavar="NAME", help=", ".join(RECIPES))
    parser.add_argument("--data", type=Path, help=f"a folder with a manifest.csv ({BALANCED})")
    parser.add_argument("--checkpoints", type=Path, help="where to write (checkpoints)")
    parser.add_argument("--weights", default="imagenet", help="imagenet, none, a file, or a folder of files")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (0)")
    parser.add_argument("--fold", type=int, help="test on this fold of the manifest, train on the others")
    parser.add_argument("--precision", default="auto", choices=("auto", *runtime.PRECISIONS))
    parser.add_argument("--wandb", default="auto", choices=tracking.MODES)
    parser.add_argument("--verify", action="store_true", help="check the hash of every picture, not of a sample")
    parser.add_argument("--gallery-thumbnails", default="yes", choices=("yes", "no"), help="in gallery.npz (yes)")
    parser.add_argument("--resume", action="store_true", help="go on with the run that was cut off")
    parser.add_argument("--deterministic", action="store_true", help="no operation whose result depends on timing")
    add_options(parser)
    options = parser.parse_args(arguments)
    for word in options.words:
        if word not in WORDS:
            raise UserError(f"unknown word {word!r}: {cli.nearest(word, WORDS)}")
    if options.recipe and "full-model" in options.words:
        raise UserError("full-model chooses a recipe, and so does --recipe: give one of them")
    if not 0 <= options.seed < 2**32:
        raise UserError(f"--seed {options.seed}: expected 0 to {2**32 - 1}")
    if "mnist" in options.words:
        given = {name for name, value in vars(options).items() if value != parser.get_default(name)}
        if len(options.words) > 1 or given - {"words", "seed", "checkpoints", "resume"}:
            raise UserError("mnist has no recipe: it goes with --seed, --checkpoints and --resume alone")
    if options.checkpoints is None:
        inner = "mnist" if "mnist" in options.words else "" if options.fold is None else f"fold-{options.fold}"
        options.checkpoints = Path("checkpoints") / inner
    return options


def find_data(folder: Path | None) -> tuple[Path, bool]:
    """The folder to train on, and whether it is the synthetic demo, which is made where there is no data set."""
    if folder is not None or BALANCED.exists():
        return folder or BALANCED, False
    if SMALLER.exists():
        print(f"No {BALANCED}: making it from {SMALLER}.")
        generate(SMALLER, BALANCED)
        return BALANCED, False
    print(f"Neither {BALANCED} nor {SMALLER} is there:")
    print(f"training on a synthetic demo in {DEMO}. Its pictures are drawn, not")
    print("photographed; its numbers say nothing about lesions.")
    if not (DEMO / "balanced").exists():
        generate(write_dataset(DEMO / "smaller", size=DEMO_SIZE), DEMO / "balanced", size=DEMO_SIZE)
    return DEMO / "balanced", True


def pretrained(backbone: str, weights: str, is_demo: bool) -> list[np.ndarray] | None:
    """The backbone's weights; the demo, and only the demo, goes on without ImageNet's where they can't be had."""
    try:
        return modules.pretrained(backbone, weights)
    except modules.DownloadError:
        if not is_demo:
            raise
        print(f"Warning: ImageNet weights of {backbone} can't be downloaded:")
        print("the demo starts from random ones.")
        return None


def train(options: argparse.Namespace, recipe: Recipe, data: Path, is_demo: bool) -> None:
    # == Load: the splits, checked for leaks ===========================================================================
    full, seed, folder, stage = "full-dataset" in options.words, options.seed, options.checkpoints, recipe.embedding
    manifest, manifest_hash = load_manifest(data, options.fold, options.verify), manifest_sha256(data)
    training, validation = select(manifest, "train", full), select(manifest, "validation", full)
    test = select(manifest, "test", full=True)
    runtime.claim(folder, options.resume)
    runtime.set_seeds(seed, options.deterministic)
    size = recipe.data.image_size
    print(f"Recipe {recipe.name}: {stage.backbone}, {size} x {size} pixels, seed {seed}")
    print(f"Images: {len(training)} training, {len(validation)} validation, {len(test)} test")

    # == Build: backbone -> dense -> unit length =======================================================================
    loss = make_loss(stage.loss, stage.margin, stage.distance, stage.final_margin or None)
    weights = pretrained(stage.backbone, options.weights, is_demo)
    precision = runtime.set_precision(options.precision)
    embedding = modules.build_embedding(stage, size, weights)
    learner = with_head(embedding, stage.loss, len(LABELS), seed)
    run = tracking.start(options.wandb, asdict(recipe), recipe.name)
    identity = {
        "recipe": asdict(without_length(recipe)),
        "data": manifest_hash,
        "words": sorted(options.words),
        **{name: getattr(options, name) for name in ("fold", "seed", "weights", "precision", "deterministic")},
    }
    stopwatch = runtime.Stopwatch()

    # == 1. Metric learning: pull each class together, push the classes apart ==========================================
    # Validation is judged by what training ends with, so that its epochs compare under a schedule too.
    last = make_loss(stage.loss.split(",")[-1], stage.final_margin or stage.margin, stage.distance)
    judged = validation[validation["balanced"]].reset_index(drop=True)
    judge = tf.keras.Model(embedding.input, [embedding.output, learner.output])
    _, steps = training_batches(training, recipe, seed, full)
    metric = NeuralNetwork(learner, "embedding", folder, loss, stage.learning_rate, identity=identity)
    print(f"Stage 1: {stage.loss} loss, {steps} batches an epoch, {precision}")
    metric.fit(
        lambda epoch: training_batches(training, recipe, seed, full, epoch)[0],
        steps,
        stage.epochs,
        lambda: embedding_figures(
            judge, image_batches(judged, recipe.data), judged, last, stage, recipe.data.batch_size
        ),
        stage.patience,
        options.resume,
        (loss.schedule(stage.epochs), *tracking.callbacks(run, "embedding", folder, options.resume)),
        watch(loss, stage.loss),
    )
    stopwatch.lap("embedding")

    # == 2. Freeze it; train the classifier on its embeddings of augmented views =======================================
    # In float32 whatever the embedding was trained in: what is saved is what is measured.
    runtime.set_precision("float32")
    frozen = modules.build_embedding(recipe.embedding, size)
    frozen.set_weights(embedding.get_weights())
    seen = training.iloc[oversampled(training["target"].to_numpy(), seed, 0)] if full else training
    views = recipe.classifier.views
    vectors = scoring.embed(frozen, view_batches(seen, recipe.data, views, seed), views * len(seen), "views")[0]
    targets = np.tile(seen["target"].to_numpy(np.float32), views)
    held_out = scoring.embed(frozen, image_batches(validation, recipe.data), len(validation), "validation")[0]

    _, steps = vector_batches(vectors, targets, recipe.classifier.batch_size, seed)
    classifier = NeuralNetwork(
        modules.build_classifier(recipe.classifier, recipe.embedding.embedding_size),
        "classifier",
        folder,
        tf.keras.losses.BinaryCrossentropy(),
        recipe.classifier.learning_rate,
        metrics=modules.classifier_metrics(),
        identity=identity,
    )
    print(f"Stage 2: classifier on {len(vectors)} embeddings, {views} views of each image")
    classifier.fit(
        lambda epoch: vector_batches(vectors, targets, recipe.classifier.batch_size, seed, epoch)[0],
        steps,
        recipe.classifier.epochs,
        lambda: classifier_figures(classifier.model, held_out, validation["target"].to_numpy()),
        recipe.classifier.patience,
        options.resume,
        tracking.callbacks(run, "classifier", folder, options.resume),
    )
    stopwatch.lap("classifier")

    # == The plain classifier to beat: frozen features and logistic regression, on the same split ======================
    backbone = modules.build_backbone(stage, size, weights)
    features = scoring.embed(backbone, image_batches(training, recipe.data), len(training), "baseline")[0]
    test_features = scoring.embed(backbone, image_batches(test, recipe.data), len(test), "baseline")[0]
    baseline = scoring.logistic_baseline(features, training, test_features, test, THRESHOLD)
    stopwatch.lap("baseline")

    # == 3. Evaluate the test split, once, with the saved file =========================================================
    new = folder / "unfinished"  # takes the place of the former results when all of it is there
    new.mkdir(exist_ok=True)
    modules.save(modules.join(frozen, classifier.model), new / "best_epoch.keras")
    model = modules.load(new / "best_epoch.keras")
    gallery, in_distribution = evidence.write_gallery(
        new / "gallery.npz",
        new / "best_epoch.keras",
        model,
        (training, image_batches(training, recipe.data)),
        (unseen := select(manifest, "validation", full=True), image_batches(unseen, recipe.data)),
        options.gallery_thumbnails == "yes",
    )
    probability, embeddings = scoring.score(model, image_batches(test, recipe.data), len(test), "test")
    results = scoring.evaluate_split(test, probability, embeddings, gallery, THRESHOLD)
    stopwatch.lap("evaluation")

    # == 4. Write: every number, the figures, what W&B and TensorBoard show ============================================
    networks = {"embedding": metric, "classifier": classifier}
    facts = {
        "data": str(data),
        "fold": options.fold,
        "full_dataset": full,
        "seed": seed,
        "config": asdict(recipe),
        "weights": options.weights if weights is not None else "none",
        "manifest_sha256": manifest_hash,
        "versions": runtime.versions(),
        "precision": precision,
        "deterministic": options.deterministic,
        "seconds": stopwatch.seconds,
        "history": {name: network.history for name, network in networks.items()},
        "best_epoch": {name: network.best_epoch + 1 for name, network in networks.items()},
        "diagnosis": metric.diagnosis and metric.diagnosis.message,
        "threshold": THRESHOLD,
        "calibration": None,
        "in_distribution": in_distribution,
        "validation": {name: network.best_figures() for name, network in networks.items()},
        **results,
        "baseline": baseline,
    }
    report.write_json(new / "best_epoch.json", facts)
    for file in new.iterdir():
        file.replace(folder / file.name)
    new.rmdir()
    for network in reversed(networks.values()):
        network.file.unlink()  # nothing is left to resume

    sample = training.groupby("target").head(8).sort_values("target", kind="stable")
    pictures = [
        report.write_inputs(folder, sample, next(iter(view_batches(sample, recipe.data, 1, seed)))[0].numpy()),
        *report.write_curves(folder, {name: (net.history, net.best_epoch) for name, net in networks.items()}),
        *report.write_test_figures(folder, test, probability, embeddings, results["test"], stage.margin),
    ]
    tracking.write_projector(folder / "tensorboard", embeddings, [LABELS[target] for target in test["target"]])
    print(report.summary(results["test"], "Test set, 50/50"))
    print(report.summary(baseline["test"], "The plain classifier (frozen features) on it"))
    print(f"Wrote {folder}/best_epoch.keras and figures/ in {stopwatch.total / 60:.1f} minutes.")
    print("Next: python predict.py")
    tracking.finish(run, results, pictures)


def main() -> None:
    options = parse()
    if "mnist" in options.words:
        warm_up(options.checkpoints, options.seed, options.resume)
        return
    named = recipe_named(options.recipe or ("full" if "full-model" in options.words else "lightweight"))
    recipe = with_options(named, vars(options))
    data, is_demo = find_data(options.data)
    if is_demo:
        recipe = with_options(demo(named), vars(options))
    try:
        train(options, recipe, data, is_demo)
    except tf.errors.OpError as error:
        if broken := re.search(r"ImageError: (.+)", str(error)):
            raise UserError(f"{broken[1]}; it was readable before: see --verify, then --resume") from None
        raise


if __name__ == "__main__":
    cli.run(main)
