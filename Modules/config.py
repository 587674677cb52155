"""Every hyper-parameter, and the recipes that set them.

One frozen dataclass a stage; each field says its unit and why it has its value. Every field can be set on the command
line: `--image-size 128`, `--loss semi-hard`, `--flips false`; the classifier's fields carry their stage in front
(`--classifier-epochs 10`). A recipe is a named set of values, chosen with a bare word or `--recipe NAME`.
"""

import math
from dataclasses import Field, dataclass, field, fields, replace

from Modules.cli import Parser, UserError, nearest


@dataclass(frozen=True)
class Data:
    """What goes into a batch. Augmentation is for training only; amounts are the largest, drawn uniformly each time."""

    image_size: int = 256  # pixels a side, as the published Kaggle set has them
    batch_size: int = 128  # images; the triplets of a batch grow with its cube
    flips: bool = True  # left-right and up-down: a lesion has no upright
    rotation: float = 0.3  # fraction of a full turn, either way
    zoom: float = 0.0  # fraction of the size, in or out
    brightness: float = 0.2  # fraction of the full range (255) added or taken
    contrast: float = 0.0  # fraction of the contrast around the picture's mean
    saturation: float = 0.0  # fraction of the saturation
    hue: float = 0.0  # fraction of the colour circle
    noise: float = 0.03  # standard deviation, fraction of the full range
    refit: bool = False  # once calibrated on validation, learn again from training and validation together, as long
    external: str = "join"  # images of --external sets: join stage 1, pretrain it on their own diagnoses, or ignore


@dataclass(frozen=True)
class Embedding:
    """The embedding network and stage 1, its metric learning."""

    backbone: str = "inception_v3"  # light enough for a CPU; also resnet50, mobilenet
    backbone_layer: str = ""  # cut the backbone after this layer; empty: after its last
    input_scaling: str = "own"  # what the backbone was trained on: own, 0..1, -1..1 or caffe
    train_backbone: bool = True  # False: only the dense layers learn
    batch_norm_momentum: float = 0.9  # Keras's 0.99 lags behind at a few dozen steps an epoch
    dense_units: tuple[int, ...] = (256,)  # fully connected layers between backbone and embedding
    embedding_size: int = 128  # dimensions, as in FaceNet; 0: the features themselves, no projection
    normalisation: str = "row"  # each embedding has length 1; batch: the whole batch has, the likely published failure
    beside_original: bool = False  # the saved embedding also holds the features of the backbone as it came, untrained
    averaged_views: int = (
        1  # flips and turns whose mean is the embedding of a picture, in the saved model: 1, 2, 4 or 8
    )
    loss: str = "tfa-semi-hard"  # see Modules/metric_learning/losses.py
    margin: float = 0.4  # between positive and negative distance; distances run from 0 to 2
    final_margin: float = 0.0  # of the last epoch, reached in a straight line; 0: as `margin`
    distance: str = "L2"  # L2, as the reference ran it, or squared-L2, as FaceNet prints it
    batches: str = "shuffled"  # shuffled, or class: P classes x K images of many patients
    positives: str = "any"  # any, or other-patient: an anchor's positive may not show its own patient
    classification: float = 0.0  # weight of a cross-entropy on the embedding beside the metric loss; 0: none
    learning_rate: float = 1e-3  # of Adam
    weight_decay: float = 0.0  # of AdamW, decoupled from the rate's gradient step; 0: plain Adam
    schedule: str = "constant"  # of the rate: constant, or cosine after a warm-up
    pretrain_epochs: int = 8  # on the diagnoses of external images, where they are to pretrain
    epochs: int = 20
    keep: str = "best"  # the epoch with the lowest validation loss, or the last, for a rate that ends at 0
    patience: int = 0  # epochs without a better validation loss before stopping; 0: never


