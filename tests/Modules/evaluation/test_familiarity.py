"""What the model knows: the layer that is looked at, the distance, and the limit."""

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

import modules
from Modules.config import Embedding, recipe_named
from Modules.evaluation import familiarity


@pytest.mark.parametrize(
    ("backbone", "size", "layer"),
    [
        ("mobilenet", 256, "conv_pw_5_relu"),
        ("mobilenet", 96, "conv_pw_5_relu"),
        ("inception_v3", 256, "mixed2"),
        ("resnet50", 128, "conv3_block4_out"),
    ],
)
def test_the_texture_comes_from_an_eighth_of_the_side(backbone, size, layer):
    model = modules.build_backbone(Embedding(backbone=backbone), size)
    assert familiarity.texture_layer(model).name == layer


def test_beside_the_original_the_texture_is_of_a_layer_that_never_learned():
    """Else validation images that were learned from would look more familiar than new ones."""
    config = recipe_named("tuned").embedding
    network = modules.beside(modules.build_embedding(config, 96), modules.build_backbone(config, 96), False)
    layer = familiarity.texture_layer(modules.averaged(network, config.averaged_views))
    assert layer.name.startswith("original_")


def test_the_texture_is_the_root_of_mean_and_deviation_of_each_map():
    tf.keras.utils.set_random_seed(0)
    images = tf.keras.Input((40, 40, 3))
    x = tf.keras.layers.ReLU(name="fine")(tf.keras.layers.Conv2D(4, 3)(images))
    x = tf.keras.layers.ReLU()(tf.keras.layers.Conv2D(9, 3, strides=12)(x))
    model = tf.keras.Model(images, x)
    pictures = np.random.default_rng(0).uniform(0, 255, (3, 40, 40, 3)).astype(np.float32)
    maps = tf.keras.Model(images, model.get_layer("fine").output)(pictures).numpy()
    expected = np.sqrt(np.concatenate([maps.mean((1, 2)), maps.std((1, 2))], axis=1))
    found = tf.keras.Model(images, familiarity.texture(model))(pictures)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_the_distance_is_that_of_mahalanobis():
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(3, 3))
    textures = rng.normal(size=(5000, 3)) @ mixing + [5, -2, 7]
    centre, whitening = familiarity.fit(textures)
    points = rng.normal(size=(20, 3)) * 10
    inverse = np.linalg.inv(mixing.T @ mixing)
    expected = [np.log(np.sqrt((p - [5, -2, 7]) @ inverse @ (p - [5, -2, 7]))) for p in points]
    found = familiarity.distance(points, {"centre": centre, "whitening": whitening})
    np.testing.assert_allclose(found, expected, atol=0.06)


@given(st.integers(2, 5), st.integers(1, 8), st.sampled_from([0.0, 1e-3, 1.0, 1e3]))
def test_few_images_and_dead_maps_leave_everything_finite(n, width, scale):
    textures = np.random.default_rng(0).normal(size=(n, width)).astype(np.float32) * scale
    textures[:, 0] = 0
    centre, whitening = familiarity.fit(textures)
    distances = familiarity.distance(textures + 1, {"centre": centre, "whitening": whitening})
    assert np.isfinite(distances).all()
    assert np.isfinite(familiarity.limit(distances))


@pytest.mark.parametrize("n", [100, 114, 2000])
@pytest.mark.parametrize("family", ["normal", "gumbel", "exponential"])
def test_at_most_two_in_a_hundred_lie_beyond_the_limit_whatever_the_distribution(n, family):
    draw = getattr(np.random.default_rng(0), family)
    limits = [familiarity.limit(draw(size=n)) for _ in range(400)]
    refused = (draw(size=10_000) > np.array(limits)[:, None]).mean()
    assert 0.5 * familiarity.FALSE_ALARMS < refused < 1.05 * familiarity.FALSE_ALARMS


@pytest.mark.parametrize("n", [1, 2, 48])
def test_of_few_images_the_limit_is_the_largest(n):
    distances = np.random.default_rng(n).normal(size=n)
    assert familiarity.limit(distances) == distances.max()


def test_the_limit_of_a_hundred_is_the_second_largest():
    assert familiarity.limit(np.arange(100.0)) == 98
