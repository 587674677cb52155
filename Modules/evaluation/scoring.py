"""A model on a split: probabilities and embeddings, and every number that `best_epoch.json` keeps of them.

train.py and predict.py both come through here, with the same saved file, so that both print the same figures.
"""

from pathlib import Path

import numpy as np
import pandas as pd
import tensorflow as tf
from sklearn.linear_model import LogisticRegressionCV
from sklearn.model_selection import GroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tqdm import tqdm

from Modules.evaluation.metrics import evaluate
from Modules.metric_learning.quality import embedding_quality


def embed(model: tf.keras.Model, batches: tf.data.Dataset, n: int, title: str) -> list[np.ndarray]:
    """Each output of `model` for the n images of `batches` (images, targets), float32 [n, ...], with a progress bar."""
    # One trace for all batches, the last and smaller one too.
    run = tf.function(lambda images: model(images, training=False), input_signature=[batches.element_spec[0]])
    parts = []
    with tqdm(total=n, desc=title, unit="image", leave=False, ncols=80, mininterval=1) as bar:
        for images, _ in batches:
            parts.append([part.numpy() for part in tf.nest.flatten(run(images))])
            bar.update(len(images))
    return [np.concatenate(column).astype(np.float32) for column in zip(*parts, strict=True)]


def score(model: tf.keras.Model, batches: tf.data.Dataset, n: int, title: str) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities [n] and embeddings [n, D], float32, of the images of `batches` by a joined model."""
    both = tf.keras.Model(model.inputs, [model.output, model.get_layer("embedding").output])
    probability, embeddings = embed(both, batches, n, title)
    return probability[:, 0], embeddings


def both_views(table: pd.DataFrame) -> dict[str, np.ndarray]:
    """The rows of a split that count for `test` (its 50/50 set) and for `test_full` (all of it), as masks [N]."""
    return {"test": table["balanced"].to_numpy(bool), "test_full": np.ones(len(table), bool)}


def evaluate_split(
    table: pd.DataFrame, probability: np.ndarray, embeddings: np.ndarray, gallery: dict, threshold: float
) -> dict[str, dict]:
    """`test` and `test_full`: the metrics of a split's probabilities [N], and the quality of its embeddings [N, D].

    The embedding's neighbours come from the gallery, never from the same group.
    """
    targets, groups = table["target"].to_numpy(), table["group"].to_numpy()
    known = (gallery["embeddings"].astype(np.float32), gallery["targets"], gallery["groups"])
    results = {}
    for view, rows in both_views(table).items():
        results[view] = evaluate(targets[rows], probability[rows], threshold, table["patient_id"][rows])
        results[view]["embedding"] = embedding_quality(embeddings[rows], targets[rows], groups[rows], known)
    return results


def logistic_baseline(
    features: np.ndarray, train: pd.DataFrame, test_features: np.ndarray, test: pd.DataFrame, threshold: float
) -> dict[str, dict]:
    """The plain classifier: logistic regression on features [N, F] of the untrained backbone; `test` and `test_full`.

    Its penalty is chosen by cross-validation inside `train`, in groups like the split.
    """
    folds = GroupKFold(min(5, train["group"].nunique())).split(features, train["target"], train["group"])
    regression = LogisticRegressionCV(
        Cs=np.logspace(-5, 1, 7),
        cv=list(folds),
        scoring="neg_log_loss",
        max_iter=2000,
        l1_ratios=(0.0,),
        use_legacy_attributes=False,
    )
    classifier = make_pipeline(StandardScaler(), regression).fit(features, train["target"])
    probability = classifier.predict_proba(test_features)[:, 1]
    targets = test["target"].to_numpy()
    return {
        view: evaluate(targets[rows], probability[rows], threshold, test["patient_id"][rows])
        for view, rows in both_views(test).items()
    }


def write_gallery(file: Path, table: pd.DataFrame, embeddings: np.ndarray) -> None:
    """The known lesions: embeddings float16 [N, D] of unit length with their ids, groups and targets."""
    partial = file.with_suffix(".partial")
    with open(partial, "wb") as stream:
        np.savez(
            stream,
            embeddings=embeddings.astype(np.float16),
            ids=table["isic_id"].to_numpy(str),
            groups=table["group"].to_numpy(str),
            targets=table["target"].to_numpy(np.int8),
        )
    partial.replace(file)


def read_gallery(file: Path) -> dict[str, np.ndarray]:
    with np.load(file, allow_pickle=False) as saved:
        return dict(saved)