@dataclass(frozen=True)
class Classifier:
    """Stage 2: the classifier on the frozen embedding."""

    units: tuple[int, ...] = (32, 16, 4)  # dense layers before the output
    leaky: bool = False  # LeakyReLU instead of ReLU
    dropout: float = 0.0  # after each dense layer
    outputs: int = 1  # 1: one logit; 2: two logits, whose difference is the one
    views: int = 2  # augmented views of each image, embedded once; epochs take them in turn; 0: the image as it is
    batch_size: int = 128  # embeddings
    learning_rate: float = 1e-3  # of Adam
    epochs: int = 50
    keep: str = "best"  # the epoch with the lowest validation loss, or the last
    patience: int = 0  # epochs without a better validation loss before stopping; 0: never


@dataclass(frozen=True)
class Recipe:
    """All of a run's hyper-parameters."""

    name: str
    data: Data = field(default_factory=Data)
    embedding: Embedding = field(default_factory=Embedding)
    classifier: Classifier = field(default_factory=Classifier)


def lightweight() -> Recipe:
    """The balanced/full-dataset reference system on InceptionV3; published accuracy about 79 % on ResNet50.

    Defects mended: the embedding has unit length, which the loss assumes; validation shares no patient with training;
    BatchNorm's statistics follow within an epoch.
    """
    return Recipe("lightweight")


def full() -> Recipe:
    """`lightweight` on ResNet50, as published."""
    return Recipe("full", embedding=Embedding(backbone="resnet50"))


def margin() -> Recipe:
    """The margin reference system: triplet margin loss on random triplets; published accuracy 80.5 % of 272 images.

    Defects mended: BatchNorm's statistics follow within an epoch.
    """
    return Recipe(
        "margin",
        Data(batch_size=32, rotation=0.5, brightness=0.1, contrast=0.1, saturation=0.1, hue=0.02, noise=0.0),
        Embedding(
            backbone="resnet50",
            input_scaling="-1..1",
            dense_units=(),
            embedding_size=512,
            loss="triplet-margin",
            margin=1.0,
            learning_rate=1e-4,
            epochs=100,
            patience=5,
        ),
        Classifier(
            units=(256, 64),
            leaky=True,
            dropout=0.4,
            outputs=2,
            batch_size=32,
            learning_rate=1e-4,
            epochs=80,
            patience=5,
        ),
    )


def tuned() -> Recipe:
    """The best of what was tried on real lesions: seven diagnoses first, then semi-hard triplets and a softmax.

    Both work on the same unit sphere: triplets alone stay behind frozen features, a softmax alone gives a poorer
    embedding. The embedding is the backbone's pooled features at length 1, beside those of the backbone as it came: a
    projection learned from 900 images costs more than it gives, and ImageNet's features see what the trained ones
    have forgotten. Positives come from other patients; the rate ends at 0, so that no epoch is chosen; validation, once
    it has settled the calibration, is learned from too; a picture is the mean of 4 flips. The data set must hold
    external images with diagnoses (`--external DIR` of the generator).
    """
    return Recipe(
        "tuned",
        Data(
            image_size=192,
            batch_size=32,
            rotation=0.5,
            zoom=0.15,
            brightness=0.1,
            contrast=0.2,
            saturation=0.2,
            hue=0.02,
            noise=0.0,
            refit=True,
            external="pretrain",
        ),
        Embedding(
            backbone="mobilenet",
            dense_units=(),
            embedding_size=0,
            loss="semi-hard",
            margin=0.2,
            batches="class",
            positives="other-patient",
            classification=1.0,
            learning_rate=3e-4,
            weight_decay=0.01,
            schedule="cosine",
            beside_original=True,
            averaged_views=4,
            pretrain_epochs=6,
            epochs=6,
            keep="last",
        ),
        # 100 epochs ranked a little worse: the features were trained on the images that it learns from.
        Classifier(units=(), views=0, learning_rate=1e-2, epochs=30, keep="last"),
    )


def demo(recipe: Recipe) -> Recipe:
    """`recipe` on small pictures for a few epochs: minutes on two cores, for the synthetic demo alone."""
    return replace(
        recipe,
        data=replace(recipe.data, image_size=96, batch_size=32),
        embedding=replace(recipe.embedding, epochs=4),
        classifier=replace(recipe.classifier, views=2, epochs=20),
    )


