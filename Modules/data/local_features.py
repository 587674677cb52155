"""Local features of pictures, and the pairs of pictures that share them in one geometric arrangement.

SIFT (Lowe, "Distinctive image features from scale-invariant keypoints", 2004) as square roots of its histograms
(Arandjelović and Zisserman, "Three things everyone should know to improve object retrieval", 2012), of a picture and of
its mirror image. Descriptors are compared within visual words (Sivic and Zisserman, "Video Google", 2003), matches vote
for a pair of pictures and a common rotation and scale (Jégou, Douze and Schmid, "Hamming embedding and weak geometric
consistency", 2008), and RANSAC counts the matches that one affine map explains. Nothing is trained.
"""

import itertools
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import cv2
import numpy as np
from tqdm import tqdm

SIDE = 192  # pixels; every picture is squashed to this square first, so that copies of any aspect look alike
# Diameters in pixels: as many features of each range, for the small ones would crowd the others out.
_SIZES = (0, 3, 6, 12, np.inf)
_PER_SIZE = 45
_CONTRAST = 0.008  # SIFT's threshold; its own 0.04 leaves a smooth lesion without a single feature
_STRETCH = 1.5  # horizontally, so that copies of another aspect look alike: 2:1 and 1:1 then differ by 4:3 at most
_UNIT = 512  # the length of a descriptor
_SIMILAR = 0.85  # cosine of two descriptors that may show the same detail
_PROBES = 3  # words that each descriptor is looked up in
_NEAREST = 4  # matches that each descriptor may have in a word
_VOTES = 3  # matches of one picture's features with another's that make the two a candidate
_BLOCK = 4096  # descriptors compared with all words together
_CHUNK = 500  # pictures looked up together
_REACH = 4.0  # pixels; how far from its place a match may lie
_MAX_STRETCH = 2.5  # at most, between the two axes of the affine map
_ZOOM = 4.0  # at most, from one picture to the other
_MIRROR = np.arange(128).reshape(4, 4, 8)[::-1][:, :, -np.arange(8) % 8].ravel()  # descriptor of the mirror image


class Features(NamedTuple):
    """The local features of one picture, squashed to [SIDE, SIDE]."""

    points: np.ndarray  # float32 [n, 4]: x, y, diameter (pixels), angle (degrees)
    descriptors: np.ndarray  # uint8 [n, 128], of about equal length
    plain: int  # so many rows come first that show the picture as it is; the others saw it stretched

    def mirrored(self) -> "Features":
        """Those of the picture turned upside down (top to bottom)."""
        x, y, size, angle = self.points.T
        return Features(np.stack([x, SIDE - 1 - y, size, -angle], axis=1), self.descriptors[:, _MIRROR], self.plain)

    def rows(self, stretched: bool) -> slice:
        return slice(self.plain, None) if stretched else slice(self.plain)


def describe(image: np.ndarray) -> Features:
    """The features of a grey picture, uint8 [SIDE, SIDE]; none on a blank one."""
    plain, stretched = (
        _sift(image),
        _sift(cv2.resize(image, (SIDE, round(SIDE / _STRETCH)), interpolation=cv2.INTER_AREA)),
    )
    stretched[0][:, 1] *= _STRETCH
    return Features(*(np.concatenate(pair) for pair in zip(plain, stretched, strict=True)), len(plain[0]))


