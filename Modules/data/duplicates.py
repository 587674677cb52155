"""Near-duplicates: which files show the same picture, whatever was done to it on the way.

Found are copies that were re-encoded, resized, made brighter or of more contrast, mirrored, turned by quarters, cropped
or reframed (another section, aspect and colour of one photograph, or of one lesion photographed twice). Candidates come
from two searches that do not compare every picture with every other: perceptual hashes within a few bits (`hashing`),
and local features that agree on one affine map (`local_features`). A candidate counts only if the two, laid over one
another, agree in their fine detail: two moles on similar skin are alike in outline and colour, but not in that.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pandas as pd
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from Modules.data.hashing import VIEWS, close_pairs, phash, read_grey, view
from Modules.data.images import BLANK, ImageError
from Modules.data.local_features import SIDE, Features, align, candidate_pairs, describe

_HASH_RADIUS = 2  # bits; within 7 each real picture has a dozen others, all of them of other lesions
_MATCHES = 7  # that one affine map has to explain; three always are, and by chance up to six
_OVERLAP = 0.05  # of the square, which the two pictures must share
_LEAST = 0.45  # deviation of `_detail` under which there is too little to tell: bands and blocks of a smooth gradient
_DRIFT = 0.1  # of the square's side, how far refining may move a corner of the map it was given
# Pixels: the finest detail looked at, the coarsest, and the surroundings against which its contrast is measured.
_DETAIL = 1.0, 3.0, 8.0
_NOISE = 1.0  # grey levels; detail fainter than this is taken for compression noise
_CORNERS = np.array([[0, 0], [SIDE - 1, 0], [SIDE - 1, SIDE - 1], [0, SIDE - 1]], float)


def near_duplicates(paths: Sequence[str | os.PathLike]) -> pd.DataFrame:
    """The pairs of files that show the same picture.

    Columns: `first`, `second` (positions in `paths`, first < second, ascending), `kind` ("same picture, re-encoded",
    "mirrored or turned", "cropped" or "reframed") and `score` (to 1, the correlation of their fine detail). Files
    that can't be read and blank pictures match nothing. The result does not depend on the number of cores.
    """
    # OpenCV and numpy release the interpreter's lock; each call of theirs then does best on one core.
    with ThreadPoolExecutor(os.cpu_count()) as pool, threadpool_limits(1, "blas"):
        described = list(tqdm(pool.map(_describe, paths), "describe pictures", len(paths), ncols=80, disable=None))
        usable = [k for k, one in enumerate(described) if one is not None]
        maps = _candidates([described[k] for k in usable]) if len(usable) > 1 else {}

        def confirm(pair: tuple[int, int]) -> tuple[int, int, str, float]:
            first, second = usable[pair[0]], usable[pair[1]]
            images = read_grey(paths[first], SIDE), read_grey(paths[second], SIDE)
            found = [agreement(*map(square, images), matrix) for matrix in maps[pair]]
            score, needed, matrix = max(found, key=lambda one: one[0] - one[1])
            return (first, second, _kind(matrix), score) if score >= needed else None

        pairs = sorted(maps)
        rows = list(tqdm(pool.map(confirm, pairs), "compare pictures", len(pairs), ncols=80, disable=None))
    table = pd.DataFrame([row for row in rows if row], columns=["first", "second", "kind", "score"])
    return table.astype({"first": int, "second": int, "kind": object, "score": float})


def _describe(path: str | os.PathLike) -> tuple[np.ndarray, Features] | None:
    """Hashes and local features; None where there is nothing to see."""
    try:
        image = square(read_grey(path, SIDE))
    except ImageError:
        return None
    return (phash(image), describe(image)) if image.std() >= BLANK else None


def _candidates(described: list[tuple[np.ndarray, Features]]) -> dict[tuple[int, int], list[np.ndarray]]:
    """For each pair (i < j) that may show the same picture, the affine maps [2, 3] that may take i's points to j's."""
    hashes, features = zip(*described, strict=True)
    hashes, maps = np.array(hashes), {}
    for k in range(VIEWS):
        for i, j, _ in close_pairs(hashes[:, k], None if k == 0 else hashes[:, 0], _HASH_RADIUS).tolist():
            if i < j:
                maps.setdefault((i, j), []).append(_VIEW_MAPS[k])

    def fit(candidate: list[int]) -> tuple[np.ndarray | None, int]:
        i, j, mirrored = candidate
        return align(features[i].mirrored() if mirrored else features[i], features[j])

    candidates = candidate_pairs(features).tolist()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        fits = tqdm(pool.map(fit, candidates), "align details", len(candidates), ncols=80, disable=None)
        for (i, j, mirrored), (matrix, matches) in zip(candidates, fits, strict=True):
            if matches >= _MATCHES:
                matrix = _joined(matrix, _UPSIDE_DOWN) if mirrored else matrix
                maps.setdefault((min(i, j), max(i, j)), []).append(
                    matrix if i < j else cv2.invertAffineTransform(matrix)
                )
    return maps


def agreement(one: np.ndarray, other: np.ndarray, matrix: np.ndarray) -> tuple[float, float, np.ndarray]:
    """How far two pictures agree in their fine detail if `matrix` takes the points of `one` to those of `other`.

    `one`, `other`: uint8 [SIDE, SIDE]; `matrix`: float64 [2, 3]. Returns the correlation (-1..1), what it must reach to
    count, and the map it was found with: `matrix` or, where that does not suffice, `matrix` refined.
    """
    if abs(np.linalg.det(matrix[:, :2])) > 1.001:  # lay the larger over the smaller: detail can be lost but not made up
        score, needed, inverse = agreement(other, one, cv2.invertAffineTransform(matrix))
        return score, needed, cv2.invertAffineTransform(inverse)
    one, other = one.astype(np.float32), other.astype(np.float32)
    found = *_correlation(one, other, matrix), matrix
    if found[0] >= found[1]:
        return found
    refined = _refine(one, other, matrix)
    return max(found, (*_correlation(one, other, refined), refined), key=lambda x: x[0] - x[1])


def _correlation(one: np.ndarray, other: np.ndarray, matrix: np.ndarray) -> tuple[float, float]:
    """The correlation of the detail where the two pictures overlap, and what it must reach there."""
    shrink = 1 / np.sqrt(abs(np.linalg.det(matrix[:, :2])))
    smooth = _blur(one, 0.5 * np.sqrt(shrink**2 - 1)) if shrink > 1.1 else one  # or finer detail would alias
    laid = cv2.warpAffine(smooth, matrix, (SIDE, SIDE), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    seen = cv2.warpAffine(_visible(one), matrix, (SIDE, SIDE), flags=cv2.INTER_NEAREST) & _visible(other)
    seen = cv2.erode(seen, np.ones((7, 7), np.uint8), borderValue=0) > 0
    overlap = seen.mean()
    if overlap < _OVERLAP:
        return 0.0, 1.0
    a, b = _detail(laid)[seen], _detail(other)[seen]
    if min(a.std(), b.std()) < _LEAST:
        return 0.0, 1.0
    return float(np.corrcoef(a, b)[0, 1]), 0.2 + 0.05 / np.sqrt(overlap)


def _refine(one: np.ndarray, other: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """`matrix` moved to where the blurred pictures correlate best; as it was where that leads astray.

    Evangelidis and Psarakis, "Parametric image alignment using enhanced correlation coefficient maximization", 2008.
    """
    start = cv2.invertAffineTransform(matrix).astype(np.float32)
    until = (cv2.TERM_CRITERIA_COUNT | cv2.TERM_CRITERIA_EPS, 30, 1e-4)
    try:
        _, found = cv2.findTransformECC(_blur(other, 1.5), _blur(one, 1.5), start, cv2.MOTION_AFFINE, until, None, 5)
    except cv2.error:  # it does not converge
        return matrix
    drift = np.abs(_moved(found) - _moved(start)).max()
    return cv2.invertAffineTransform(found.astype(float)) if drift <= _DRIFT * SIDE else matrix


def _detail(image: np.ndarray) -> np.ndarray:
    """The fine detail, of equal contrast everywhere, so that a ruler or a hair counts for no more than bare skin."""
    fine, coarse, around = _DETAIL
    detail = _blur(image, fine) - _blur(image, coarse)
    return detail / np.sqrt(_blur(detail**2, around) + _NOISE**2)


def _visible(image: np.ndarray) -> np.ndarray:
    """uint8 [SIDE, SIDE]: 1 but for the black or white around a round field of view, whose edge all share."""
    return cv2.erode(((image > 8) & (image < 247)).astype(np.uint8), np.ones((9, 9), np.uint8))


def _kind(matrix: np.ndarray) -> str:
    drift = [np.abs(_moved(matrix) - _moved(straight)).max() / SIDE for straight in _VIEW_MAPS]
    nearest = int(np.argmin(drift))
    if drift[nearest] > 0.12:  # 5 % of each side cut off move the corners by 0.056, a little more if only one is
        return "reframed"
    if nearest:
        return "mirrored or turned"
    return "cropped" if drift[0] > 0.02 else "same picture, re-encoded"


def _moved(matrix: np.ndarray) -> np.ndarray:
    """Where a map takes the corners of the square: [4, 2]."""
    return _CORNERS @ matrix[:, :2].T + matrix[:, 2]


def _joined(second: np.ndarray, first: np.ndarray) -> np.ndarray:
    """The map that does what `first` and then what `second` does: [2, 3]."""
    return second @ np.vstack([first, [0, 0, 1]])


def _view_map(k: int) -> np.ndarray:
    """The map that takes the points of a picture to those of its view k."""
    y, x = np.meshgrid(np.arange(SIDE), np.arange(SIDE), indexing="ij")
    turned = np.stack([view(x, k), view(y, k)], axis=-1)  # at each place of the view, where it comes from
    inverse, _ = cv2.estimateAffine2D(_CORNERS, turned[[0, 0, -1, -1], [0, -1, -1, 0]].astype(float))
    return np.rint(cv2.invertAffineTransform(inverse))


def _blur(image: np.ndarray, sigma: float) -> np.ndarray:
    return cv2.GaussianBlur(image, (0, 0), sigma)


def square(image: np.ndarray) -> np.ndarray:
    """A grey picture as it is hashed and described: uint8 [SIDE, SIDE]."""
    return cv2.resize(image, (SIDE, SIDE), interpolation=cv2.INTER_AREA)


_VIEW_MAPS = [_view_map(k) for k in range(VIEWS)]
_UPSIDE_DOWN = np.array([[1.0, 0, 0], [0, -1, SIDE - 1]])
