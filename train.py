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
from dataclasses import asdict
from pathlib import Path

import numpy as np
import tensorflow as tf

import modules
from dataset import image_batches, load_manifest, select, training_batches, vector_batches, view_batches
from generate_balanced_dataset import generate
from Modules import cli, runtime, tracking
from Modules.cli import UserError
from Modules.config import RECIPES, Recipe, add_options, demo, recipe_named, with_options
from Modules.data.manifest import LABELS, manifest_sha256
from Modules.data.synthetic import write_dataset
from Modules.evaluation import report, scoring
from Modules.metric_learning.losses import make_loss, with_head
from Modules.metric_learning.mnist import warm_up
from Modules.metric_learning.sampling import oversampled
from Modules.metric_learning.validation import classifier_figures, embedding_figures, watch
from Modules.NeuralNetwork import NeuralNetwork

WORDS = ("full-dataset", "full-model", "mnist")
BALANCED, SMALLER, DEMO = Path("datasets/balanced"), Path("datasets/smaller"), Path("datasets/demo")
THRESHOLD = 0.5  # training is balanced, so one half is where the two classes are equally likely

FALSE_ALARMS = 0.02  # share of validation images that may be called unlike anything known


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(prog="train.py", description=__doc__)
    parser.add_argument("words", nargs="*", metavar="WORD", help=f"{', '.join(WORDS)}: in any order")
    parser.add_argument("--recipe", metavar="NAME", help=", ".join(RECIPES))
    parser.add_argument("--data", type=Path, help=f"a folder with a manifest.csv ({BALANCED})")
    parser.add_argument("--checkpoints", type=Path, help="where to write (checkpoints)")
    parser.add_argument("--weights", default="imagenet", help="imagenet, none, a file, or a folder of files")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fold", type=int, help="test on this fold of the manifest, train on the others")
    parser.add_argument("--precision", default="auto", help="auto, float32, bfloat16 or float16")
    parser.add_argument("--wandb", default="auto", help="auto, online, offline or disabled")
    parser.add_argument("--verify", action="store_true", help="check the hash of every picture, not of a sample")
    parser.add_argument("--resume", action="store_true", help="go on with the run that was cut off")
    parser.add_argument("--deterministic", action="store_true", help="no operation whose result depends on timing")
    add_options(parser)
    options = parser.parse_args(arguments)
    for word in options.words:
        if word not in WORDS:
            raise UserError(f"unknown word {word!r}: {cli.nearest(word, WORDS)}")
    if options.recipe and "full-model" in options.words:
        raise UserError("full-model chooses a recipe, and so does --recipe: give one of them")
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
    print(f"Neither {BALANCED} nor {SMALLER}: training on a synthetic demo in {DEMO}.")
    print("Its pictures are drawn, not photographed: its numbers say nothing about lesions.")
    if not (DEMO / "balanced").exists():
        generate(write_dataset(DEMO / "smaller"), DEMO / "balanced")
    return DEMO / "balanced", True


def pretrained(backbone: str, weights: str, is_demo: bool) -> list[np.ndarray] | None:
    """The backbone's weights; the demo, and only the demo, goes on without ImageNet's where they can't be had."""
    try:
        return modules.pretrained(backbone, weights)
    except UserError as error:
        if not (is_demo and weights == "imagenet"):
            raise
        print(f"Warning: {str(error).split('.')[0]}; the demo starts from random ones.")
        return None


