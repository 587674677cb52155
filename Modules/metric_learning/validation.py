"""What each stage is judged by after every epoch, on the validation split."""

from collections.abc import Callable

import numpy as np
import pandas as pd
import tensorflow as tf

from Modules.evaluation.scoring import embed
from Modules.metric_learning.collapse import embedding_statistics
from Modules.metric_learning.quality import embedding_quality
from Modules.metric_learning.sampling import shuffled

NEIGHBOURS = ("recall_at_1", "knn_roc_auc")


def embedding_figures(
    model: tf.keras.Model,
    batches: tf.data.Dataset,
    table: pd.DataFrame,
    loss: Callable,
    margin: float,
    batch_size: int,
) -> dict[str, float]:
    """`val_loss`, over batches of the training size, and how well the classes of `table`'s images are apart.

    `batches` holds the images of `table` in order. What is undefined is NaN, as Keras's histories have it.
    """
    embeddings = embed(model, batches, len(table), "validation")[0]
    targets = table["target"].to_numpy()
    # Always the same shuffled batches: in the table's order one would hold a single class. Parts of nearly equal size,
    # so that the last is not a remnant without triplets.
    parts = np.array_split(shuffled(len(table), 0, 0), -(-len(table) // batch_size))
    losses = [float(loss(targets[part], embeddings[part])) for part in parts]
    groups = table["group"].to_numpy()
    quality = embedding_quality(embeddings, targets, groups)
    figures = {name: quality[name] for name in NEIGHBOURS} | embedding_statistics(embeddings, targets, groups, margin)
    figures["loss"] = float(np.average(losses, weights=[len(part) for part in parts]))
    return {f"val_{name}": np.nan if value is None else value for name, value in figures.items()}


def classifier_figures(model: tf.keras.Model, embeddings: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """`val_loss` and the metrics of the classifier on embeddings [N, D] of classes [N].

    The loss weighs both classes alike, as the training batches do, whatever their shares in validation.
    """
    probability = model.predict_on_batch(embeddings)[:, 0].astype(np.float64).clip(1e-7, 1 - 1e-7)
    malignant, called = targets == 1, probability >= 0.5
    losses = -np.log(np.where(malignant, probability, 1 - probability))
    hits = (malignant & called).sum()
    precision, recall = hits / max(called.sum(), 1), hits / max(malignant.sum(), 1)
    return {
        "val_loss": (losses[malignant].mean() + losses[~malignant].mean()) / 2,
        "val_accuracy": (malignant == called).mean(),
        "val_precision": precision,
        "val_recall": recall,
        "val_f1_score": 2 * precision * recall / max(precision + recall, 1e-7),
    }
