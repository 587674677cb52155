"""The neighbour search against brute force, and the hash of a picture's views."""

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from Modules.data.hashing import MAX_RADIUS, VIEWS, close_pairs, phash, view
from Modules.data.synthetic import draw

words = st.lists(st.integers(0, 2**64 - 1), max_size=12)
flips = st.lists(st.tuples(st.integers(0, 11), st.sets(st.integers(0, 63), max_size=9)), max_size=12)


def brute(hashes, others, radius):
    """Every pair by Python's own count of bits."""
    alone = others is None
    return [
        [i, j, distance]
        for i, one in enumerate(hashes)
        for j, other in enumerate(hashes if alone else others)
        if (distance := (int(one) ^ int(other)).bit_count()) <= radius and (i < j or not alone)
    ]


def near(hashes, changes):
    """`hashes` and copies of them with a few bits turned over."""
    copies = [hashes[k % len(hashes)] ^ sum(1 << bit for bit in bits) for k, bits in changes] if hashes else []
    return np.array([*hashes, *copies], np.uint64)


@given(words, flips, st.integers(0, MAX_RADIUS))
@settings(max_examples=150, deadline=None)
def test_search_equals_brute_force(hashes, changes, radius):
    hashes = near(hashes, changes)
    assert close_pairs(hashes, radius=radius).tolist() == brute(hashes, None, radius)


@given(words, words, flips, st.integers(0, MAX_RADIUS))
@settings(max_examples=100, deadline=None)
def test_search_between_two_sets_equals_brute_force(hashes, others, changes, radius):
    hashes, others = near(hashes, []), near([*hashes, *others], changes)
    assert close_pairs(hashes, others, radius).tolist() == brute(hashes, others, radius)


def test_every_planted_neighbour_is_found_among_many():
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**64, 20_000, np.uint64)
    distance = np.arange(2_000) % (MAX_RADIUS + 1)
    bits = np.argsort(rng.random((2_000, 64)), axis=1)
    masks = np.where(np.arange(64) < distance[:, None], np.uint64(1) << bits.astype(np.uint64), 0).astype(np.uint64)
    copies = hashes[:2_000] ^ np.bitwise_or.reduce(masks, axis=1)
    found = close_pairs(np.concatenate([hashes, copies]))
    planted = np.column_stack([np.arange(2_000), 20_000 + np.arange(2_000), distance])
    # By chance two of 20,000 random hashes come within 7 bits with a probability of 0.8 %.
    assert found.tolist() == planted.tolist()


def test_equal_hashes_are_all_pairs():
    assert len(close_pairs(np.zeros(300, np.uint64))) == 300 * 299 // 2


@pytest.mark.parametrize("radius", [-1, 8])
def test_a_radius_that_could_miss_is_refused(radius):
    with pytest.raises(ValueError, match=r"exact for 0\.\.7"):
        close_pairs(np.zeros(2, np.uint64), radius=radius)


def test_hash_is_opencvs_and_knows_the_views():
    image = cv2.cvtColor(draw(np.random.default_rng(1), malignant=False)[0], cv2.COLOR_RGB2GRAY)
    hashes = phash(image)
    small = cv2.resize(image, (32, 32), interpolation=cv2.INTER_AREA)
    assert hashes.dtype == np.uint64
    for k in range(VIEWS):
        assert hashes[k : k + 1].view(np.uint8).tolist() == cv2.img_hash.pHash(view(small, k)).ravel().tolist()
        assert phash(view(image, k))[0] == hashes[k]
    assert len(set(hashes.tolist())) == VIEWS