def train(options: argparse.Namespace, recipe: Recipe, data: Path, is_demo: bool) -> None:
    # == Load: the splits, checked for leaks ===========================================================================
    full, seed, folder = "full-dataset" in options.words, options.seed, options.checkpoints
    manifest = load_manifest(data, options.fold, options.verify)
    training, validation = select(manifest, "train", full), select(manifest, "validation", full)
    test = select(manifest, "test", full=True)
    runtime.claim(folder, options.resume)
    runtime.set_seeds(seed, options.deterministic)
    precision = runtime.set_precision(options.precision)
    size = recipe.data.image_size
    print(f"Recipe {recipe.name}: {recipe.embedding.backbone}, {size} x {size} pixels, {precision}, seed {seed}")
    print(f"Images: {len(training)} training, {len(validation)} validation, {len(test)} test")

    # == Build: backbone -> dense -> unit length; and the plain classifier to beat =====================================
    stage = recipe.embedding
    weights = pretrained(stage.backbone, options.weights, is_demo)
    embedding = modules.build_embedding(stage, size, weights)
    loss = make_loss(stage.loss, stage.margin, stage.distance, stage.final_margin or None)
    learner = with_head(embedding, stage.loss, len(LABELS), seed)
    run = tracking.start(options.wandb, asdict(recipe), recipe.name)
    stopwatch = runtime.Stopwatch()
    features = tf.keras.Model(embedding.input, embedding.get_layer("features").output)
    baseline = scoring.logistic_baseline(
        scoring.embed(features, image_batches(training, recipe.data), len(training), "baseline")[0],
        training,
        scoring.embed(features, image_batches(test, recipe.data), len(test), "baseline")[0],
        test,
        THRESHOLD,
    )
    stopwatch.lap("baseline")

    # == 1. Metric learning: pull each class together, push the classes apart ==========================================
    judged = validation[validation["balanced"]].reset_index(drop=True)
    judge = tf.keras.Model(embedding.input, [embedding.output, learner.output])
    _, steps = training_batches(training, recipe, seed, full)
    metric = NeuralNetwork(learner, "embedding", folder, loss, stage.learning_rate)
    metric.fit(
        lambda epoch: training_batches(training, recipe, seed, full, epoch)[0],
        steps,
        stage.epochs,
        lambda: embedding_figures(
            judge, image_batches(judged, recipe.data), judged, loss, stage, recipe.data.batch_size
        ),
        stage.patience,
        options.resume,
        (loss.schedule(stage.epochs), *tracking.callbacks(run, "embedding", folder)),
        watch(stage),
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
    )
    classifier.fit(
        lambda epoch: vector_batches(vectors, targets, recipe.classifier.batch_size, seed, epoch)[0],
        steps,
        recipe.classifier.epochs,
        lambda: classifier_figures(classifier.model, held_out, validation["target"].to_numpy()),
        recipe.classifier.patience,
        options.resume,
        tracking.callbacks(run, "classifier", folder),
    )
    stopwatch.lap("classifier")

    # == 3. Evaluate the test split, once, with the saved file =========================================================
    file = folder / "best_epoch.keras"
    modules.save(modules.join(frozen, classifier.model), file)
    model = modules.load(file)
    _, known = scoring.score(model, image_batches(training, recipe.data), len(training), "gallery")
    scoring.write_gallery(folder / "gallery.npz", training, known)
    gallery = scoring.read_gallery(folder / "gallery.npz")
    nearest = scoring.nearest_known(held_out, gallery, 1)[1]
    probability, embeddings = scoring.score(model, image_batches(test, recipe.data), len(test), "test")
    results = scoring.evaluate_split(test, probability, embeddings, gallery, THRESHOLD)
    for result in results.values():
        result["embedding"]["collapsed"] = metric.diagnosis is not None and metric.diagnosis.kind == "collapse"
    stopwatch.lap("evaluation")

    # == 4. Write: every number, the figures, what W&B and TensorBoard show ============================================
    networks = {"embedding": metric, "classifier": classifier}
    report.write_json(
        folder / "best_epoch.json",
        {
            "data": str(data),
            "fold": options.fold,
            "full_dataset": full,
            "seed": seed,
            "config": asdict(recipe),
            "weights": options.weights if weights is not None else "none",
            "manifest_sha256": manifest_sha256(data),
            "versions": runtime.versions(),
            "precision": precision,
            "deterministic": options.deterministic,
            "seconds": stopwatch.seconds,
            "history": {stage: network.history for stage, network in networks.items()},
            "best_epoch": {stage: network.best_epoch + 1 for stage, network in networks.items()},
            "threshold": THRESHOLD,
            "calibration": None,
            "in_distribution": {"lowest_similarity": float(np.quantile(nearest, FALSE_ALARMS))},
            "validation": {
                stage: {name: values[network.best_epoch] for name, values in network.history.items() if "val_" in name}
                for stage, network in networks.items()
            },
            **results,
            "baseline": baseline,
        },
    )
    sample = training.groupby("target").head(8)
    pictures = [
        report.write_inputs(folder, sample, next(iter(view_batches(sample, recipe.data, 1, seed)))[0].numpy()),
        *report.write_curves(folder, {stage: (net.history, net.best_epoch) for stage, net in networks.items()}),
        *report.write_test_figures(folder, test, probability, embeddings, results["test"], recipe.embedding.margin),
    ]
    tracking.write_projector(folder / "tensorboard" / "test", embeddings, [LABELS[target] for target in test["target"]])
    tracking.finish(run, results, pictures)
    for network in networks.values():
        network.file.unlink()  # nothing is left to resume
    print(report.summary(results["test"], "Test set, 50/50"))
    print(report.summary(baseline["test"], "The plain classifier on it (frozen features, logistic regression)"))
    print(f"Wrote {file} and its figures in {stopwatch.total / 60:.1f} minutes; next: python predict.py")


def main() -> None:
    options = parse()
    if "mnist" in options.words:
        warm_up(options.checkpoints, options.seed, options.resume)
        return
    data, is_demo = find_data(options.data)
    recipe = recipe_named(options.recipe or ("full" if "full-model" in options.words else "lightweight"))
    train(options, with_options(demo(recipe) if is_demo else recipe, vars(options)), data, is_demo)


if __name__ == "__main__":
    cli.run(main)
