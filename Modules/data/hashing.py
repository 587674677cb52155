"""Perceptual hashes of pictures, and every pair of hashes within a few bits of one another.

The hash is OpenCV's pHash: the signs of the 64 lowest frequencies of a 32 by 32 thumbnail (Zauner, "Implementation and
benchmarking of perceptual image hash functions", 2010). The search is multi-index hashing (Norouzi, Punjani and Fleet,
"Fast exact search in Hamming space with multi-index hashing", 2014): of the 4 bands of 16 bits of two hashes at most 7
bits apart, one differs in at most 1 bit, so that looking up each band and its 16 neighbours finds every pair.
"""

import itertools
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np

from Modules.data.images import ImageError, decode

MAX_RADIUS = 7  # the largest distance that 4 bands with 1 bit of tolerance cannot miss: 4 * 2 - 1
VIEWS = 8  # four quarter turns, each also mirrored
_MIRROR = np.array([[1, -1] * 4], np.float32)  # the signs of a row's frequencies in the row's mirror image
_BANDS = 4
_SCALES = (
    cv2.IMREAD_REDUCED_GRAYSCALE_8,
    cv2.IMREAD_REDUCED_GRAYSCALE_4,
    cv2.IMREAD_REDUCED_GRAYSCALE_2,
    cv2.IMREAD_GRAYSCALE,
)
_BLOCK = 1 << 16  # candidate pairs compared together: arrays of 512 kB, which stay in the cache


def read_grey(path: str | os.PathLike, least: int) -> np.ndarray:
    """The picture at `path` in grey, see `decode_grey`. Raises ImageError, which names it."""
    try:
        return decode_grey(Path(path).read_bytes(), least)
    except OSError as error:
        raise ImageError(f"{os.fspath(path)}: {error.strerror}") from None


def decode_grey(data: bytes, least: int) -> np.ndarray:
    """The picture in `data` as uint8 [H, W], both at least `least` pixels where it has them.

    JPEGs are decoded at the smallest of the scales 1/8, 1/4, 1/2 and 1 that suffices, which saves most of the work on
    large photographs. Raises ImageError.
    """
    buffer = np.frombuffer(data, np.uint8)
    for scale in _SCALES if len(data) else ():
        image = cv2.imdecode(buffer, scale)
        if image is not None and min(image.shape) >= least:
            return image
    return cv2.cvtColor(decode(data), cv2.COLOR_RGB2GRAY)


def view(image: np.ndarray, k: int) -> np.ndarray:
    """View `k` (0..7) of `image` [H, W, ...]: turned left by k % 4 quarters, first mirrored left to right if k ≥ 4."""
    return np.ascontiguousarray(np.rot90(image[:, ::-1] if k >= 4 else image, k % 4))


def phash(image: np.ndarray) -> np.ndarray:
    """The 64-bit pHash of each of the 8 views of a grey picture: uint8 [H, W] to uint64 [8].

    Of one cosine transform: a mirrored picture has that with every other sign turned, a transposed one its transpose.
    """
    small = cv2.resize(image, (32, 32), interpolation=cv2.INTER_AREA)
    frequencies = cv2.dct(small.astype(np.float32))[:8, :8]
    frequencies[0, 0] = 0
    sides = frequencies, frequencies * _MIRROR  # as it is, and mirrored left to right
    views = np.stack([turn for side in sides for turn in _quarter_turns(side)])  # in the order of `view`
    signs = views > views.mean(axis=(1, 2), keepdims=True)
    return np.packbits(signs.reshape(VIEWS, 64), axis=1, bitorder="little").view(np.uint64).ravel()


def _quarter_turns(frequencies: np.ndarray) -> tuple[np.ndarray, ...]:
    """The lowest frequencies [8, 8] of a picture turned left by 0 to 3 quarters."""
    transposed = frequencies.T
    return frequencies, transposed * _MIRROR.T, frequencies * _MIRROR * _MIRROR.T, transposed * _MIRROR


def close_pairs(hashes: np.ndarray, others: np.ndarray | None = None, radius: int = MAX_RADIUS) -> np.ndarray:
    """Every pair of 64-bit hashes that differ in at most `radius` (0..7) bits, exactly.

    `hashes`, `others`: uint64 [N], [M]. Returns int64 [P, 3], ascending rows (i, j, distance): of
    `hashes[i]` and `others[j]`, or without `others` of `hashes[i]` and `hashes[j]`, i < j. Raises ValueError for any
    other radius.
    """
    if not 0 <= radius <= MAX_RADIUS:
        raise ValueError(f"radius {radius}: the search is exact for 0..{MAX_RADIUS}")
    left = np.ascontiguousarray(hashes, np.uint64)
    right = left if others is None else np.ascontiguousarray(others, np.uint64)
    flips = [0, *(1 << bit for bit in range(16))] if radius >= _BANDS else [0]
    found = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for band in range(_BANDS):
            left_band, right_band = left.view(np.uint16)[band::_BANDS], right.view(np.uint16)[band::_BANDS]
            i, j = np.argsort(left_band, kind="stable"), np.argsort(right_band, kind="stable")
            key, start = left_band[i], np.r_[0, np.cumsum(np.bincount(right_band, minlength=1 << 16))]
            sides = left[i], right[j]

            def search(flip: int, i=i, j=j, key=key, start=start, sides=sides) -> np.ndarray:
                row, probe = np.arange(len(key)), key ^ np.uint16(flip)
                first, last = start[probe], start[probe.astype(np.int64) + 1]
                if others is None:  # the two sides are one: meet each pair from one side only
                    first = np.maximum(first, row + 1)
                a, b, distance = _within(*sides, first, last, radius)
                return np.stack([i[a], j[b], distance], axis=1)

            found += pool.map(search, flips)
    pairs = np.concatenate(found)
    if others is None:
        pairs[:, :2].sort(axis=1)
    return np.unique(pairs, axis=0)


def _within(
    left: np.ndarray, right: np.ndarray, first: np.ndarray, last: np.ndarray, radius: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(a, b, distance) of all `left[a]`, `right[b]` within the radius, where b runs from first[a] to last[a] - 1."""
    rows = np.flatnonzero(last > first)
    ends = np.cumsum((last - first)[rows])
    cuts = np.searchsorted(ends, np.arange(0, ends[-1] if len(ends) else 0, _BLOCK)).tolist()
    found = [np.empty((3, 0), np.int64)]
    for begin, end in itertools.pairwise([*dict.fromkeys(cuts), len(rows)]):
        count = (last - first)[rows[begin:end]]
        a = np.repeat(rows[begin:end], count)
        # b counts up from first[a] within each run of equal a
        b = np.arange(len(a)) + np.repeat(first[rows[begin:end]] - np.cumsum(count) + count, count)
        distance = popcount(left[a] ^ right[b])
        near = np.flatnonzero(distance <= radius)
        found.append(np.stack([a[near], b[near], distance[near].astype(np.int64)]))
    return tuple(np.concatenate(found, axis=1))


def popcount(x: np.ndarray) -> np.ndarray:
    """The number of set bits of each uint64 (numpy has none of its own before 2.0); works in place."""
    x -= (x >> np.uint64(1)) & np.uint64(0x5555555555555555)
    y = (x >> np.uint64(2)) & np.uint64(0x3333333333333333)
    x &= np.uint64(0x3333333333333333)
    x += y
    x += x >> np.uint64(4)
    x &= np.uint64(0x0F0F0F0F0F0F0F0F)
    x *= np.uint64(0x0101010101010101)
    x >>= np.uint64(56)
    return x
