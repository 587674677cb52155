"""Random views: what each amount may change, and what it must leave alone."""

from dataclasses import replace

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from Modules.config import Data, recipe_named
from Modules.data.augmentation import DRAWS, GREY, affine, augment, colour_matrix, draws

NOTHING = Data(flips=False, rotation=0, zoom=0, brightness=0, contrast=0, saturation=0, hue=0, noise=0)
properties = settings(max_examples=50, deadline=None)
amounts = st.floats(0, 1)


def picture(size=24, seed=0):
    """Random pixels that cannot be written to: a view must never change its picture."""
    image = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    image.flags.writeable = False
    return image


def grey(size=64, value=128):
    return np.full((size, size, 3), value, np.uint8)


def drawn(seed):
    return draws(seed, 0, 0, 0, 1)[0]


def views(image, config, n=20):
    return [augment(image, config, drawn(seed)) for seed in range(n)]


# --- What is drawn ----------------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 2**64), place=st.integers(0, 2**40), before=st.integers(0, 40), count=st.integers(1, 40))
@properties
def test_a_view_depends_on_its_place_alone_and_not_on_where_a_batch_begins(seed, place, before, count):
    together = draws(seed, 3, 1, place, before + count)
    assert together.shape == (before + count, DRAWS)
    np.testing.assert_array_equal(draws(seed, 3, 1, place + before, count), together[before:])


def test_no_two_views_are_drawn_alike():
    asked = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 50)]
    numbers = np.concatenate([draws(*one, 50) for one in asked]).ravel()
    assert len(np.unique(numbers)) == len(numbers)
    others = np.random.default_rng((0, 0)).random(9), np.random.default_rng(0).random(9)  # what shuffles an epoch
    assert not np.isin(numbers, others).any()
    assert 0 <= numbers.min() < 0.01 < 0.99 < numbers.max() < 1


# --- The whole --------------------------------------------------------------------------------------------------------


@given(
    size=st.integers(8, 40),
    flips=st.booleans(),
    values=st.tuples(amounts, st.floats(0, 0.9), *[amounts] * 5),
    seed=st.integers(0, 2**64),
)
@properties
def test_every_amount_gives_a_picture_of_the_same_shape_and_type(size, flips, values, seed):
    names = ("rotation", "zoom", "brightness", "contrast", "saturation", "hue", "noise")
    config = Data(flips=flips, **dict(zip(names, values, strict=True)))
    image = picture(size)
    before = image.copy()
    view = augment(image, config, drawn(seed))
    assert (view.shape, view.dtype) == (image.shape, np.uint8)
    np.testing.assert_array_equal(image, before)
    np.testing.assert_array_equal(view, augment(image, config, drawn(seed)))


@pytest.mark.parametrize("size", [15, 24])
def test_nothing_changes_where_every_amount_is_zero(size):
    for view in views(picture(size), NOTHING):
        np.testing.assert_array_equal(view, picture(size))


@pytest.mark.parametrize("name", ["lightweight", "full", "margin"])
def test_views_of_the_recipes_differ_and_stay_pictures(name):
    image = cv2.GaussianBlur(picture(64), (0, 0), 4)
    seen = views(image, recipe_named(name).data)
    assert len({view.tobytes() for view in seen}) == len(seen)
    assert all(view.std() > image.std() / 3 for view in seen)


def test_global_random_state_has_no_part():
    config = recipe_named("lightweight").data
    np.random.seed(1)  # noqa: NPY002
    first = views(picture(), config, 3)
    np.random.seed(2)  # noqa: NPY002
    np.testing.assert_array_equal(first, views(picture(), config, 3))


# --- Geometry ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [15, 24])
def test_flips_are_the_four_mirror_images_and_nothing_else(size):
    image = picture(size)
    expected = {np.ascontiguousarray(image[::a, ::b]).tobytes() for a in (1, -1) for b in (1, -1)}
    assert {view.tobytes() for view in views(image, replace(NOTHING, flips=True), 40)} == expected


def test_a_quarter_turn_is_that_of_numpy():
    turned = cv2.warpAffine(picture(), affine(24, np.pi / 2, 1, (1, 1)), (24, 24), flags=cv2.INTER_LINEAR)
    assert any(np.array_equal(turned, np.rot90(picture(), times)) for times in (1, 3))


@given(angle=st.floats(-7, 7), scale=st.floats(0.1, 3), flip=st.tuples(*[st.sampled_from([-1, 1])] * 2))
@properties
def test_the_centre_stays_and_lengths_scale_alike(angle, scale, flip):
    size = 31
    matrix = affine(size, angle, scale, flip)
    np.testing.assert_allclose(matrix @ [15, 15, 1], [15, 15], atol=1e-9)
    np.testing.assert_allclose(matrix[:, :2] @ matrix[:, :2].T, scale**2 * np.eye(2), atol=1e-9)
    assert np.sign(np.linalg.det(matrix[:, :2])) == flip[0] * flip[1]


