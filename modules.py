"""The networks: backbone -> dense -> unit-length embedding, the classifier on it, and the two joined.

Every network is flat and made of Keras's own layers with plain parameters, preprocessing included, so that the saved
file opens with `safe_mode` on and without this code.
"""

import socket
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import tensorflow as tf

from Modules import safe_model
from Modules.cli import UserError, nearest
from Modules.config import Classifier, Embedding
from Modules.model_schema import SIDE

layers = tf.keras.layers

# Name: (constructor, the scaling its published weights were trained with).
BACKBONES = {
    "inception_v3": (tf.keras.applications.InceptionV3, "-1..1"),
    "resnet50": (tf.keras.applications.ResNet50, "caffe"),
    "mobilenet": (tf.keras.applications.MobileNet, "-1..1"),
}
PATIENCE = 20  # seconds that a server may stay silent
SCALINGS = ("own", "0..1", "-1..1", "caffe")


def check_backbone(name: str) -> None:
    """Raises `UserError` for a backbone that is none of BACKBONES."""
    if name not in BACKBONES:
        raise UserError(f"unknown backbone {name!r}: {nearest(name, BACKBONES)}")


def preprocess(images: tf.Tensor, scaling: str) -> tf.Tensor:
    """Scale images [B, S, S, 3] from 0..255 to what a backbone expects, in float32 whatever the policy.

    `caffe` (ResNet50): blue, green, red with ImageNet's mean taken off, written as a fixed 1x1 convolution because the
    saved model may hold only layers with plain parameters.
    """
    if scaling == "0..1":
        return layers.Rescaling(1 / 255, dtype="float32", name="preprocess")(images)
    if scaling == "-1..1":
        return layers.Rescaling(1 / 127.5, offset=-1.0, dtype="float32", name="preprocess")(images)
    constant = tf.keras.initializers.Constant
    return layers.Conv2D(
        3,
        1,
        kernel_initializer=constant([[0, 0, 1], [0, 1, 0], [1, 0, 0]]),
        bias_initializer=constant([-103.939, -116.779, -123.68]),
        trainable=False,
        dtype="float32",
        name="preprocess",
    )(images)


class DownloadError(UserError):
    """The published weights can't be had from here."""


def weights_file(weights: str, backbone: str) -> str | None:
    """What `--weights` means for a backbone: `imagenet`, None (random), or the path of a file.

    Raises:
        UserError: neither a known word, nor a file, nor a folder that holds `<backbone>_notop.weights.h5`.
    """
    if weights in ("imagenet", "none"):
        return None if weights == "none" else weights
    path = Path(weights)
    if path.is_dir():
        path = path / f"{backbone}_notop.weights.h5"
    if not path.is_file():
        raise UserError(f"--weights {weights}: no file {path}; expected imagenet, none, a file, or a folder holding it")
    return str(path)


def pretrained(backbone: str, weights: str) -> list[np.ndarray] | None:
    """The weights of a whole backbone without its top, or None for random ones.

    Raises:
        UserError: unknown backbone, ImageNet's weights can't be downloaded, or a file does not fit.
    """
    check_backbone(backbone)
    source = weights_file(weights, backbone)
    if source is None:
        return None
    former = socket.getdefaulttimeout()
    socket.setdefaulttimeout(PATIENCE)  # Keras sets none
    try:
        with nullcontext(source) if source == "imagenet" else safe_model.checked_weights(Path(source)) as file:
            return BACKBONES[backbone][0](include_top=False, weights=str(file)).get_weights()
    except Exception as error:  # urllib, h5py and Keras each raise their own
        if source == "imagenet":
            raise DownloadError(
                f"ImageNet weights of {backbone} can't be downloaded. Three ways out: connect and retry; "
                f"--weights PATH, a file or a folder with {backbone}_notop.weights.h5, fetched elsewhere; "
                "--weights none, random ones"
            ) from error
        raise UserError(f"--weights {source}: not weights of {backbone} without its top ({error})") from error
    finally:
        socket.setdefaulttimeout(former)


