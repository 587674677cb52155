"""From the manifest to batches: which images, in which order, changed how, and the same after any interruption."""

from dataclasses import replace
from itertools import islice

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataset import (
    epoch_batches,
    image_batches,
    load_manifest,
    select,
    training_batches,
    vector_batches,
    view_batches,
)
from Modules.cli import UserError
from Modules.config import Recipe, recipe_named
from Modules.data.images import read_image

SIZE, BATCH = 32, 8
properties = settings(max_examples=60, deadline=None)


def recipe_with(batches="shuffled", batch_size=BATCH) -> Recipe:
    recipe = recipe_named("lightweight")
    return replace(
        recipe,
        data=replace(recipe.data, image_size=SIZE, batch_size=batch_size),
        embedding=replace(recipe.embedding, batches=batches),
    )


RECIPE = recipe_with()


@pytest.fixture(scope="module")
def manifest(balanced):
    return load_manifest(balanced)


@pytest.fixture(scope="module")
def training(manifest):
    return select(manifest, "train")


def taken(batches, n=None):
    """The images and targets of `n` batches, one after another."""
    images, targets = zip(*islice(batches.as_numpy_iterator(), n), strict=True)
    return np.concatenate(images), np.concatenate(targets)


# --- The manifest and its splits --------------------------------------------------------------------------------------


def test_the_manifest_names_the_files(manifest, balanced):
    used = manifest[manifest["split"] != "excluded"]
    assert len(used) > 60
    for row in used.itertuples():
        assert row.file == str(balanced / row.path)
        assert read_image(row.file, SIZE).shape == (SIZE, SIZE, 3)


def test_a_fold_becomes_the_test_split(balanced, manifest):
    for fold in (0, 1):
        turned = load_manifest(balanced, fold)
        assert set(turned.loc[turned["split"] == "test", "isic_id"]) == set(
            manifest.loc[manifest["fold"] == fold, "isic_id"]
        )
        assert (turned.loc[turned["split"] == "test", "file"] != "").all()


def test_a_folder_without_manifest_is_the_users_to_mend(tmp_path):
    with pytest.raises(UserError, match=str(tmp_path)):
        load_manifest(tmp_path)


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_the_balanced_set_is_half_malignant_and_part_of_all(manifest, split):
    half, everything = select(manifest, split), select(manifest, split, full=True)
    assert half["target"].mean() == 0.5
    assert set(everything["isic_id"]) == set(manifest.loc[manifest["split"] == split, "isic_id"])
    assert set(half["isic_id"]) < set(everything["isic_id"])
    assert list(half.index) == list(range(len(half)))


def test_external_images_are_for_training_alone(manifest):
    mixed = manifest.copy()
    chosen = mixed.index[mixed["split"] == "train"][:5]
    mixed.loc[chosen, "split"] = "external"
    assert set(select(mixed, "train", full=True)["isic_id"]) == set(
        manifest.loc[manifest["split"] == "train", "isic_id"]
    )
    outside = set(mixed.loc[chosen, "isic_id"])
    for split in ("validation", "test"):
        assert not outside & set(select(mixed, split, full=True)["isic_id"])


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(("keep", "found"), [(0, 0), (1, 1)])
def test_a_split_needs_two_images_of_each_class(manifest, full, keep, found):
    malignant = manifest.index[(manifest["split"] == "test") & (manifest["target"] == 1) & manifest["balanced"]]
    with pytest.raises(UserError, match=f"test split has {found} images of one class"):
        select(manifest.drop(malignant[keep:]), "test", full)


# --- The order of an epoch --------------------------------------------------------------------------------------------


@st.composite
def tables(draw):
    targets = [0, 1, *draw(st.lists(st.integers(0, 1), max_size=30))]
    patients = draw(st.lists(st.sampled_from("abcdef"), min_size=len(targets), max_size=len(targets)))
    return pd.DataFrame({"target": targets, "patient_id": patients})


