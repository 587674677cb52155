"""What each stage is judged by after every epoch, on the validation split."""

from collections.abc import Callable

import numpy as np
import pandas as pd
import tensorflow as tf

from Modules.config import Embedding
from Modules.evaluation.scoring import embed
from Modules.metric_learning.collapse import Watch, diagnose, embedding_statistics, is_healthy
from Modules.metric_learning.losses import MARGIN_LOSSES, MetricLoss
from Modules.metric_learning.quality import embedding_quality
from Modules.metric_learning.sampling import metric_labels, shuffled

NEIGHBOURS = ("recall_at_1", "knn_accuracy", "knn_roc_auc")


def embedding_figures(
    model: tf.keras.Model,
    batches: tf.data.Dataset,
    table: pd.DataFrame,
    loss: Callable,
    config: Embedding,
    batch_size: int,
) -> dict[str, float]:
    """`val_loss`, over batches of the training size, and how well the classes of `table`'s images are apart.

    `model` has two outputs, the embedding and what the loss takes (the same but for arcface); `batches` holds the
    images of `table` in order. What is undefined is NaN, as Keras's histories have it.
    """
    embeddings, outputs = embed(model, batches, len(table), "validation")
    targets, groups = table["target"].to_numpy(), table["group"].to_numpy()
    labels = metric_labels(targets, table["patient_id"], config.positives)
    # Always the same shuffled batches: in the table's order one would hold a single class. Parts of nearly equal size,
    # so that the last is not a remnant without triplets.
    parts = np.array_split(shuffled(len(table), 0, 0), -(-len(table) // batch_size))
    losses = [float(loss(labels[part], outputs[part])) for part in parts]
    quality = embedding_quality(embeddings, targets, groups)
    squared = config.distance == "squared-L2"
    figures = {name: quality[name] for name in NEIGHBOURS}
    margin = config.final_margin or config.margin  # as in `loss`: epochs compare
    figures |= embedding_statistics(embeddings, targets, groups, margin, squared)
    figures["loss"] = float(np.average(losses, weights=[len(part) for part in parts]))
    return {f"val_{name}": np.nan if value is None else value for name, value in figures.items()}


def watch(loss: MetricLoss, name: str, epochs: int) -> Watch:
    """What `NeuralNetwork.fit` asks after each of `epochs`: does the embedding that `loss` called `name` trains
    collapse?"""
    has_margin = all(part.strip() in MARGIN_LOSSES for part in name.split(","))
    margin = loss.margins[-1] if has_margin else None

    def with_margin(records: list[dict]) -> list[dict]:  # it may move
        if not has_margin:
            return records
        return [record | {"margin": loss.margin_of(epoch, epochs)} for epoch, record in enumerate(records)]

    return Watch(
        lambda records: diagnose(with_margin(records), margin),
        lambda records: is_healthy(with_margin(records)[-1], margin),
    )


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
        "val_loss": np.mean([losses[rows].mean() for rows in (malignant, ~malignant) if rows.any()]),
        "val_accuracy": (malignant == called).mean(),
        "val_precision": precision,
        "val_recall": recall,
        "val_f1_score": 2 * precision * recall / max(precision + recall, 1e-7),
    }
