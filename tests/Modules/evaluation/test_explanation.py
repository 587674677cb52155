"""The heat map: where it must be hot is known, for a model with one view and for one that averages several."""

from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow as tf
from matplotlib.text import Text

from Modules.evaluation import explanation, figures
from Modules.evaluation.evidence import Evidence, Neighbour

layers = tf.keras.layers
SIZE = 32


def spot_model(several: bool) -> tf.keras.Model:
    """Red speaks for, green against: maps of 4 x 4 pixels each, pooled. `several`: mirrored views go the same way."""
    images = tf.keras.Input((SIZE, SIZE, 3))
    pool = layers.AveragePooling2D(4)
    features = layers.GlobalAveragePooling2D(name="features")
    dense = layers.Dense(3, use_bias=False, kernel_initializer=tf.keras.initializers.Constant(np.eye(3)))
    views = [images]
    if several:
        mirror = layers.Dense(
            SIZE, use_bias=False, kernel_initializer=tf.keras.initializers.Constant(np.eye(SIZE)[::-1])
        )
        views.append(layers.Permute((1, 3, 2))(mirror(layers.Permute((1, 3, 2))(images))))
    seen = [dense(features(pool(one))) for one in views]
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
    image = np.full((SIZE, SIZE, 3), 20, np.float32)
    image[4:8, 4:8, 0] = image[24:28, 24:28, 1] = 250
    return image


def test_it_is_hottest_where_the_score_comes_from(saved_model):
    green = np.float32([[[0, 1, 0]]])
    heats = explanation.explainer(saved_model)(spots()[None], green)
    assert heats.shape == (1, 2, 8, 8)
    assert np.unravel_index(heats[0, 0].argmax(), (8, 8)) == (1, 1)  # the probability: red
    assert np.unravel_index(heats[0, 1].argmax(), (8, 8)) == (6, 6)  # the similarity to a green lesion
    assert heats.min() >= 0
    assert heats[0].max(axis=(1, 2)).tolist() == [1, 1]


def test_it_is_grad_cam(saved_model):
    """Against the formula with numerical gradients of the pooled maps."""
    image = spots()
    pooled = image.reshape(8, 4, 8, 4, 3).mean((1, 3))
    kernel, bias = saved_model.layers[-2].get_weights()

    def logit(features):
        return float((features / np.linalg.norm(features) @ kernel + bias)[0])

    features = pooled.mean((0, 1)).astype(np.float64)
    gradient = [(logit(features + step) - logit(features - step)) / 2e-3 for step in np.eye(3) * 1e-3]
    expected = np.maximum(pooled @ gradient, 0)
    found = explanation.explainer(saved_model)(image[None], np.zeros((1, 0, 3)))
    np.testing.assert_allclose(found[0, 0], expected / expected.max(), atol=1e-2)


def test_where_nothing_speaks_for_the_score_it_is_cold(saved_model):
    green = np.zeros((1, SIZE, SIZE, 3), np.float32)
    green[..., 1] = 200
    heats = explanation.explainer(saved_model)(green, np.zeros((1, 0, 3)))
    assert heats.shape == (1, 1, 8, 8)
    assert np.isfinite(heats).all()


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
    heats = np.zeros((1 + neighbours, 2, 2), np.float32)
    figure = explanation.sheet("a name", picture, evidence, heats, checkpoint)
    figures.save(figure, tmp_path / "sheet.png")
    words = " ".join(text.get_text() for text in figure.findobj(Text))
    assert ("0.700" in words) == familiar
    assert ("No probability" in words) != familiar