@given(
    table=tables(),
    kind=st.sampled_from(["shuffled", "class"]),
    size=st.integers(2, 12),
    full=st.booleans(),
    seed=st.integers(0, 2**32),
)
@properties
def test_every_epoch_has_as_many_full_batches_and_depends_on_nothing_before_it(table, kind, size, full, seed):
    recipe = recipe_with(kind, size)
    epochs = [epoch_batches(table, recipe, full, seed, epoch) for epoch in range(6)]
    assert {epoch.shape for epoch in epochs} == {epochs[0].shape}
    assert all(((epoch >= 0) & (epoch < len(table))).all() for epoch in epochs)
    np.testing.assert_array_equal(epoch_batches(table, recipe, full, seed, 4), epochs[4])


@given(table=tables(), size=st.integers(1, 40), seed=st.integers(0, 2**32))
@properties
def test_an_epoch_shows_an_image_once_and_leaves_less_than_a_batch(table, size, seed):
    shown = epoch_batches(table, recipe_with(batch_size=size), False, seed, 0).ravel()
    assert len(set(shown)) == len(shown)
    assert len(table) - len(shown) < size
    assert len(shown) > 0


def test_what_one_epoch_leaves_out_another_shows(training):
    epochs = [epoch_batches(training, RECIPE, False, 0, epoch) for epoch in range(10)]
    assert epochs[0].size < len(training)
    assert set(np.ravel(epochs)) == set(range(len(training)))


def test_the_full_set_is_trained_on_half_and_half(manifest):
    table = select(manifest, "train", full=True)
    targets = table["target"].to_numpy()
    most = (targets == 0).sum()
    assert targets.mean() < 0.4
    positions = epoch_batches(table, recipe_with(batch_size=2 * most), True, 0, 0)
    assert targets[positions].mean() == 0.5
    assert set(positions.ravel()) == set(range(len(table)))


def test_class_batches_hold_both_classes_alike(manifest):
    table = select(manifest, "train", full=True)
    positions = epoch_batches(table, recipe_with("class"), True, 0, 0)
    assert (table["target"].to_numpy()[positions].mean(axis=1) == 0.5).all()


def test_an_unknown_kind_of_batches_names_the_nearest(training):
    with pytest.raises(UserError, match="'clas': did you mean class"):
        epoch_batches(training, recipe_with("clas"), False, 0, 0)


# --- Training batches -------------------------------------------------------------------------------------------------


def test_training_batches_are_pictures_and_classes(training):
    batches, steps = training_batches(training, RECIPE, seed=0)
    assert steps == len(training) // BATCH
    for images, targets in islice(batches.as_numpy_iterator(), steps):
        assert (images.shape, images.dtype) == ((BATCH, SIZE, SIZE, 3), np.uint8)
        assert (targets.shape, targets.dtype) == ((BATCH,), np.int32)
        assert 128 < images.max() <= 255
        assert set(targets) <= {0, 1}


def test_training_targets_belong_to_their_images(training):
    plain = replace(RECIPE, data=replace(RECIPE.data, flips=False, rotation=0, brightness=0, noise=0))
    known = {read_image(row.file, SIZE).tobytes(): row.target for row in training.itertuples()}
    images, targets = taken(training_batches(training, plain, seed=0)[0], 8)
    assert [known[image.astype(np.uint8).tobytes()] for image in images] == list(targets)


