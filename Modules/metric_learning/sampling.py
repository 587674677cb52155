"""Which images make up each batch of an epoch, stateless from (seed, epoch).

Every function returns positions (int64) into the table of images; the same seed and epoch give the same order on any
machine, so a resumed run continues exactly where it stopped. Rows keep their order of time: a batch is a run of
`batch_size` positions (or a row of the array that `class_batches` returns).
"""

import numpy as np
import pandas as pd

from Modules.cli import UserError


def group_codes(groups) -> np.ndarray:
    """Number the groups (patients, lesions) that N images belong to: array-like [N] of names to int64 [N].

    A missing name (None, NaN, NA) is a group of its own.
    """
    codes, names = pd.factorize(np.asarray(groups, object))
    missing = codes < 0
    codes[missing] = len(names) + np.arange(missing.sum())
    return codes.astype(np.int64)


def metric_labels(targets: np.ndarray, patients, positives: str) -> np.ndarray:
    """What a metric loss takes for images of classes [N]: int32 [N], or, for positives of another patient, [N, 2]."""
    targets = np.asarray(targets, np.int32)
    return targets if positives == "any" else np.stack([targets, group_codes(patients).astype(np.int32)], axis=1)


def shuffled(n: int, seed: int, epoch: int) -> np.ndarray:
    """Every image once, in random order: int64 [n]."""
    return np.random.default_rng((seed, epoch)).permutation(n)


def oversampled(targets: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """Every image of the largest class once, those of the others repeated to as many, in random order: int64 [M].

    M is the number of classes times the size of the largest. In a class all are drawn equally often, give or take one.
    Random over-sampling to equal shares: Buda et al. 2018, "A systematic study of the class imbalance problem", §3.1.
    """
    rng = np.random.default_rng((seed, epoch))
    members = _members(targets)
    most = max(map(len, members))
    return rng.permutation(np.concatenate([np.resize(rng.permutation(m), most) for m in members]))


def class_batches(
    targets: np.ndarray, patients: np.ndarray | None, batch_size: int, seed: int, epoch: int
) -> np.ndarray:
    """Batches of P classes by K images from as many patients as possible: int64 [steps, batch_size], all of them full.

    Balanced batches as in FaceNet (Schroff et al. 2015, §3.2: each batch needs several images of an identity for its
    positives) and "In defense of the triplet loss" (Hermans et al. 2017, §2: P identities by K images).

    targets: [N] classes. patients: [N] names, None or missing where unknown (such an image is a patient of its own).
    P is the number of classes, as long as that leaves two images of each. K = batch_size / P; where that leaves a rest,
    the classes drawn least so far get one image more.

    The epoch ends when every image has been seen; every epoch has the same number of steps. Inside a class all images
    are seen once before any is seen again, so their counts differ by one at most; a class of fewer than K images
    repeats inside a batch. A class's images in a batch come from as many patients as possible (where a pass over a
    small class ends inside the batch, a few may come twice). Two classes may share a patient: such negatives cannot be
    told apart by who the patient is.

    Raises UserError if there is no image.
    """
    rng = np.random.default_rng((seed, epoch))
    members = _members(targets)
    per_batch = min(len(members), max(1, batch_size // 2))
    patients = group_codes([None] * len(targets) if patients is None else patients)

    sizes = _class_sizes(np.array([len(m) for m in members]), batch_size, per_batch, rng)  # [steps, classes]
    batches, drawn = [], []
    for images, size in zip(members, sizes.T, strict=True):
        batch = np.repeat(np.arange(len(sizes)), size)  # the batch of each draw of this class, in order of time
        batches.append(batch)
        drawn.append(images[_deal(patients[images], batch, len(sizes), rng)])
    in_time = np.argsort(np.concatenate(batches), kind="stable")
    # Mixed inside the batch, so that a strategy that cuts batches into replicas gives each some of every class.
    return rng.permuted(np.concatenate(drawn)[in_time].reshape(-1, batch_size), axis=1)


def _members(targets: np.ndarray) -> list[np.ndarray]:
    """The positions of each class."""
    targets = np.asarray(targets)
    if not len(targets):
        raise UserError("there are no images to draw batches from: check the split and the options that filter it")
    return [np.flatnonzero(targets == value) for value in np.unique(targets)]


def _class_sizes(counts: np.ndarray, batch_size: int, per_batch: int, rng: np.random.Generator) -> np.ndarray:
    """How many images of each class are in each batch, [steps, classes], until every class has been seen whole."""
    share = batch_size // per_batch + (np.arange(per_batch) < batch_size % per_batch)
    drawn, sizes = np.zeros(len(counts), np.int64), []
    while drawn.min() < counts.max():  # all classes, or chance would decide the number of steps
        size = np.zeros(len(counts), np.int64)
        size[np.argsort(drawn + rng.random(len(counts)))[:per_batch]] = share  # the least drawn first, ties at random
        drawn += size
        sizes.append(size)
    return np.array(sizes)


def _deal(patients: np.ndarray, batch: np.ndarray, steps: int, rng: np.random.Generator) -> np.ndarray:
    """Which of n images each of M draws takes, [M]: pass after pass over all of them, each patient's spread out.

    patients: [n] codes; batch: [M] the batch of each draw, ascending. In each pass the images lie sorted by patient and
    are dealt like cards, to the batches in turn and in proportion to the places they have: a patient is in a batch
    twice only if it has more images than the pass has batches.
    """
    n, passes = len(patients), -(-len(batch) // len(patients))
    _, patients = np.unique(patients, return_inverse=True)
    by_patient = rng.random((passes, patients.max() + 1))[:, patients]  # [passes, n], patients in random order
    cards = np.lexsort((rng.random((passes, n)), by_patient), axis=-1)
    # The last pass ends early: it takes an image of each patient, then a second of each, and so on.
    last = patients[cards[-1]]
    first = np.r_[0, np.flatnonzero(np.diff(last)) + 1]  # where each patient's cards begin
    nth = np.arange(n) - first[np.searchsorted(first, np.arange(n), side="right") - 1]
    taken = np.sort(np.argsort(nth, kind="stable")[: len(batch) - (passes - 1) * n])
    cards = np.r_[cards[:-1].ravel(), cards[-1, taken]]

    lap = np.arange(len(batch)) // n
    # Where the places of each batch begin; of one in which a pass ends, those of each pass.
    start = np.flatnonzero(np.r_[True, (np.diff(batch) > 0) | (np.diff(lap) > 0)])
    places = np.diff(np.r_[start, len(batch)])
    place = np.arange(len(batch)) - np.repeat(start, places)
    # The batches take their turns in random order, or batches that follow one another would show the same patients.
    turn = (place + rng.permutation(steps)[batch] / steps) / np.repeat(places, places)
    dealt = np.empty(len(batch), np.int64)
    dealt[np.lexsort((turn, lap))] = cards
    return dealt
