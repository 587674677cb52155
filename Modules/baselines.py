"""What metric learning has to beat, on the same split and in the same run.

`logistic`: frozen features of the backbone and logistic regression. `finetune`: the same backbone from the same
weights, trained by cross-entropy on the same batches with the same optimizer for as many images.
"""

from pathlib import Path

import numpy as np
import pandas as pd
import tensorflow as tf
from sklearn.linear_model import LogisticRegressionCV
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import modules
from dataset import image_batches, training_batches
from Modules import runtime
from Modules.cli import UserError
from Modules.config import Recipe
from Modules.data.manifest import LABELS
from Modules.evaluation.scoring import embed
from Modules.metric_learning.losses import classes_of
from Modules.NeuralNetwork import NeuralNetwork, adam

BASELINES = ("logistic", "finetune")


def logistic_regression(features: np.ndarray, train: pd.DataFrame, test_features: np.ndarray) -> np.ndarray:
    """Probabilities [M] of the test images by logistic regression on frozen features [N, F] of the `train` images.

    Its penalty is chosen by cross-validation inside `train`, in groups and stratified like the split; both classes
    weigh alike, as in the network's batches.

    Raises:
        UserError: all images of a class in `train` are of one group.
    """
    groups = train.groupby("target")["group"].nunique().min()
    if groups < 2:
        raise UserError("the train split has one class of a single patient; expected 2 patients or more: add images")
    # Not GroupKFold: a fold of one class has no ROC AUC, and then the first penalty would win whatever the others do.
    folds = StratifiedGroupKFold(min(5, groups)).split(features, train["target"], train["group"])
    regression = LogisticRegressionCV(
        Cs=np.logspace(-5, 1, 7),
        cv=list(folds),
        scoring="roc_auc",
        class_weight="balanced",
        max_iter=2000,
        l1_ratios=(0.0,),
        use_legacy_attributes=False,
    )
    classifier = make_pipeline(StandardScaler(), regression).fit(features, train["target"])
    return classifier.predict_proba(test_features)[:, 1]


def finetuned(
    training: pd.DataFrame,
    test: pd.DataFrame,
    recipe: Recipe,
    weights: list[np.ndarray] | None,
    folder: Path,
    full: bool,
    epochs: int,
    options: dict,
) -> tuple[np.ndarray, NeuralNetwork]:
    """Probabilities [M] of the test images, and the training, of a backbone that started from `weights`.

    The last of `epochs` counts; a picture's logit is the mean over as many views as the recipe's embedding averages.
    `options`: seed, precision, resume and identity of the run.
    """
    stage, size, seed = recipe.embedding, recipe.data.image_size, options["seed"]
    runtime.set_precision(options["precision"])
    backbone = modules.build_backbone(stage, size, weights)
    head = tf.keras.layers.Dense(len(LABELS), dtype="float32", name="logits")
    model = tf.keras.Model(backbone.input, head(backbone.output))
    cross_entropy = tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    _, steps = training_batches(training, recipe, seed, full)
    network = NeuralNetwork(
        model,
        "baseline",
        folder,
        lambda labels, logits: cross_entropy(classes_of(labels), logits),
        adam(stage.learning_rate, stage.weight_decay, stage.schedule, steps * epochs),
        monitor="loss",
        mode="last",
        identity=options["identity"],
    )
    network.fit(
        lambda epoch: training_batches(training, recipe, seed, full, epoch)[0],
        steps,
        epochs,
        resume=options["resume"],
    )
    runtime.set_precision("float32")
    frozen = modules.build_backbone(stage, size)
    frozen.set_weights(backbone.get_weights())
    features = embed(
        modules.averaged(frozen, stage.averaged_views, unit_length=False),
        image_batches(test, recipe.data),
        len(test),
        "baseline",
    )[0]
    kernel, bias = head.get_weights()
    benign, malignant = (features @ kernel + bias).T
    return 1 / (1 + np.exp(benign - malignant)), network