def without_length(recipe: Recipe) -> Recipe:
    """`recipe` but for how long it trains, where nothing is scheduled over it: what may not change when it goes on."""
    stage = recipe.embedding
    scheduled = stage.schedule != "constant" or stage.final_margin or "," in stage.loss
    return replace(
        recipe,
        embedding=replace(stage, epochs=stage.epochs if scheduled else 0, patience=0),
        classifier=replace(recipe.classifier, epochs=0, patience=0),
    )


RECIPES = {recipe.__name__: recipe for recipe in (lightweight, full, margin, tuned)}
STAGES = {"data": Data, "embedding": Embedding, "classifier": Classifier}
# What a value may be, both ends included. Else whole numbers start at 1, the others at 0.
LIMITS = {
    "patience": (0, math.inf),
    "embedding_size": (0, math.inf),
    "pretrain_epochs": (0, math.inf),
    "views": (0, math.inf),
    "outputs": (1, 2),
    "dropout": (0, 0.99),
    "zoom": (0, 0.99),
    "batch_norm_momentum": (0, 1),
}


# What a word may be.
WORDS = {
    "external": ("join", "pretrain", "ignore"),
    "normalisation": ("row", "batch"),
    "positives": ("any", "other-patient"),
    "keep": ("best", "last"),
    "schedule": ("constant", "cosine"),
    "batches": ("shuffled", "class"),
    "averaged_views": ("1", "2", "4", "8"),
}


def recipe_named(name: str) -> Recipe:
    if name not in RECIPES:
        raise UserError(f"unknown recipe {name!r}: {nearest(name, RECIPES)}")
    return RECIPES[name]()


def _option(stage: str, name: str) -> str:
    """The one option of a field."""
    return "--" + (f"classifier_{name}" if stage == "classifier" else name).replace("_", "-")


def _parsed(item: Field, text: str):
    """A field's value from its text: `true`, `3`, `0.5`, `256,64` or a word; a ValueError says what was expected."""
    if item.name in WORDS and text not in WORDS[item.name]:
        raise ValueError(", ".join(WORDS[item.name]))
    if item.type is str:
        return text
    if item.type is bool:
        if text not in ("true", "false"):
            raise ValueError("true or false")
        return text == "true"
    several = item.type == tuple[int, ...]
    kind = float if item.type is float else int
    least, most = LIMITS.get(item.name, (1 if kind is int else 0, math.inf))
    expected = "whole numbers, separated by commas," if several else "a whole number" if kind is int else "a number"
    expected += f" from {least} up" if most == math.inf else f" from {least} to {most}"
    parts = [part for part in text.split(",") if part] if several else [text]
    try:
        values = tuple(kind(part) for part in parts)
    except ValueError:
        raise ValueError(expected) from None
    if not all(least <= value <= most and value < math.inf for value in values):
        raise ValueError(expected)
    return values if several else values[0]


def add_options(parser: Parser) -> None:
    """Give `parser` one option for every field of every stage."""
    for stage, kind in STAGES.items():
        group = parser.add_argument_group(f"{stage} (Modules/config.py says what each is)")
        for item in fields(kind):
            shape = {bool: "true|false", tuple[int, ...]: "N,N,...", str: "NAME"}.get(item.type, item.type.__name__)
            group.add_argument(_option(stage, item.name), metavar=shape)


def with_options(recipe: Recipe, options: dict[str, str | None]) -> Recipe:
    """`recipe` with what the command line set.

    Raises:
        UserError: a value that is not of its field's kind or outside its range.
    """
    for stage, kind in STAGES.items():
        changes = {}
        for item in fields(kind):
            option = _option(stage, item.name)
            text = options.get(option[2:].replace("-", "_"))
            if text is None:
                continue
            try:
                changes[item.name] = _parsed(item, text)
            except ValueError as error:
                raise UserError(f"{option} {text!r}: expected {error}") from None
        recipe = replace(recipe, **{stage: replace(getattr(recipe, stage), **changes)})
    return recipe
