"""The heat map: where it must be hot is known, for a model with one view and for one that averages several."""

from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow as tf
from matplotlib.text import Text

from Modules.evaluation import explanation, figures, scoring
from Modules.evaluation.evidence import Evidence, Neighbour

layers = tf.keras.layers
SIZE = 96


def spot_model(several: bool) -> tf.keras.Model:
    """Red speaks for, green against: 8 x 8 maps of each, pooled. `several`: mirrored views go the same way."""
    images = tf.keras.Input((SIZE, SIZE, 3))
    pool, active = layers.AveragePooling2D(12), layers.ReLU()
    features = layers.GlobalAveragePooling2D(name="features")
    dense = layers.Dense(3, use_bias=False, kernel_initializer=tf.keras.initializers.Constant(np.eye(3)))
    views = [images]
    if several:
        mirror = layers.Dense(
            SIZE, use_bias=False, kernel_initializer=tf.keras.initializers.Constant(np.eye(SIZE)[::-1])
        )
        views.append(layers.Permute((1, 3, 2))(mirror(layers.Permute((1, 3, 2))(images))))
    seen = [dense(features(active(pool(one)))) for one in views]
    x = layers.Average()(seen) if several else seen[0]
    x = layers.UnitNormalization(name="embedding")(x)
    weights = tf.keras.initializers.Constant([[5.0], [-5.0], [0.0]])
    x = layers.Dense(1, kernel_initializer=weights)(x)
    return tf.keras.Model(images, layers.Activation("sigmoid", name="probability")(x))


@pytest.fixture(params=[False, True], ids=["one view", "several views"])
def saved_model(request, tmp_path):
    """Saved, loaded and frozen, as predict.py has it."""
    spot_model(request.param).save(tmp_path / "model.keras")
    model = tf.keras.models.load_model(tmp_path / "model.keras", compile=False, safe_mode=True)
    model.trainable = False
    return model


def spots():
    """A red spot above left, a green one below right."""
    image = np.full((SIZE, SIZE, 3), 20, np.uint8)
    image[12:24, 12:24, 0] = image[72:84, 72:84, 1] = 250
    return image


def heat_maps(model, picture, known=()):
    run = scoring.compiled(tf.keras.Model(model.inputs, [model.output, model.get_layer("embedding").output]))
    return explanation.heat_maps(run, picture, np.float32(known).reshape(-1, 3))


def test_it_is_hot_where_painting_over_lowers_the_score(saved_model):
    heats = heat_maps(saved_model, spots(), [0, 1, 0])
    assert heats.shape == (2, 8, 8)
    near = np.zeros((2, 8, 8))  # a patch of 3 x 3 cells reaches a spot from the 8 cells around it
    near[0, :3, :3] = near[1, 5:, 5:] = 1  # the probability: red; the similarity to a green lesion: green
    np.testing.assert_allclose(heats, near, atol=1e-5)


def test_each_value_is_the_fall_of_the_score(saved_model):
    rng = np.random.default_rng(0)
    picture, known = rng.integers(0, 256, (SIZE, SIZE, 3)).astype(np.uint8), np.float32([1, 0, 0])
    embed = tf.keras.Model(saved_model.input, saved_model.get_layer("embedding").output)

    def scores(pixels):
        probability = saved_model(pixels[None].astype(np.float32)).numpy().astype(np.float64)[0, 0]
        return np.array(
            [np.log(probability / (1 - probability)), embed(pixels[None].astype(np.float32)).numpy()[0] @ known]
        )

    falls = np.zeros((2, 8, 8))
    for y, x in np.ndindex(8, 8):
        covered = picture.astype(float)
        covered[max(0, 12 * (y - 1)) : 12 * (y + 2), max(0, 12 * (x - 1)) : 12 * (x + 2)] = np.median(picture, (0, 1))
        falls[:, y, x] = np.maximum(scores(picture.astype(float)) - scores(covered), 0)
    np.testing.assert_allclose(
        heat_maps(saved_model, picture, known), falls / falls.max(axis=(1, 2), keepdims=True), atol=2e-2
    )


def test_where_nothing_speaks_for_the_score_it_is_cold(saved_model):
    green = np.zeros((SIZE, SIZE, 3), np.uint8)
    green[..., 1] = 200
    heats = heat_maps(saved_model, green)
    assert heats.shape == (1, 8, 8)
    assert not heats.any()


@pytest.mark.parametrize("size", [32, 75, 96, 331])
def test_the_patches_cover_the_whole_picture_and_the_first_is_untouched(size):
    picture = np.random.default_rng(0).integers(1, 255, (size, size, 3)).astype(np.uint8)
    picture[: size // 2] = 255
    painted = explanation._painted_over(picture)
    assert painted.shape == (65, size, size, 3)
    np.testing.assert_array_equal(painted[0], picture)
    changed = (painted[1:] != picture).any(axis=3)
    assert changed.any(axis=0)[size // 2 :].all()
    middle = changed[4 * 8 + 4]
    assert middle.sum() == pytest.approx((3 * size / 8) ** 2, rel=0.35)


def test_the_overlay_leaves_the_picture_where_it_is_cold():
    picture = np.full((20, 30, 3), 90, np.uint8)
    np.testing.assert_array_equal(explanation.overlay(picture, np.zeros((3, 3), np.float32)), picture)
    heat = np.zeros((2, 3), np.float32)
    heat[0, 0] = 1
    shown = explanation.overlay(picture, heat)
    assert shown.shape == picture.shape
    assert shown[0, 0, 0] > shown[0, 0, 2]  # red where it is hottest
    np.testing.assert_array_equal(shown[-1, -1], picture[-1, -1])


@pytest.mark.parametrize("familiar", [True, False])
@pytest.mark.parametrize("neighbours", [0, 2, 9])
def test_a_sheet_can_be_drawn_of_any_evidence(familiar, neighbours, tmp_path):
    known = {"thumbnails": np.zeros(0, np.uint8), "thumbnail_ends": np.zeros(9, int)}
    result = {"recall": 0.8, "specificity": None}
    checkpoint = SimpleNamespace(gallery=known, threshold=0.4, prevalence=0.02, facts={"test": result})
    evidence = Evidence(
        0.7 if familiar else None,
        0.1 if familiar else None,
        "malignant" if familiar else "unlike known lesions",
        familiar,
        3.0,
        tuple(Neighbour(i, f"ISIC_{i}", "benign", "", 0.5) for i in range(neighbours)),
        0.0,
    )
    picture = np.full((16, 16, 3), 99, np.uint8)
    heats = np.zeros((1 + neighbours, 2, 2), np.float32) if familiar else None
    figure = explanation.sheet("a name", picture, evidence, heats, checkpoint)
    figures.save(figure, tmp_path / "sheet.png")
    words = " ".join(text.get_text() for text in figure.findobj(Text))
    assert ("0.700" in words) == familiar
    assert ("No probability" in words) != familiar
