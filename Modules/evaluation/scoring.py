"""A model on a split: probabilities and embeddings, and every number that `best_epoch.json` keeps of them.

train.py and predict.py both come through here, with the same saved file, so that both print the same figures.
"""

from collections.abc import Callable

import numpy as np
import pandas as pd
import tensorflow as tf
from tqdm import tqdm

from Modules.evaluation.metrics import PREVALENCE, evaluate
from Modules.metric_learning.collapse import CLOSE
from Modules.metric_learning.quality import embedding_quality, k_shot


def compiled(model: tf.keras.Model) -> Callable[[tf.Tensor], list[tf.Tensor]]:
    """The model in inference mode as one graph for batches of any size, the last and smaller one too."""
    signature = [tf.TensorSpec(model.input_shape, tf.float32)]
    return tf.function(lambda images: tf.nest.flatten(model(images, training=False)), input_signature=signature)


def embed(model: tf.keras.Model, batches: tf.data.Dataset, n: int, title: str) -> list[np.ndarray]:
    """Each output of `model` for the n images of `batches` (images, targets), float32 [n, ...], with a progress bar."""
    with tqdm(total=n, desc=title, unit="image", leave=False, ncols=80, disable=None) as bar:
        outputs = model.predict(batches, verbose=0, callbacks=[_Progress(bar)])
    return [np.asarray(output, np.float32) for output in tf.nest.flatten(outputs)]


class _Progress(tf.keras.callbacks.Callback):
    def __init__(self, bar: tqdm):
        super().__init__()
        self._supports_tf_logs = True  # else Keras waits for each batch
        self.bar = bar

    def on_predict_batch_end(self, batch, logs=None):
        self.bar.update(len(tf.nest.flatten(logs["outputs"])[0]))


def with_embedding(model: tf.keras.Model) -> tf.keras.Model:
    """A joined model with two outputs: the probability [B, 1] and the embedding [B, D]."""
    return tf.keras.Model(model.inputs, [model.output, model.get_layer("embedding").output])


def score(model: tf.keras.Model, batches: tf.data.Dataset, n: int, title: str) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities [n] and embeddings [n, D], float32, of the images of `batches` by a joined model."""
    probability, embeddings = embed(with_embedding(model), batches, n, title)
    return probability[:, 0], embeddings


VIEWS = ("test", "test_full")


def both_views(table: pd.DataFrame) -> dict[str, np.ndarray]:
    """The rows of a split that count for `test` (its 50/50 set) and for `test_full` (all of it), as masks [N]."""
    return dict(zip(VIEWS, (table["balanced"].to_numpy(bool), np.ones(len(table), bool)), strict=True))


def units(table: pd.DataFrame) -> pd.Series:
    """What intervals resample: patients, or, where the patient is unknown, what belongs together."""
    return table["patient_id"].fillna(table["group"])


def evaluate_split(
    table: pd.DataFrame,
    probability: np.ndarray,
    embeddings: np.ndarray,
    gallery: dict,
    threshold: float,
    prevalence: float = PREVALENCE,
) -> dict[str, dict]:
    """`test` and `test_full`: the metrics of a split's probabilities [N], and the quality of its embeddings [N, D].

    `ppv` and `npv` are those at `prevalence`. The embedding's neighbours come from the gallery, never from the same
    group.
    """
    targets, groups = table["target"].to_numpy(), table["group"].to_numpy()
    known = (gallery["embeddings"].astype(np.float32), gallery["targets"], gallery["groups"])
    results = {}
    for view, rows in both_views(table).items():
        results[view] = evaluate(targets[rows], probability[rows], threshold, units(table)[rows], prevalence)
        quality = embedding_quality(embeddings[rows], targets[rows], groups[rows], known)
        results[view]["embedding"] = quality | {
            "collapsed": (quality["mean_negative_distance"] or 0) < CLOSE,
            "k_shot": k_shot(embeddings[rows], targets[rows], groups[rows], known),
        }
    return results


def evaluate_baseline(table: pd.DataFrame, probability: np.ndarray, prevalence: float) -> dict[str, dict]:
    """`test` and `test_full` of a plain classifier's probabilities [N]; it calls malignant what is likelier so.

    `ppv` and `npv` are those at `prevalence`.
    """
    targets = table["target"].to_numpy()
    return {
        view: evaluate(targets[rows], probability[rows], 0.5, units(table)[rows], prevalence)
        for view, rows in both_views(table).items()
    }