def _sift(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Points [n, 4] and descriptors [n, 128] as in Features, the strongest of each range of sizes."""
    sift = cv2.SIFT_create(contrastThreshold=_CONTRAST)
    found = sorted(sift.detect(image, None), key=lambda point: -point.response)
    kept = []
    for low, high in itertools.pairwise(_SIZES):
        kept += [point for point in found if low <= point.size < high][:_PER_SIZE]
    if not kept:
        return np.empty((0, 4), np.float32), np.empty((0, 128), np.uint8)
    kept, histograms = sift.compute(image, kept)
    points = np.array([(*point.pt, point.size, point.angle) for point in kept], np.float32)
    roots = np.sqrt(histograms / np.maximum(histograms.sum(axis=1, keepdims=True), 1))
    return points, np.minimum(np.rint(_UNIT * roots), 255).astype(np.uint8)


def candidate_pairs(features: Sequence[Features], seed: int = 0) -> np.ndarray:
    """The pairs of pictures of which several similar features agree on one rotation and scale.

    int64 [P, 3], rows (i, j, mirrored) in ascending order: picture i, turned upside down where mirrored is 1 and
    perhaps stretched, looks like picture j. Time grows with the 3/2 power of the number of features.
    """
    plain = [(one.points[: one.plain], one.descriptors[: one.plain]) for one in features]
    points, descriptors = (np.concatenate(column) for column in zip(*plain, strict=True))
    if len(points) == 0:
        return np.empty((0, 3), np.int64)
    owner = np.repeat(np.arange(len(features)), [one.plain for one in features])
    words = _Words(descriptors, owner, seed)

    def ask(job: tuple[int, int, int]) -> np.ndarray:
        begin, mirrored, stretched = job
        chunk = [one.mirrored() if mirrored else one for one in features[begin : begin + _CHUNK]]
        asking = [(one.points[one.rows(stretched)], one.descriptors[one.rows(stretched)]) for one in chunk]
        own_points, own_descriptors = (np.concatenate(column) for column in zip(*asking, strict=True))
        asker = np.repeat(np.arange(begin, begin + len(chunk)), [len(one[0]) for one in asking])
        row, match = words.similar(own_descriptors, asker)
        (size, angle), (other_size, other_angle) = own_points[row, 2:].T, points[match, 2:].T
        pairs = _elected(asker[row], owner[match], other_angle - angle, np.log2(other_size / size))
        return np.column_stack([pairs, np.full(len(pairs), mirrored)])

    jobs = list(itertools.product(range(0, len(features), _CHUNK), (0, 1), (0, 1)))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = list(tqdm(pool.map(ask, jobs), "look for shared details", len(jobs), ncols=80, disable=None))
    return np.unique(np.concatenate(found), axis=0)


class _Words:
    """Descriptors, each filed under the nearest of some √(2 n) of their own number, drawn at random."""

    def __init__(self, descriptors: np.ndarray, owner: np.ndarray, seed: int):
        rng = np.random.default_rng(seed)
        count = int(np.ceil(np.sqrt(2 * len(descriptors))))
        self.words = descriptors[np.sort(rng.choice(len(descriptors), min(count, len(descriptors)), replace=False))]
        self.words = self.words.T.astype(np.float32)
        word = self._nearest(descriptors, 1)[:, 0]
        self.order = np.argsort(word, kind="stable")
        self.start = np.searchsorted(word[self.order], np.arange(self.words.shape[1] + 1))
        self.descriptors, self.owner = descriptors[self.order], owner[self.order]

    def _nearest(self, descriptors: np.ndarray, count: int) -> np.ndarray:
        """The `count` words nearest to each descriptor: int64 [n, count]."""
        nearest = [np.empty((0, count), np.int64)]
        for begin in range(0, len(descriptors), _BLOCK):
            nearest.append(_largest(descriptors[begin : begin + _BLOCK].astype(np.float32) @ self.words, count))
        return np.concatenate(nearest)

    def similar(self, descriptors: np.ndarray, asker: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(rows of `descriptors` [n, 128], rows of the filed ones) that are alike and of different pictures."""
        probes = min(_PROBES, self.words.shape[1])
        word = self._nearest(descriptors, probes).ravel()
        order = np.argsort(word, kind="stable")
        start = np.searchsorted(word[order], np.arange(self.words.shape[1] + 1))
        rows, matches = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        for w in range(self.words.shape[1]):
            row, filed = order[start[w] : start[w + 1]] // probes, slice(self.start[w], self.start[w + 1])
            if len(row) == 0 or filed.start == filed.stop:
                continue
            likeness = descriptors[row].astype(np.float32) @ self.descriptors[filed].T.astype(np.float32)
            likeness[asker[row][:, None] == self.owner[filed]] = 0
            best = _largest(likeness.copy(), min(_NEAREST, likeness.shape[1]))
            a, k = np.nonzero(np.take_along_axis(likeness, best, axis=1) >= _SIMILAR * _UNIT**2)
            rows.append(row[a])
            matches.append(self.order[filed][best[a, k]])
        return np.concatenate(rows), np.concatenate(matches)


def _largest(values: np.ndarray, count: int) -> np.ndarray:
    """Columns of the `count` largest of each row, largest first: int64 [n, count]. Overwrites `values` (≥ 0).

    For a few columns `argmax` over and over is ten times as fast as `argpartition`.
    """
    row, best = np.arange(len(values)), np.empty((len(values), count), np.int64)
    for k in range(count):
        best[:, k] = values.argmax(axis=1)
        values[row, best[:, k]] = -1
    return best


def _elected(first: np.ndarray, second: np.ndarray, turn: np.ndarray, zoom: np.ndarray) -> np.ndarray:
    """The pairs [P, 2] with _VOTES matches of one turn (degrees) and zoom (octaves) between `first` and `second`."""
    pairs, pair, matches = np.unique(first * (1 << 32) + second, return_inverse=True, return_counts=True)
    several = matches[pair] >= _VOTES
    pair, turn, zoom = pair[several], turn[several] % 360, zoom[several]
    elected = np.zeros(len(pairs), bool)
    for shift in (0, 0.5):  # in two overlapping grids, for one may part the matches of a true pair
        pose = np.floor(turn / 45 + shift) % 8 * 16 + np.clip(np.floor(zoom + shift) + 8, 0, 15)
        cell, votes = np.unique(pair * 128 + pose.astype(np.int64), return_counts=True)
        elected[cell[votes >= _VOTES] // 128] = True
    return np.column_stack(np.divmod(pairs[elected], 1 << 32))


def align(one: Features, other: Features) -> tuple[np.ndarray | None, int]:
    """The affine map that takes one picture's points to the other's, and how many matches it explains.

    float64 [2, 3] in pixels of the [SIDE, SIDE] squares, or None with 0 where no plausible map explains any.
    """
    likeness = one.descriptors.astype(np.float32) @ other.descriptors[: other.plain].T.astype(np.float32)
    if min(likeness.shape) == 0:
        return None, 0
    best, best_other = likeness.argmax(axis=1), likeness.argmax(axis=0)
    row = np.flatnonzero(best_other[best] == np.arange(len(best)))
    source, target = (np.ascontiguousarray(side[:, :2]) for side in (one.points[row], other.points[best[row]]))
    if len(row) < 3:
        return None, 0
    matrix, explained = cv2.estimateAffine2D(source, target, ransacReprojThreshold=_REACH, maxIters=2000)
    if matrix is None:
        return None, 0
    large, small = np.linalg.svd(matrix[:, :2], compute_uv=False)
    if small < 1 / _ZOOM or large > _ZOOM or large > _MAX_STRETCH * small:
        return None, 0
    # Several features at one place are one piece of evidence.
    places = [np.unique(np.rint(side[explained.ravel() > 0] / _REACH), axis=0) for side in (source, target)]
    return matrix, min(map(len, places))
