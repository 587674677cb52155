"""Each property that training relies on, over random tables of classes and patients."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from Modules.cli import UserError
from Modules.metric_learning.sampling import class_batches, group_codes, metric_labels, oversampled, shuffled

properties = settings(max_examples=60, deadline=None)
seeds = st.integers(0, 2**31)
patient = st.one_of(st.none(), st.sampled_from(["a", "b", "c", "d"]))


@st.composite
def tables(draw, classes=7, size=60):
    """Targets [N] of at least one class, and patients [N], some of them missing."""
    targets = draw(st.lists(st.integers(0, classes - 1), min_size=1, max_size=size))
    patients = draw(st.lists(patient, min_size=len(targets), max_size=len(targets)))
    return np.array(targets), np.array(patients, object)


def times_seen(order, n):
    return np.bincount(np.ravel(order), minlength=n)


def even(counts):
    return counts.max() - counts.min() <= 1


def test_labels_name_the_patient_where_positives_must_come_from_another():
    assert metric_labels([1, 0, 1], None, "any").tolist() == [1, 0, 1]
    labels = metric_labels([1, 0, 1, 1], np.array(["b", None, "b", None], object), "other-patient")
    assert labels.dtype == np.int32
    assert labels[:, 0].tolist() == [1, 0, 1, 1]
    assert labels[0, 1] == labels[2, 1]
    assert len(set(labels[:, 1])) == 3


def test_group_codes_number_names_and_keep_missing_ones_apart():
    codes = group_codes(["a", None, "b", "a", float("nan"), None])
    assert codes[0] == codes[3]
    assert len(set(codes)) == 5


def test_group_codes_of_nothing():
    assert group_codes([]).tolist() == []


@properties
@given(st.integers(0, 50), seeds)
def test_shuffled_shows_every_image_once(n, seed):
    assert sorted(shuffled(n, seed, 0)) == list(range(n))


def test_order_follows_seed_and_epoch():
    targets = np.arange(200) % 2
    for draw in (
        lambda *when: shuffled(200, *when),
        lambda *when: oversampled(targets, *when),
        lambda *when: class_batches(targets, None, 16, *when),
    ):
        assert np.array_equal(draw(1, 3), draw(1, 3))
        assert not np.array_equal(draw(1, 3), draw(1, 4))
        assert not np.array_equal(draw(1, 3), draw(2, 3))


@properties
@given(tables(), seeds)
def test_oversampled_gives_classes_the_same_share_and_repeats_evenly(table, seed):
    targets, _ = table
    order = oversampled(targets, seed, 0)
    seen = times_seen(order, len(targets))
    values, sizes = np.unique(targets, return_counts=True)
    for value, size in zip(values, sizes, strict=True):
        assert seen[targets == value].sum() == sizes.max()
        assert even(seen[targets == value])
        assert seen[targets == value].min() >= 1
        assert size < sizes.max() or seen[targets == value].max() == 1


def test_oversampled_mixes_the_classes():
    order = oversampled(np.repeat([0, 1], [900, 100]), 0, 0)
    assert 350 < (order[:900] >= 900).sum() < 550  # 450 expected; 900 if the classes followed one another


@properties
@given(tables(), st.integers(1, 40), seeds)
def test_class_batches(table, batch_size, seed):
    targets, patients = table
    values = np.unique(targets)
    batches = class_batches(targets, patients, batch_size, seed, 0)

    assert batches.shape[1] == batch_size  # full
    seen = times_seen(batches, len(targets))
    assert len(seen) == len(targets)  # no position out of range
    assert seen.min() >= 1
    expected = min(len(values), max(1, batch_size // 2))
    for batch in batches:
        shares = np.unique(targets[batch], return_counts=True)[1]
        assert len(shares) == expected
        assert even(shares)
    for value in values:
        assert even(seen[targets == value])
        in_time = [row[targets[row] == value] for row in batches]
        first_pass, members = np.concatenate(in_time), (targets == value).sum()
        # All are seen before any is seen again, up to the batch in which the pass over the class ends.
        whole = np.cumsum([len(row) for row in in_time])
        until = whole[whole <= members].max(initial=0)
        assert len(set(first_pass[:until])) == until


@properties
@given(st.integers(1, 60), st.integers(1, 60), st.integers(2, 20), seeds)
def test_class_batches_of_two_classes_are_half_and_half(benign, malignant, half, seed):
    targets = np.repeat([0, 1], [benign, malignant])
    batches = class_batches(targets, None, 2 * half, seed, 0)
    assert (targets[batches].sum(axis=1) == half).all()
    assert len(batches) == -(-max(benign, malignant) // half)  # and no more than it takes


@properties
@given(st.lists(st.integers(1, 12), min_size=4, max_size=30), st.integers(4, 16), seeds)
def test_a_batch_holds_as_many_patients_as_possible(images_of_patient, size, seed):
    patients = np.repeat(np.arange(len(images_of_patient)), images_of_patient)
    batches = class_batches(np.zeros(len(patients), int), patients, size, seed, 0)
    full = len(patients) // size
    for batch in batches[:full]:  # the last may be filled up with a second look at some
        for n, images in zip(np.bincount(patients[batch]), images_of_patient, strict=False):
            assert n <= -(-images // full)
            assert n <= -(-images * size // len(patients)) + 1


def test_patients_are_spread_over_batches_of_which_one_is_partly_filled():
    patients = np.repeat(np.arange(10), 10)
    first, last = class_batches(np.zeros(100, int), patients, 64, 0, 0)  # the last: 36 images, and 28 seen again
    assert np.bincount(patients[first]).max() <= 8  # 6.4 on average
    assert np.bincount(patients[last]).max() <= 9


def test_batches_that_follow_one_another_show_different_patients():
    patients = np.repeat(np.arange(64), 8)
    batches = patients[class_batches(np.zeros(512, int), patients, 8, 0, 0)]
    shared = [len(set(one) & set(other)) for one, other in pairwise(batches)]
    assert np.mean(shared) < 2  # 0.9 by chance; 7 if each patient went from a batch to the next


def test_classes_take_turns_where_a_batch_has_not_all():
    targets = np.arange(140) % 7
    batches = class_batches(targets, None, 8, 0, 0)
    assert all(set(np.bincount(targets[batch])) <= {0, 2} for batch in batches)  # 4 classes of 7
    assert np.ptp(np.bincount(targets[batches.ravel()])) <= 2
    assert len(batches) == 18  # 7 classes x 10 shares of 2 images, four shares a batch


def test_missing_patients_are_each_their_own():
    targets = np.zeros(64, int)
    unknown = class_batches(targets, None, 8, 0, 0)
    assert np.array_equal(unknown, class_batches(targets, np.full(64, None), 8, 0, 0))
    assert np.array_equal(unknown, class_batches(targets, np.arange(64), 8, 0, 0))


def test_fewer_images_than_a_batch_are_repeated():
    batches = class_batches(np.array([0, 0, 1]), None, 8, 0, 0)
    assert batches.shape == (1, 8)
    assert times_seen(batches, 3).tolist() == [2, 2, 4]


def test_every_part_of_a_batch_has_both_classes():
    targets = np.arange(400) % 2
    halves = class_batches(targets, None, 64, 0, 0).reshape(-1, 32)
    assert all(0 < targets[half].sum() < 32 for half in halves)


@pytest.mark.parametrize("draw", [lambda t: oversampled(t, 0, 0), lambda t: class_batches(t, None, 8, 0, 0)])
def test_no_images_is_the_users_error(draw):
    with pytest.raises(UserError, match="no images"):
        draw(np.array([], int))
