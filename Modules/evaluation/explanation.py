"""Where the model looked: Grad-CAM of the probability, and of the similarity to a known lesion; and a sheet of it all.

Selvaraju et al., "Grad-CAM: Visual explanations from deep networks via gradient-based localization", ICCV 2017,
section 3: the last maps of the backbone, each weighted by the mean gradient of the score with respect to it, added up;
what speaks against the score is cut off.
"""

from collections.abc import Callable

import cv2
import matplotlib
import numpy as np
import tensorflow as tf
from matplotlib.figure import Figure

from Modules.data.manifest import LABELS
from Modules.evaluation import figures, gallery
from Modules.evaluation.evidence import NOTICE, Checkpoint, Evidence, in_words

STRENGTH = 0.6  # opacity of the heat map where it is hottest
SHOWN = 6  # neighbours on a sheet, at most

# float32 [B, S, S, 3] in 0..255, known embeddings float32 [B, K, D] -> heat maps float32 [B, 1 + K, h, w] in 0..1
Explainer = Callable[[np.ndarray, np.ndarray], np.ndarray]


def explainer(model: tf.keras.Model) -> Explainer:
    """Heat maps of a saved model: first of the probability (its logit), then of the similarity to each known embedding.

    Each is 1 at its maximum, or 0 throughout where nothing speaks for the score. Where the model itself looks at
    several flips and turns, the maps are those of the first, the picture as it is.
    """
    maps = model.get_layer("features").get_input_at(0)
    logit = model.get_layer("probability").input
    parts = tf.keras.Model(model.inputs, [maps, logit, model.get_layer("embedding").output])

    @tf.function(reduce_retracing=True)
    def heat(images: tf.Tensor, known: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape(persistent=True) as tape:
            tape.watch(images)  # the weights may be frozen
            seen, logits, embeddings = parts(images, training=False)
            cosines = tf.einsum("bd,bkd->bk", embeddings, known)
            scores = [logits[:, 0], *tf.unstack(cosines, axis=1)]
        weighted = [
            tf.nn.relu(tf.einsum("bhwc,bc->bhw", seen, tf.reduce_mean(tape.gradient(score, seen), axis=(1, 2))))
            for score in scores
        ]
        return tf.stack(weighted, axis=1)

    def explain(images: np.ndarray, known: np.ndarray) -> np.ndarray:
        found = heat(tf.constant(images, tf.float32), tf.constant(known, tf.float32)).numpy()
        return found / np.maximum(found.max(axis=(2, 3), keepdims=True), np.finfo(np.float32).tiny)

    return explain


def explain_all(explain: Explainer, pictures: np.ndarray, evidence: list[Evidence], known: dict) -> list[np.ndarray]:
    """For each of `pictures` uint8 [B, S, S, 3] its heat maps float32 [1 + K, h, w], K being its neighbours."""
    return [
        explain(
            picture[None].astype(np.float32),
            known["embeddings"][[neighbour.position for neighbour in one.neighbours]][None],
        )[0]
        for picture, one in zip(pictures, evidence, strict=True)
    ]


def overlay(picture: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """`heat` [h, w] in 0..1 laid over a picture uint8 [H, W, 3], which stays visible where it is cold."""
    heat = cv2.resize(heat, picture.shape[1::-1], interpolation=cv2.INTER_LINEAR)[..., None]
    colours = 255 * matplotlib.colormaps["turbo"](heat[..., 0])[..., :3]
    return (picture + STRENGTH * heat * (colours - picture)).round().astype(np.uint8)


def sheet(name: str, picture: np.ndarray, evidence: Evidence, heats: np.ndarray, checkpoint: Checkpoint) -> Figure:
    """One picture's evidence on a page: it, the heat map, the probability, the most similar known lesions."""
    figure = Figure(figsize=(figures.WIDTH, 7.4), layout="constrained")
    figure.suptitle(name, fontsize=figures.TEXT + 1, color=figures.INK)
    upper, middle, lower = figure.subfigures(3, 1, height_ratios=[3.2, 0.8, 2.2])
    views = [(picture, "the picture"), (overlay(picture, heats[0]), "what speaks for melanoma")]
    for axes, (shown, title) in zip(upper.subplots(1, 2), views, strict=True):
        axes.imshow(shown)
        axes.set_title(title, fontsize=figures.TEXT, color=figures.INK)
        axes.axis("off")
    _probability_bar(middle.subplots(), evidence, checkpoint)
    shown = evidence.neighbours[:SHOWN]
    lower.suptitle(_neighbour_title(evidence), fontsize=figures.TEXT, color=figures.INK)
    for axes, neighbour in zip(np.ravel(lower.subplots(1, SHOWN)), [*shown, *[None] * SHOWN], strict=False):
        axes.axis("off")
        if neighbour is None:
            continue
        if jpeg := gallery.thumbnail(checkpoint.gallery, neighbour.position):
            axes.imshow(cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR_RGB))
        text = f"{neighbour.id}\n{neighbour.diagnosis or neighbour.label}\nsimilarity {neighbour.similarity:.3f}"
        axes.text(
            0.5, -0.04, text, ha="center", va="top", transform=axes.transAxes, fontsize=8,
            color=figures.CLASSES[neighbour.label],
        )  # fmt: skip
    figure.supxlabel(f"{in_words(evidence, checkpoint)}\n{NOTICE}", fontsize=8.5, color=figures.INK, wrap=True)
    return figure


def _neighbour_title(evidence: Evidence) -> str:
    share = sum(neighbour.label == LABELS[1] for neighbour in evidence.neighbours)
    return f"Most similar known lesions: {share} of {len(evidence.neighbours)} malignant"


def _probability_bar(axes, evidence: Evidence, checkpoint: Checkpoint) -> None:
    axes.set(xlim=(0, 1), ylim=(-0.5, 0.5), yticks=[])
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(labelsize=figures.SMALL, colors=figures.INK)
    axes.axvline(checkpoint.threshold, color=figures.INK, ls="--", lw=1.5)
    if evidence.probability is None:
        title = f"No probability: {evidence.prediction}"
    else:
        axes.barh(0, evidence.probability, color=figures.CLASSES[evidence.prediction])
        title = (
            f"Probability of melanoma {evidence.probability:.3f}: {evidence.prediction}   "
            f"(threshold {checkpoint.threshold:.3f}; where {checkpoint.prevalence:.1%} are melanomas "
            f"{evidence.at_prevalence:.3f})"
        )
    axes.set_title(title, fontsize=figures.SMALL, color=figures.INK)
