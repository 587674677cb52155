"""Stage 2 on embeddings made once, beside 50 epochs with the frozen backbone in the loop: time and quality.

    .venv/bin/python benchmarks/classifier_stage.py                                       drawn lesions, random weights
    .venv/bin/python benchmarks/classifier_stage.py --data datasets/balanced --weights imagenet

MobileNet at 256 x 256, its features at length 1; the classifier of the recipe `lightweight`, 50 epochs. The slow way
sees every image in a new view each epoch and judges validation as often; ours embeds 1 or 2 views of each image and
then trains on those in turn; the limit is for as many as the recipe has. Quality is the ROC AUC of the test images,
with its interval over patients, and no figure of drawn lesions, of which random weights learn nothing. 800 of those:
with fewer, what tracing and the classifier's own epochs take shows. Six minutes on 2 cores.
"""

import tempfile
import time
from itertools import pairwise
from pathlib import Path

import common

SIZE, COUNT, VIEWS = 256, 800, (2, 1)


def splits(options, folder: str):
    """Tables of training, validation and test images."""
    from dataset import load_manifest, select

    if options.data:
        manifest = load_manifest(options.data)
        return [select(manifest, split, external=False) for split in ("train", "validation", "test")]
    rows = common.table(common.files(folder, COUNT, SIZE, drawn=COUNT)).assign(patient_id=lambda rows: rows["isic_id"])
    ends = 0, COUNT * 6 // 10, COUNT * 7 // 10, COUNT
    return [rows.iloc[a:b].reset_index(drop=True) for a, b in pairwise(ends)]


def main() -> None:
    options = common.options(
        __doc__, data={"type": Path, "help": "a folder with a manifest.csv"}, weights={"default": "none"}
    )
    import numpy as np
    import tensorflow as tf

    import modules
    from dataset import image_batches, training_batches, vector_batches, view_batches
    from Modules import runtime
    from Modules.config import recipe_named, with_options
    from Modules.evaluation import scoring
    from Modules.evaluation.metrics import evaluate
    from Modules.inference import optimised
    from Modules.NeuralNetwork import NeuralNetwork, adam

    changes = {"backbone": "mobilenet", "image_size": str(SIZE), "dense_units": "", "embedding_size": "0"}
    recipe = with_options(recipe_named("lightweight"), changes | {"batch_size": "32", "classifier_batch_size": "32"})
    settings, epochs = recipe.classifier, recipe.classifier.epochs
    runtime.keep_freed_memory()
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        training, validation, test = splits(options, folder)
        weights = modules.pretrained("mobilenet", options.weights)
        frozen = modules.build_embedding(recipe.embedding, SIZE, weights)
        frozen.trainable = False
        seen = scoring.embed(frozen, image_batches(test, recipe.data), len(test), "test")[0]
        scoring.embed(frozen, image_batches(training, recipe.data), len(training), "warm-up")

        def classifier():
            runtime.set_seeds(0)
            return modules.build_classifier(settings, frozen.output_shape[-1])

        def keep(name: str, head: tf.keras.Model, start: float) -> None:
            seconds, scores = time.perf_counter() - start, head.predict(seen, verbose=0)[:, 0]
            quality = evaluate(test["target"].to_numpy(), scores, 0.5, test["patient_id"].fillna(test["group"]))
            auc = quality["roc_auc"]
            results[name] = seconds, auc, quality["roc_auc_ci95"] or (auc, auc)  # none where all rank alike

        for views in VIEWS:
            head, start = classifier(), time.perf_counter()
            batches = view_batches(training, recipe.data, views, 0)
            ready = optimised(frozen)
            vectors = scoring.embed(ready, batches, views * len(training), "views")[0]
            held = scoring.embed(ready, image_batches(validation, recipe.data), len(validation), "validation")[0]
            targets = np.tile(training["target"].to_numpy(np.float32), views)
            loss = tf.keras.losses.BinaryCrossentropy()
            network = NeuralNetwork(head, "classifier", Path(folder), loss, adam(settings.learning_rate), "loss")
            stream, steps = vector_batches(vectors, targets, settings.batch_size, 0, views=views)
            network.fit(lambda epoch, stream=stream: stream, steps, epochs, lambda: {"val": head(held)[0, 0]})  # noqa: B023
            keep(f"{views} views", head, start)

        head, start = classifier(), time.perf_counter()
        whole = tf.keras.Model(frozen.input, head(frozen(frozen.input, training=False)))
        whole.compile(tf.keras.optimizers.Adam(settings.learning_rate), "binary_crossentropy")
        batches, steps = training_batches(training, recipe, 0)
        judged = image_batches(validation, recipe.data)
        whole.fit(batches, steps_per_epoch=steps, epochs=epochs, validation_data=judged, verbose=0)
        keep("backbone in the loop", head, start)

    for name, (seconds, auc, (low, high)) in results.items():
        print(f"{name:24}{seconds:8.1f} s   ROC AUC {auc:.3f} [{low:.3f}, {high:.3f}]")
    slow, figures = results["backbone in the loop"], []
    for views in VIEWS:
        fast, name = results[f"{views} views"], f"{views} views of each image"
        peer = "backbone in the loop"
        least = 20 if views == settings.views else None
        figures.append(common.figure("classifier_stage", f"{name}: times as fast", slow[0] / fast[0], peer, least))
        if options.data:
            quality = common.figure("classifier_stage", f"{name}: ROC AUC", fast[1], round(slow[1], 4), slow[2][0])
            figures.append(quality)
    common.finish(figures)


if __name__ == "__main__":
    common.start(main, {})
