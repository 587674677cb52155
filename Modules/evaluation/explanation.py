"""Where the model looked: heat maps of the probability, and of the similarity to a known lesion; and a sheet of it all.

Occlusion (Zeiler and Fergus, "Visualizing and understanding convolutional networks", ECCV 2014, section 4.2): one place
after the other is painted over in the picture's own colour, and where the score falls most, the model looked. It asks
the model itself, whatever it is made of, with all its flips and turns. `benchmarks/evidence.py` shows why it is not
Grad-CAM (Selvaraju et al., ICCV 2017): its 4 x 4 or 8 x 8 weights point beside most of the drawn lesions.
"""

from collections.abc import Callable

import cv2
import matplotlib
import numpy as np
import tensorflow as tf
from matplotlib.figure import Figure
from scipy.special import logit

from Modules.data.manifest import LABELS
from Modules.evaluation import figures, gallery
from Modules.evaluation.evidence import NOTICE, Checkpoint, Evidence, in_words

CELLS = 8  # places a side that are painted over, one after the other
WIDTH = 3  # cells a side of the patch
BATCH = 33  # pictures at once; two batches for CELLS x CELLS places and the picture as it is
CERTAIN = 1e-7  # float32 can't tell a probability nearer to 0 or 1 from it
STRENGTH = 0.6  # opacity of the heat map where it is hottest
SHOWN = 6  # neighbours on a sheet, at most

# float32 [B, S, S, 3] in 0..255 -> probability [B, 1], embedding [B, D], and whatever else
Run = Callable[[np.ndarray], list[tf.Tensor]]


def heat_maps(run: Run, picture: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Heat maps of a picture uint8 [S, S, 3]: float32 [1 + K, CELLS, CELLS] in 0..1.

    First of the probability (its logit), then of the similarity to each of the known embeddings float32 [K, D]. A value
    is the fall of the score when the patch around that place is painted over, as a share of the largest; a map is 0
    throughout where painting over lowers the score nowhere.
    """
    scores = _scores(run, _painted_over(picture), known)  # [1 + CELLS x CELLS, 1 + K]
    falls = np.maximum(scores[0] - scores[1:], 0).T.reshape(-1, CELLS, CELLS)
    return (falls / np.maximum(falls.max(axis=(1, 2), keepdims=True), np.finfo(np.float32).tiny)).astype(np.float32)


def _painted_over(picture: np.ndarray) -> np.ndarray:
    """The picture as it is, then with a patch of its median colour at each place, by rows: float32 [N, S, S, 3]."""
    copies = np.repeat(picture[None].astype(np.float32), 1 + CELLS**2, axis=0)
    colour = np.median(picture, axis=(0, 1))
    size = len(picture)
    edges = [
        (max(0, round((cell + (1 - WIDTH) / 2) * size / CELLS)), round((cell + (1 + WIDTH) / 2) * size / CELLS))
        for cell in range(CELLS)
    ]
    places = ((top, left) for top in edges for left in edges)
    for copy, ((y, bottom), (x, right)) in zip(copies[1:], places, strict=True):
        copy[y:bottom, x:right] = colour
    return copies


def _scores(run: Run, pictures: np.ndarray, known: np.ndarray) -> np.ndarray:
    """The logit of the probability and the cosine to each known embedding: float64 [N, 1 + K]."""
    batches = (run(pictures[start : start + BATCH])[:2] for start in range(0, len(pictures), BATCH))
    probability, embeddings = (np.concatenate(part) for part in zip(*batches, strict=True))
    logits = logit(np.clip(probability.astype(np.float64), CERTAIN, 1 - CERTAIN))
    return np.concatenate([logits, embeddings @ known.T], axis=1)


def explain(checkpoint: Checkpoint, picture: np.ndarray, evidence: Evidence) -> np.ndarray | None:
    """The heat maps of what `judge` found; None where it gave no probability."""
    if not evidence.in_distribution:
        return None
    places = [neighbour.position for neighbour in evidence.neighbours]
    return heat_maps(checkpoint.run, picture, checkpoint.gallery["embeddings"][places].astype(np.float32))


def caption(heats: np.ndarray) -> str:
    """What the first of the heat maps [1 + K, CELLS, CELLS] shows."""
    return "what speaks for melanoma (red: most)" if heats[0].any() else "no place in it speaks for melanoma"


def overlay(picture: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """`heat` [h, w] in 0..1 laid over a picture uint8 [H, W, 3], which stays visible where it is cold."""
    heat = cv2.resize(heat, picture.shape[1::-1], interpolation=cv2.INTER_LINEAR)[..., None]
    colours = 255 * matplotlib.colormaps["turbo"](heat[..., 0])[..., :3]
    return (picture + STRENGTH * heat * (colours - picture)).round().astype(np.uint8)


def sheet(
    name: str, picture: np.ndarray, evidence: Evidence, heats: np.ndarray | None, checkpoint: Checkpoint
) -> Figure:
    """One picture's evidence on a page: it, the heat map, the probability, the most similar known lesions."""
    figure = Figure(figsize=(figures.WIDTH, 7.4), layout="constrained")
    figure.suptitle(name, fontsize=figures.TEXT + 1, color=figures.INK)
    upper, middle, lower = figure.subfigures(3, 1, height_ratios=[3.2, 0.8, 2.2])
    views = [(picture, "the picture")]
    if heats is not None:
        views.append((overlay(picture, heats[0]), caption(heats)))
    for axes, (shown, title) in zip(np.ravel(upper.subplots(1, len(views))), views, strict=True):
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