def build_backbone(config: Embedding, image_size: int, weights: list[np.ndarray] | None = None) -> tf.keras.Model:
    """Images [B, S, S, 3] in 0..255 -> pooled features [B, F]; preprocessing is the first layer.

    Raises:
        UserError: unknown backbone, scaling or inner layer.
    """
    check_backbone(config.backbone)
    if config.input_scaling not in SCALINGS:
        raise UserError(f"unknown input scaling {config.input_scaling!r}: {nearest(config.input_scaling, SCALINGS)}")
    constructor, own_scaling = BACKBONES[config.backbone]
    scaling = own_scaling if config.input_scaling == "own" else config.input_scaling

    images = tf.keras.Input((image_size, image_size, 3), name="image")
    scaled = preprocess(images, scaling)
    try:
        backbone = constructor(include_top=False, weights=None, input_tensor=scaled)
    except ValueError as error:
        raise UserError(f"--image-size {image_size} does not suit {config.backbone}: {error}") from error
    try:
        if image_size > SIDE:
            raise ValueError(f"at most {SIDE:,} pixels")
        safe_model.check_memory(backbone, config.averaged_views)
    except ValueError as error:
        raise UserError(f"--image-size {image_size} is too large for {config.backbone}: {error}") from None
    if weights is not None:
        fixed = backbone.get_layer("preprocess").get_weights()
        backbone.set_weights(fixed + weights)
    for layer in backbone.layers:
        layer.trainable = config.train_backbone and layer.name != "preprocess"
        if isinstance(layer, layers.BatchNormalization):
            layer.momentum = config.batch_norm_momentum
            if tf.distribute.get_strategy().num_replicas_in_sync > 1:
                layer.synchronized, layer.fused = True, False  # the statistics of the whole batch
    if config.backbone_layer and config.backbone_layer not in (names := [layer.name for layer in backbone.layers]):
        raise UserError(
            f"{config.backbone} has no layer {config.backbone_layer!r}: {nearest(config.backbone_layer, names)}"
        )
    top = backbone.get_layer(config.backbone_layer).output if config.backbone_layer else backbone.output
    features = layers.GlobalAveragePooling2D(name="features", dtype="float32")(top)
    return tf.keras.Model(images, features, name=config.backbone)


def build_embedding(config: Embedding, image_size: int, weights: list[np.ndarray] | None = None) -> tf.keras.Model:
    """Images [B, S, S, 3] in 0..255 -> embeddings [B, D] float32 of unit length (FaceNet, section 3)."""
    backbone = build_backbone(config, image_size, weights)
    x = backbone.output
    for index, units in enumerate(config.dense_units, start=1):
        x = layers.Dense(units, activation="relu", name=f"dense_{index}")(x)
    # In float32 under any policy: the loss compares differences of nearly equal distances.
    if config.embedding_size:
        x = layers.Dense(config.embedding_size, dtype="float32", name="projection")(x)
    # Each row has length 1. Normalising the whole batch instead leaves every distance near sqrt(2 / B) and the loss at
    # the margin: likely the published failure.
    axis = [0, 1] if config.normalisation == "batch" else -1
    name = "embedding" if config.averaged_views == 1 and not config.beside_original else "trained_embedding"
    x = layers.UnitNormalization(axis=axis, dtype="float32", name=name)(x)
    return tf.keras.Model(backbone.input, x, name="embedding_network")


def beside(network: tf.keras.Model, original: tf.keras.Model, last: bool) -> tf.keras.Model:
    """What `network` says of a picture and the features of a backbone as it came, as one vector of unit length.

    Each has unit length itself, so that both count alike: the cosine of two pictures is the mean of two cosines. A
    training set of hundreds makes the backbone forget some of what ImageNet taught it; this keeps it. Flat.

    Args:
        last: whether this is the embedding, or views are still to be averaged.
    """

    def renamed(layer: tf.keras.layers.Layer) -> tf.keras.layers.Layer:  # a model holds each name once
        return type(layer).from_config(layer.get_config() | {"name": f"original_{layer.name}"})

    copy = tf.keras.models.clone_model(original, network.input, renamed)
    copy.set_weights(original.get_weights())
    features = layers.UnitNormalization(axis=-1, dtype="float32", name="original_embedding")(copy.output)
    both = layers.Concatenate(dtype="float32", name="both")([network.output, features])
    name = "embedding" if last else "view_embedding"
    x = layers.UnitNormalization(axis=-1, dtype="float32", name=name)(both)
    return tf.keras.Model(network.input, x, name=network.name)


def averaged(network: tf.keras.Model, views: int, unit_length: bool = True) -> tf.keras.Model:
    """The mean of what `network` says of `views` (1, 2, 4 or 8) flips and turns of a picture, again of unit length.

    A lesion has no upright, so each is as good a picture of it. Flat: every view runs through the same layers.
    """
    if views == 1:
        return network
    turned = dihedral_views(network.input, views)
    # `call`, not the model itself: called as a layer it would be nested.
    mean = layers.Average(dtype="float32", name="mean_of_views")([network.call(view) for view in turned])
    if unit_length:
        mean = layers.UnitNormalization(axis=-1, dtype="float32", name="embedding")(mean)
    return tf.keras.Model(network.input, mean, name=network.name)


def dihedral_views(images: tf.Tensor, views: int) -> list[tf.Tensor]:
    """The first `views` of 8: images [B, S, S, 3], mirrored left-right, up-down, both; and the four transposed.

    A flip is a dense layer with a fixed permutation: the saved model may hold only layers with plain parameters.
    """
    size = images.shape[1]

    def flipped(x: tf.Tensor, order: tuple[int, int, int], name: str) -> tf.Tensor:
        """Reversed along the axis that `order`, its own inverse, puts last."""
        reverse = tf.keras.initializers.Constant(np.eye(size)[::-1])
        options = {"use_bias": False, "kernel_initializer": reverse, "trainable": False, "dtype": "float32"}
        return layers.Permute(order)(layers.Dense(size, name=name, **options)(layers.Permute(order)(x)))

    across = [images, flipped(images, (1, 3, 2), "mirror")][:views]
    upright = [*across, *(flipped(x, (3, 2, 1), f"upend_{i}") for i, x in enumerate(across))][:views]
    return [*upright, *(layers.Permute((2, 1, 3))(x) for x in upright)][:views]


