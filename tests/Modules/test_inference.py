"""What is made ready for scoring says what the saved model says."""

import numpy as np
import pytest
import tensorflow as tf

import modules
from Modules.config import Classifier, Embedding
from Modules.evaluation import evidence
from Modules.inference import optimised

SIZE = 32


@pytest.fixture(scope="module")
def model() -> tf.keras.Model:
    """A model of two averaged views and two backbones whose BatchNorm does something, as after training."""
    tf.keras.utils.set_random_seed(0)
    config = Embedding(backbone="mobilenet", averaged_views=2, beside_original=True)
    network, original = modules.build_embedding(config, SIZE), modules.build_backbone(config, SIZE)
    rng = np.random.default_rng(0)
    for layer in network.layers + original.layers:
        if isinstance(layer, tf.keras.layers.BatchNormalization):
            layer.set_weights([rng.uniform(0.5, 1.5, weight.shape) for weight in layer.get_weights()])
    embedding = modules.averaged(modules.beside(network, original, last=False), 2)
    return modules.join(embedding, modules.build_classifier(Classifier(), 1152), (5.0, 0.3))


def pictures(n: int = 4) -> np.ndarray:
    return np.random.default_rng(1).uniform(0, 255, (n, SIZE, SIZE, 3)).astype(np.float32)


def test_without_batch_norm_it_says_the_same(model):
    copy = optimised(model)
    assert not any(isinstance(layer, tf.keras.layers.BatchNormalization) for layer in copy.layers)
    for ours, theirs in zip(
        evidence.with_evidence(copy)(pictures()), evidence.with_evidence(model)(pictures()), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("depthwise", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("scale", "center"), [(False, True), (True, False), (True, True)])
def test_every_kind_of_convolution_and_batch_norm(depthwise, bias, scale, center):
    """ResNet50's convolutions have a bias, InceptionV3's BatchNorm no scale."""
    image = tf.keras.Input((8, 8, 3))
    random = {"kernel_initializer": "normal", "depthwise_initializer": "normal", "bias_initializer": "normal"}
    random.pop("kernel_initializer" if depthwise else "depthwise_initializer")
    kind = tf.keras.layers.DepthwiseConv2D(3, use_bias=bias, **random) if depthwise else None
    x = (kind or tf.keras.layers.Conv2D(5, 3, use_bias=bias, **random))(image)
    norm = tf.keras.layers.BatchNormalization(scale=scale, center=center)
    x = tf.keras.layers.GlobalAveragePooling2D(name="features")(tf.keras.layers.ReLU()(norm(x)))
    model = tf.keras.Model(image, x)
    rng = np.random.default_rng(0)
    norm.set_weights([rng.uniform(0.5, 1.5, weight.shape) for weight in norm.get_weights()])
    copy = optimised(model)
    assert len(copy.weights) == 2
    data = rng.uniform(0, 1, (2, 8, 8, 3)).astype(np.float32)
    np.testing.assert_allclose(copy(data), model(data), rtol=1e-4, atol=1e-6)


def test_a_lower_precision_is_the_backbones_alone_and_leaves_the_model_as_it_was(model):
    before = model.get_weights()
    copy = optimised(model, "mixed_bfloat16")
    assert copy.get_layer("conv1").compute_dtype == copy.get_layer("original_conv1").compute_dtype == "bfloat16"
    twice = ("preprocess", "features", "original_preprocess", "original_features", "original_embedding", "both")
    for name in (*twice, "mirror", "projection", "embedding", "calibration", "probability"):
        assert copy.get_layer(name).compute_dtype == "float32"
    assert all(weight.dtype == np.float32 for weight in copy.get_weights())
    np.testing.assert_allclose(copy(pictures()), model(pictures()), atol=0.02)
    assert {layer.compute_dtype for layer in model.layers} == {"float32"}
    for ours, theirs in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_batch_norm_after_anything_else_stays():
    image = tf.keras.Input((8, 8, 3))
    x = tf.keras.layers.Conv2D(4, 3, name="twice_read")(image)
    x = tf.keras.layers.Add()([tf.keras.layers.BatchNormalization(name="norm")(x), x])
    x = tf.keras.layers.GlobalAveragePooling2D(name="features")(tf.keras.layers.BatchNormalization(name="second")(x))
    model = tf.keras.Model(image, x)
    copy = optimised(model)
    for name in ("norm", "second"):
        assert isinstance(copy.get_layer(name), tf.keras.layers.BatchNormalization)
    data = np.random.default_rng(0).uniform(0, 1, (2, 8, 8, 3)).astype(np.float32)
    np.testing.assert_allclose(copy(data), model(data), rtol=1e-5)