@pytest.mark.parametrize("amount", [{"rotation": 1.0}, {"zoom": 0.5}, {"zoom": 0.99}, {"rotation": 0.3, "zoom": 0.3}])
def test_no_border_comes_into_the_picture(amount):
    for view in views(grey(value=200), replace(NOTHING, **amount)):
        np.testing.assert_array_equal(view, grey(value=200))


def test_rotation_keeps_what_is_round_and_so_the_mean_colour():
    y, x = np.mgrid[-1:1:64j, -1:1:64j]
    bump = np.exp(-3 * (x**2 + y**2))
    image = (np.stack([200 * bump, 255 - 200 * bump, 100 + 50 * bump], axis=-1)).astype(np.uint8)
    inside = np.hypot(x, y) < 0.95
    for view in views(image, replace(NOTHING, rotation=1.0)):
        assert np.abs(view[inside].astype(int) - image[inside]).max() <= 3
        np.testing.assert_allclose(view.mean((0, 1)), image.mean((0, 1)), atol=4)


def test_rotation_reaches_as_far_as_it_is_told():
    """A bright spot right of the centre stays within the angle, and comes near it on both sides."""
    image = np.zeros((65, 65, 3), np.uint8)
    cv2.circle(image, (56, 32), 4, (255, 255, 255), -1)
    angles = []
    for view in views(image, replace(NOTHING, rotation=0.125), 60):
        y, x = np.argwhere(view[..., 0] > 128).mean(0) - 32
        angles.append(np.degrees(np.arctan2(y, x)))
    assert 38 < max(angles) < 46
    assert -46 < min(angles) < -38


# --- Colour -----------------------------------------------------------------------------------------------------------


def test_the_neutral_colour_matrix_is_the_identity():
    np.testing.assert_allclose(colour_matrix(0, 1, 1, 0, mean=90), np.eye(3, 4), atol=1e-12)


@given(st.floats(-10, 10))
@properties
def test_hue_keeps_grey_and_the_distance_to_it(angle):
    matrix = colour_matrix(0, 1, 1, angle, mean=90)[:, :3]
    np.testing.assert_allclose(matrix @ np.ones(3), np.ones(3), atol=1e-9)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(3), atol=1e-9)


def test_a_third_of_the_colour_circle_turns_red_into_green():
    matrix = colour_matrix(0, 1, 1, 2 * np.pi / 3, mean=90)[:, :3]
    np.testing.assert_allclose(matrix, [[0, 0, 1], [1, 0, 0], [0, 1, 0]], atol=1e-9)


def test_no_saturation_is_luma():
    colours = np.random.default_rng(0).uniform(0, 255, (10, 3))
    greys = colours @ colour_matrix(0, 1, 0, 0, mean=90)[:, :3].T
    np.testing.assert_allclose(greys, np.repeat(colours @ GREY[:, None], 3, axis=1))
    assert GREY.sum() == pytest.approx(1)


@given(contrast=st.floats(0, 2), shift=st.floats(-100, 100))
@properties
def test_contrast_keeps_the_mean_and_brightness_moves_it(contrast, shift):
    colours = np.random.default_rng(0).uniform(0, 255, (50, 3))
    matrix = colour_matrix(shift, contrast, 1, 0, mean=colours.mean())
    changed = colours @ matrix[:, :3].T + matrix[:, 3]
    assert changed.mean() == pytest.approx(colours.mean() + shift)
    assert changed.std() == pytest.approx(contrast * colours.std())


@pytest.mark.parametrize("name", ["contrast", "saturation", "hue"])
def test_a_grey_picture_keeps_its_colour_but_for_brightness(name):
    for view in views(grey(), replace(NOTHING, **{name: 1.0})):
        np.testing.assert_allclose(view, grey(), atol=1)


def test_brightness_reaches_as_far_as_it_is_told_either_way():
    found = views(grey(), replace(NOTHING, brightness=0.2), 200)
    assert all((view == view[0, 0, 0]).all() for view in found)
    moved = [int(view[0, 0, 0]) - 128 for view in found]
    assert -51 <= min(moved) < -45
    assert 45 < max(moved) <= 51


def test_colours_end_at_black_and_white_and_do_not_wrap():
    config = replace(NOTHING, brightness=0.2, noise=0.03)
    dark, bright = np.array(views(grey(value=2), config)), np.array(views(grey(value=253), config))
    assert (dark.min(), bright.max()) == (0, 255)
    assert dark.max() < 128 < bright.min()


# --- Noise ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("deviation", [0.01, 0.03, 0.1])
def test_noise_has_the_deviation_asked_for_and_no_bias(deviation):
    for view in views(grey(), replace(NOTHING, noise=deviation), 5):
        difference = view.astype(float) - 128
        assert difference.std() == pytest.approx(255 * deviation, rel=0.05)
        assert abs(difference.mean()) < 255 * deviation / 20


def test_noise_of_two_views_has_nothing_in_common():
    noise = [view.ravel().astype(float) - 128 for view in views(grey(), replace(NOTHING, noise=0.1), 8)]
    assert np.abs(np.corrcoef(noise) - np.eye(8)).max() < 0.05
