"""The collapse watch: what the embedding looks like after each epoch, and what is wrong with it, in one line.

Triplet losses have a trivial point to fall to: all images on one spot, every distance 0 and the loss at the margin
(Schroff et al. 2015, "FaceNet", §3.2; Hermans et al. 2017, "In defense of the triplet loss", §3). From outside it looks
like slow learning: with semi-hard triplets the loss of a healthy embedding too may stay within a few per cent of the
margin. So the loss alone proves nothing; the distances show which of the two it is.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from Modules.metric_learning.quality import DISTANCES, SPREAD, class_distances, distance_blocks, numbered_groups, spread

AT_MARGIN = 0.9  # a loss above this share of the margin is at the margin
CLOSE = 0.25  # mean negative distance; unit-length embeddings mostly start at 0.5 to 1.4 and do not come here to learn
POINT = 0.1  # the same, where no margin says whether the loss agrees
GROWTH = 1.05  # distances that grow by this much within the epochs looked at are on their way out
FALL = 0.97  # a loss without a margin that falls by this much in them still learns
UNIT = 0.05  # tolerance of the unit length
STILL = {"loss": 0.02, "mean_positive_distance": 0.005, "mean_negative_distance": 0.005}  # relative change that is none


@dataclass(frozen=True)
class Diagnosis:
    """`kind` is "nan", "collapse", "lag" (only a warning) or "stuck"; `message` is one line that ends with a cure."""

    kind: str
    epoch: int
    message: str


class Watch(NamedTuple):
    """Two looks at a training's epochs so far: `diagnose`, and `healthy`, whether the last may be returned to."""

    diagnose: Callable[[list[dict]], Diagnosis | None]
    healthy: Callable[[list[dict]], bool]


no_watch = Watch(lambda epochs: None, lambda epochs: True)


def embedding_statistics(
    embeddings: np.ndarray,
    targets: np.ndarray,
    groups: np.ndarray | None = None,
    margin: float | None = None,
    squared: bool = False,
    limit: int = 2000,
) -> dict[str, float | None]:
    """What the watch needs to know of embeddings [N, D] of classes [N] after an epoch.

    mean_positive_distance, mean_negative_distance, silhouette, embedding_std, effective_rank: as in quality.py.
    mean_norm: mean length of an embedding.
    active_triplets: share of the triplets (anchor, positive, negative) from different groups whose loss is not 0,
        d(a, p) - d(a, n) + margin > 0. `squared`: of squared distances. No margin (None) counts as 0.

    Undefined is None. Of more than `limit` images always the same random part is looked at: a fraction of a second.
    """
    embeddings, targets = np.asarray(embeddings, np.float32), np.asarray(targets)
    codes = numbered_groups(len(targets), groups)[0]
    if len(targets) > limit:
        rows = np.sort(np.random.default_rng(0).permutation(len(targets))[:limit])
        embeddings, targets, codes = embeddings[rows], targets[rows], codes[rows]

    result = dict.fromkeys(DISTANCES + SPREAD + ("active_triplets", "mean_norm"))
    if len(targets) and np.isfinite(embeddings).all():
        images = embeddings, targets, codes
        result |= class_distances(images) | spread(embeddings)
        result["active_triplets"] = active_triplets(images, margin or 0, squared)
        result["mean_norm"] = float(np.linalg.norm(embeddings, axis=1).mean())
    return result


def active_triplets(images: tuple[np.ndarray, np.ndarray, np.ndarray], margin: float, squared: bool) -> float | None:
    """The share of active triplets (`embedding_statistics`) of (embeddings, targets, group codes), in O(N²) memory."""
    targets, active, triplets = images[1], 0, 0
    for rows, distance in distance_blocks(images, images):
        for target, row in zip(targets[rows], distance if squared else np.sqrt(distance), strict=True):
            allowed, same = np.isfinite(row), targets == target
            positive, negative = row[allowed & same], np.sort(row[allowed & ~same])
            active += int(np.searchsorted(negative, positive + np.float32(margin)).sum())
            triplets += len(positive) * len(negative)
    return active / triplets if triplets else None