def backbone_weights(network: tf.keras.Model) -> list[np.ndarray]:
    """The backbone's part of an embedding network's weights, as `build_backbone` takes them."""
    inner = tf.keras.Model(network.input, network.get_layer("features").output)
    fixed = len(network.get_layer("preprocess").get_weights())
    return inner.get_weights()[fixed:]


class ResumableDropout(layers.Layer):
    """Dropout whose random state is a weight, so that a resumed run goes on as it would have; for training only.

    Keras's own keeps it out of reach, inside the operation.
    """

    def __init__(self, rate: float, **options):
        super().__init__(**options)
        self.rate = rate

    def build(self, shape):
        start = tf.keras.initializers.RandomUniform(0, 2**31 - 1)
        self.state = self.add_weight("state", (2,), tf.int32, start, trainable=False)
        super().build(shape)

    def call(self, x, training=None):
        if not training:
            return x
        return tf.nn.experimental.stateless_dropout(x, self.rate, seed=self.state.assign_add([0, 1]))


def build_classifier(config: Classifier, embedding_size: int) -> tf.keras.Model:
    """Embeddings [B, D] of unit length -> probability of melanoma [B, 1] float32.

    Two outputs are two logits, trained by cross-entropy: the same as one sigmoid on their difference, which a fixed
    dense layer takes.
    """
    embeddings = tf.keras.Input((embedding_size,), name="embeddings")
    x = embeddings
    for index, units in enumerate(config.units, start=1):
        x = layers.Dense(units, dtype="float32", name=f"classifier_{index}")(x)
        x = (layers.LeakyReLU if config.leaky else layers.ReLU)(dtype="float32", name=f"classifier_{index}_active")(x)
        if config.dropout:
            x = ResumableDropout(config.dropout, dtype="float32", name=f"classifier_{index}_dropout")(x)
    x = layers.Dense(config.outputs, dtype="float32", name="logits")(x)
    if config.outputs == 2:
        difference = tf.keras.initializers.Constant([[-1.0], [1.0]])
        x = layers.Dense(
            1, use_bias=False, kernel_initializer=difference, trainable=False, dtype="float32", name="difference"
        )(x)
    probability = layers.Activation("sigmoid", dtype="float32", name="probability")(x)
    return tf.keras.Model(embeddings, probability, name="classifier")


def logit_model(classifier: tf.keras.Model) -> tf.keras.Model:
    """What `build_classifier` made, up to its logit [B, 1]: the probability before the sigmoid."""
    return tf.keras.Model(classifier.input, classifier.get_layer("probability").input)


def join(
    embedding: tf.keras.Model, classifier: tf.keras.Model, calibration: tuple[float, float] = (1.0, 0.0)
) -> tf.keras.Model:
    """One flat model: images [B, S, S, 3] in 0..255 -> probability [B, 1]. Shares both models' layers but dropout.

    `calibration`, a scale and an offset of the logit, becomes a fixed layer `calibration` before the sigmoid.
    """
    scale, offset = map(tf.keras.initializers.Constant, calibration)
    x = embedding.output
    for layer in classifier.layers[1:]:
        if layer.name == "probability":
            x = layers.Dense(
                1, kernel_initializer=scale, bias_initializer=offset, trainable=False, dtype="float32",
                name="calibration",
            )(x)  # fmt: skip
        if not isinstance(layer, ResumableDropout):
            x = layer(x)
    return tf.keras.Model(embedding.input, x, name="siamese_melanoma_classifier")


def classifier_metrics() -> list[tf.keras.metrics.Metric]:
    """Accuracy, precision, recall and F1 of probabilities [B, 1] against targets [B, 1]."""
    f1_score = tf.keras.metrics.F1Score(threshold=0.5, average="micro", name="f1_score")
    f1_score.build((None, 1), (None, 1))  # else the first step does, see NeuralNetwork
    return [
        tf.keras.metrics.BinaryAccuracy("accuracy"),
        tf.keras.metrics.Precision(name="precision"),
        tf.keras.metrics.Recall(name="recall"),
        f1_score,
    ]


def save(model: tf.keras.Model, file: Path) -> None:
    """Write `model`, without loss and optimizer, in one step: the former file stays until the new one is whole."""
    partial = file.with_name("partial.keras")
    tf.keras.Model(model.input, model.output, name=model.name).save(partial)
    partial.replace(file)


def load(file: Path) -> tf.keras.Model:
    """A saved joined model; a file of any origin may be named, see safe_model.py.

    Raises:
        UserError: no such file, or not a model that `train.py` wrote.
    """
    if not file.exists():
        raise safe_model.absent(file)
    try:
        return safe_model.load(file)
    except Exception as error:  # a file of any content can fail anywhere in Keras
        raise UserError(f"{file} is no model that train.py wrote ({error})") from error