def test_a_seed_gives_the_same_bytes_and_another_seed_others(training):
    (first, targets), (again, targets_again), (other, _) = (
        taken(training_batches(training, RECIPE, seed)[0], 3) for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(targets, targets_again)
    assert not {image.tobytes() for image in first} & {image.tobytes() for image in other}


@pytest.mark.parametrize(("kind", "full"), [("shuffled", False), ("shuffled", True), ("class", True)])
def test_a_stream_started_later_goes_on_as_one_that_never_stopped(manifest, kind, full):
    recipe = recipe_with(kind, batch_size=11)
    table = select(manifest, "train", full)
    whole, steps = training_batches(table, recipe, 0, full)
    late, late_steps = training_batches(table, recipe, 0, full, start=2)
    assert steps == late_steps
    images, targets = taken(whole, 2 * steps + 2)
    late_images, late_targets = taken(late, 2)
    np.testing.assert_array_equal(images[2 * steps * 11 :], late_images)
    np.testing.assert_array_equal(targets[2 * steps * 11 :], late_targets)


def test_an_image_looks_different_in_every_epoch_and_place(training):
    one_image = training.iloc[[0] * 3 * BATCH]
    images, _ = taken(training_batches(one_image, RECIPE, 0)[0], 2 * 3)
    assert len({image.tobytes() for image in images}) == 2 * 3 * BATCH


def test_no_autotuning_thread_keeps_a_pass_from_ending(training):
    vectors = vector_batches(VECTORS, TARGETS, 4, 0)[0]
    for batches in (training_batches(training, RECIPE, 0)[0], image_batches(training, RECIPE.data), vectors):
        assert batches.options().autotune.enabled is False


# --- Images in order --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["validation", "test"])
def test_images_that_judge_are_never_changed(manifest, split):
    table = select(manifest, split, full=True)
    images, targets = taken(image_batches(table, RECIPE.data))
    np.testing.assert_array_equal(images, [read_image(file, SIZE) for file in table["file"]])
    np.testing.assert_array_equal(targets, table["target"])
    assert images.dtype == np.uint8


def test_views_come_in_order_and_all_differ(training):
    images, targets = taken(view_batches(training, RECIPE.data, views=3, seed=0))
    assert len({image.tobytes() for image in images}) == len(images) == 3 * len(training)
    np.testing.assert_array_equal(targets, np.tile(training["target"], 3))
    again, _ = taken(view_batches(training, RECIPE.data, views=3, seed=0))
    np.testing.assert_array_equal(images, again)


def test_a_view_without_augmentation_is_the_image(training):
    plain = replace(RECIPE.data, flips=False, rotation=0, brightness=0, noise=0)
    images, _ = taken(view_batches(training, plain, views=2, seed=0))
    np.testing.assert_array_equal(images, np.tile(taken(image_batches(training, plain))[0], (2, 1, 1, 1)))


def test_no_view_repeats_one_that_the_embedding_was_trained_on(training):
    """In the same order, so that only the seed can tell the two streams apart."""
    one = training.iloc[:1]
    _, steps = training_batches(one, recipe_with(batch_size=1), 0)
    trained, _ = taken(training_batches(one, recipe_with(batch_size=1), 0)[0], 4 * steps)
    seen, _ = taken(view_batches(one, RECIPE.data, views=4, seed=0))
    assert not {image.tobytes() for image in trained} & {image.tobytes() for image in seen}


# --- Vectors ----------------------------------------------------------------------------------------------------------

VECTORS = np.repeat(np.arange(21, dtype=np.float32)[:, None], 3, axis=1)
TARGETS = np.arange(21, dtype=np.float32) % 5


def test_vectors_keep_their_targets_and_each_comes_once():
    batches, steps = vector_batches(VECTORS, TARGETS, 4, seed=0)
    vectors, targets = taken(batches, steps)
    assert (steps, vectors.shape, targets.shape) == (5, (20, 3), (20, 1))
    np.testing.assert_array_equal(targets[:, 0], vectors[:, 0] % 5)
    assert len(set(vectors[:, 0])) == 20


def test_vectors_start_at_any_epoch():
    (whole, _), (late, _) = (
        taken(vector_batches(VECTORS, TARGETS, 4, 0, start)[0], 25 - 5 * start) for start in (0, 3)
    )
    np.testing.assert_array_equal(whole[60:], late[:40])
    assert not np.array_equal(whole[:20], whole[20:40])


def test_an_epoch_sees_one_view_of_each_image_and_the_next_epoch_the_next():
    """21 vectors as 3 views of 7 images."""
    batches, steps = vector_batches(VECTORS, TARGETS, 7, seed=0, views=3)
    vectors, _ = taken(batches, 4)
    assert steps == 1
    for epoch, seen in enumerate(vectors[:, 0].reshape(4, 7)):
        assert sorted(seen) == [epoch % 3 * 7 + k for k in range(7)]


def test_fewer_vectors_than_a_batch_are_one_batch():
    batches, steps = vector_batches(VECTORS, TARGETS.astype(np.int64), 100, seed=0)
    vectors, targets = taken(batches, 1)
    assert steps == 1
    assert sorted(vectors[:, 0]) == list(range(21))
    assert targets.dtype == np.int64