def diagnose(history: list[dict], margin: float | None, patience: int = 5) -> Diagnosis | None:
    """What is wrong with a training, told from its epochs so far; None as long as nothing is.

    history: one record an epoch: `metric_loss`, or `loss` where that is the metric loss alone, and the numbers of
    `embedding_statistics`, with or without Keras's `val_` in front; `epoch` if they do not count from 1; `margin` where
    it moves. What is missing, None or NaN is passed over. Leave out the epochs of a warm-up. margin: None for a loss
    that has none.

    nan: the loss is not a number.
    collapse: for `patience` epochs the loss is at the margin, and the classes are closer than CLOSE. Where embeddings
        are not of unit length one of two is enough, the loss at the margin or classes closer than it (a batch
        normalised as a whole leaves distances of √(2 / B)). For a loss without margin: the classes are closer than
        POINT, and the loss does not fall.
    lag: for `patience` epochs the classes are closer than POINT in validation, while the loss is lower than such
        distances allow: BatchNorm's moving statistics are not those of the network. They may catch up.
    stuck: after `patience` epochs neither distances nor loss have changed since the first.

    What looks as bad in good runs is let pass: a narrow cone of unit-length embeddings that opens; a low rank by itself
    (two classes that are perfectly apart have rank 2); semi-hard losses near the margin at healthy distances; a plateau
    after the network has moved, which is for early stopping to judge.
    """
    if not history:
        return None
    epoch, loss = history[-1].get("epoch", len(history)), _loss(history[-1])
    if loss is not None and not math.isfinite(loss):
        cure = "lower --learning-rate or use --precision float32"
        return Diagnosis("nan", epoch, f"epoch {epoch}: the loss is {loss}; {cure}")
    if len(history) < patience:
        return None

    recent = history[-patience:]
    if all(_collapsed(record, margin) for record in recent) and not _recovering(recent, margin):
        signs = _symptoms(recent[-1], margin)
        return Diagnosis("collapse", epoch, f"epoch {epoch}: the embedding has collapsed: {signs}")
    if all(_lags(record, margin) for record in recent) and not _recovering(recent, margin):
        signs = f"loss {loss:.3f}, but mean negative distance {_value(recent[-1], 'mean_negative_distance'):.3f}"
        cure = "lower --batch-norm-momentum"
        return Diagnosis("lag", epoch, f"epoch {epoch}: validation lags behind training: {signs}; {cure}")
    if all(_same(history, name, tolerance) for name, tolerance in STILL.items()):
        values = ", ".join(f"{name.replace('_', ' ')} {_value(history[-1], name):.3f}" for name in STILL)
        cure = "raise --learning-rate, or let more of its layers train"
        return Diagnosis("stuck", epoch, f"epoch {epoch}: the network does not move: {values} have not changed; {cure}")
    return None


def is_healthy(record: dict, margin: float | None) -> bool:
    """Whether an epoch, a record as in `diagnose`, shows no sign of collapse by itself."""
    loss = _loss(record)
    return loss is not None and math.isfinite(loss) and not _collapsed(record, margin)


def _value(record: dict, name: str) -> float | None:
    """A number of a record, None where it is missing or undefined."""
    value = record.get(name, record.get(f"val_{name}"))
    return None if value is None or math.isnan(value) else float(value)


def _loss(record: dict) -> float | None:
    """The metric loss, which is a part of the loss where a classification is learned beside it; NaN stays NaN."""
    return record.get("metric_loss", record.get("loss", record.get("val_loss")))


def _unit_length(record: dict) -> bool | None:
    """None where the length is not known."""
    norm = _value(record, "mean_norm")
    return None if norm is None else abs(norm - 1) <= UNIT


def _collapsed(record: dict, margin: float | None) -> bool:
    distance, loss, margin = _value(record, "mean_negative_distance"), _loss(record), record.get("margin", margin)
    if distance is None or loss is None or _lags(record, margin):
        return False
    if margin is None:
        return distance < POINT
    at_margin = loss >= AT_MARGIN * margin
    if _unit_length(record) is False:
        return at_margin or distance < margin  # in the second case the margin is out of reach
    return at_margin and distance < CLOSE


def _lags(record: dict, margin: float | None) -> bool:
    """A triplet's loss is the margin give or take the difference of two distances. One that is further below the margin
    was reached with greater distances than these, by the network in its training mode."""
    distance, loss, margin = _value(record, "mean_negative_distance"), _loss(record), record.get("margin", margin)
    known = margin is not None and distance is not None and loss is not None
    return known and distance < POINT and margin - loss > 2 * distance


def _recovering(recent: list[dict], margin: float | None) -> bool:
    first, last = recent[0], recent[-1]
    growing = _value(last, "mean_negative_distance") > GROWTH * _value(first, "mean_negative_distance")
    falling = margin is None and _loss(last) < FALL * _loss(first)
    return falling or (growing and all(map(_unit_length, recent)))


def _symptoms(record: dict, margin: float | None) -> str:
    """What shows the collapse, and what to change."""
    distance, norm = _value(record, "mean_negative_distance"), _value(record, "mean_norm")
    margin = record.get("margin", margin)
    loss = f"loss {_loss(record):.3f}" + ("" if margin is None else f" with margin {margin:g}")
    signs = f"{loss}, mean negative distance {distance:.3f}"
    if _unit_length(record) is False:
        return f"{signs}, embeddings of length {norm:.3g} instead of 1; normalise each row, not the batch"
    cure = "lower --learning-rate or use --loss semi-hard"
    return f"{signs}; {cure}" + (", or normalise each row" if norm is None else "")


def _same(history: list[dict], name: str, tolerance: float) -> bool:
    """Whether a number is known in all epochs and has stayed the same but for a share of `tolerance`."""
    values = [_value(record, name) for record in history]
    return None not in values and max(values) - min(values) <= tolerance * max(map(abs, values))
