"""A saved model made ready to score many pictures: the same function with less to compute."""

import numpy as np
import tensorflow as tf

layers = tf.keras.layers


def optimised(model: tf.keras.Model, policy: str = "float32") -> tf.keras.Model:
    """`model` with each BatchNorm folded into the convolution before it and its backbone computing in `policy`.

    In inference BatchNorm is a scale and an offset a channel, which the convolution's own weights can carry (Jacob et
    al., CVPR 2018, section 3.2). Layers keep their names; what comes after the backbone stays float32, as in training.

    Args:
        policy: `float32`, `mixed_bfloat16` or `mixed_float16`.
    """
    folded = _foldable(model)
    removed = {norm.name for norm in folded.values()}
    names = [layer.name for layer in model.layers]
    # Dense and Permute are the flips of averaged views.
    fixed = layers.InputLayer, layers.Dense, layers.Permute, layers.GlobalAveragePooling2D
    backbone = {
        layer.name
        for layer in model.layers[: names.index("features")]
        if not layer.name.endswith("preprocess") and not isinstance(layer, fixed)
    }

    def clone(layer: tf.keras.layers.Layer) -> tf.keras.layers.Layer:
        if layer.name in removed:
            return layers.Identity(name=layer.name, dtype=policy)
        config = layer.get_config()
        if layer.name in folded:
            config["use_bias"] = True
        if layer.name in backbone:
            config["dtype"] = policy
        return type(layer).from_config(config)

    copy = tf.keras.models.clone_model(model, clone_function=clone)
    for layer in model.layers:
        if layer.name not in removed:
            norm = folded.get(layer.name)
            copy.get_layer(layer.name).set_weights(_folded(layer, norm) if norm else layer.get_weights())
    return copy


def _foldable(model: tf.keras.Model) -> dict[str, tf.keras.layers.Layer]:
    """Name of a convolution: the BatchNorm that, in every view, is all that reads it."""
    found = {}
    for norm in model.layers:
        if isinstance(norm, layers.BatchNormalization):
            convolution = norm.inbound_nodes[0].inbound_layers
            readers = {node.layer for node in getattr(convolution, "outbound_nodes", ())}
            if isinstance(convolution, (layers.Conv2D, layers.DepthwiseConv2D)) and readers == {norm}:
                found[convolution.name] = norm
    return found


def _folded(convolution: tf.keras.layers.Layer, norm: tf.keras.layers.Layer) -> list[np.ndarray]:
    """Kernel and bias of `convolution` followed by `norm`."""
    kernel, bias = [*convolution.get_weights(), np.float32(0)][:2]
    scale = 1 / np.sqrt(norm.moving_variance.numpy() + norm.epsilon)
    if norm.scale:
        scale = scale * norm.gamma.numpy()
    offset = (bias - norm.moving_mean.numpy()) * scale
    if norm.center:
        offset = offset + norm.beta.numpy()
    if isinstance(convolution, layers.DepthwiseConv2D):  # its kernel is [h, w, C, 1]
        return [kernel * scale[:, None], offset]
    return [kernel * scale, offset]
