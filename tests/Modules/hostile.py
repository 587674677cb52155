"""Model files from a stranger. Those that hold code leave a file, the canary, as soon as any of it runs.

`Workshop(folder).FILES[name](workshop)` writes one and returns its path; RUN_BY_KERAS names those whose code Keras
itself runs, `safe_mode` or not.
"""

import io
import json
import pickle
import tempfile
import warnings
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import h5py
import numpy as np
import tensorflow as tf

layers = tf.keras.layers
SIZE = 8  # pixels
WEIGHTS = "model.weights.h5"

MODULE = """
import pathlib
CANARY = pathlib.Path(__file__).with_name("canary")
CANARY.touch()

def function(*args, **kwargs):
    return args[0] if args else None

class Layer:
    from_config = function
"""


FOREIGN = {"module": "stranger", "class_name": "Layer", "config": {}, "registered_name": None}


def honest_model() -> tf.keras.Model:
    """Small, and of every kind of layer that our models have."""
    x = images = tf.keras.Input((SIZE, SIZE, 3), name="image")
    x = layers.Rescaling(1 / 255, name="preprocess")(x)
    x = layers.ZeroPadding2D(1)(x)
    x = layers.ReLU(6.0)(layers.BatchNormalization(name="norm")(layers.Conv2D(4, 3, use_bias=False)(x)))
    x = layers.MaxPooling2D(2)(layers.DepthwiseConv2D(3, padding="same")(x))
    x = layers.Add()([x, layers.AveragePooling2D(3, 1, padding="same")(x)])
    x = layers.Concatenate()([x, layers.Permute((2, 1, 3))(x)])
    x = layers.GlobalAveragePooling2D(name="features")(layers.Activation("relu")(x))
    shared = layers.Dense(5, name="projection")
    x = layers.UnitNormalization(name="embedding")(layers.Average()([shared(x), shared(layers.LeakyReLU()(x))]))
    x = layers.Dense(1, kernel_initializer=tf.keras.initializers.Constant([[0.5]] * 5), name="logits")(x)
    return tf.keras.Model(images, layers.Activation("sigmoid", name="probability")(x), name="honest")


@cache
def honest_members() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        honest_model().save(Path(folder, "honest.keras"))
        with zipfile.ZipFile(Path(folder, "honest.keras")) as archive:
            return {name: archive.read(name) for name in archive.namelist()}


class Workshop:
    """The honest model's parts, and `folder` to put hostile ones together in."""

    def __init__(self, folder: Path):
        self.folder, self.canary, self.file = folder, folder / "canary", folder / "best_epoch.keras"
        (folder / "stranger.py").write_text(MODULE)
        self.members = honest_members()

    def zipped(self, members: dict | list, **options) -> Path:
        with warnings.catch_warnings(action="ignore"), zipfile.ZipFile(self.file, "w") as archive:
            for name, content in members.items() if isinstance(members, dict) else members:
                archive.writestr(name, content, **options)
        return self.file

    def configured(self, change: Callable[[dict, dict], None]) -> Path:
        """With another config: `change` gets it, and its layers by name."""
        config = json.loads(self.members["config.json"])
        change(config, {layer["name"]: layer for layer in config["config"]["layers"]})
        return self.zipped(self.members | {"config.json": json.dumps(config)})

    def weighted(self, change: Callable[[h5py.File], None]) -> Path:
        """With another file of weights."""
        buffer = io.BytesIO(self.members[WEIGHTS])
        with h5py.File(buffer, "r+") as weights:
            change(weights)
        return self.zipped(self.members | {WEIGHTS: buffer.getvalue()})

    def appended(self, layer: dict) -> Path:
        """With one more layer behind the last."""

        def change(config, _):
            inputs = [[["probability", 0, 0, {}]]]
            entry = {"name": "last", "inbound_nodes": inputs, "registered_name": None, **layer}
            entry["config"] = {"name": "last", **entry.get("config", {})}
            config["config"]["layers"].append(entry)
            config["config"]["output_layers"] = [["last", 0, 0]]

        return self.configured(change)


class Pickled:
    """Touches a file where it is unpickled."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def with_lambda(canary: Path) -> tf.keras.Model:
    """A model whose marshalled code touches `canary`; made so that its making does not."""
    x = images = tf.keras.Input((SIZE, SIZE, 3))
    code = f"lambda x: (__import__('pathlib').Path({str(canary)!r}).touch(), x)[1]"
    x = layers.Lambda(eval(code), name="embedding", output_shape=(SIZE, SIZE, 3))(x)
    model = tf.keras.Model(images, x)
    canary.unlink()
    return model


def saved_lambda(shop: Workshop, name: str) -> Path:
    file = shop.folder / name
    with warnings.catch_warnings(action="ignore"):  # Keras advises against .h5
        with_lambda(shop.canary).save(file)
    return file


def lambda_renamed(shop: Workshop) -> Path:
    return saved_lambda(shop, "lambda.h5").rename(shop.file)


def nested(shop: Workshop) -> Path:
    """A whole model as a layer, with a loss of another module in it."""

    def change(config, named):
        inner = json.loads(json.dumps(config)) | {"compile_config": {"loss": FOREIGN}}
        config["config"]["layers"].append(inner | {"name": "inner", "inbound_nodes": [[["image", 0, 0, {}]]]})

    return shop.configured(change)


def changed(layer: str, key: str, value) -> Callable[[Workshop], Path]:
    """One value of one layer's config is another."""

    def change(config, named):
        assert key in named[layer]["config"]
        named[layer]["config"][key] = value

    return lambda shop: shop.configured(change)


def entry(layer: str, **values) -> Callable[[Workshop], Path]:
    """One layer's entry has other values."""
    return lambda shop: shop.configured(lambda _, named: named[layer].update(values))


def pickled_weights(shop: Workshop) -> Path:
    """Keras 2.15 reads arrays of a .npz with pickles allowed."""
    buffer = io.BytesIO()
    np.savez(buffer, __root__=np.array(Pickled(shop.canary), dtype=object))
    rest = {name: content for name, content in shop.members.items() if name != WEIGHTS}
    return shop.zipped(rest | {"model.weights.npz": buffer.getvalue()})


def pickle_renamed(shop: Workshop) -> Path:
    shop.file.write_bytes(pickle.dumps(Pickled(shop.canary)))
    return shop.file


def saved_model(shop: Workshop) -> Path:
    with warnings.catch_warnings(action="ignore"):
        honest_model().save(shop.folder / "saved", save_format="tf")
    return (shop.folder / "saved").rename(shop.file)


def written_by_operation(shop: Workshop) -> Path:
    """TFOpLambda reaches any symbol of TensorFlow, and a layer called on constants runs while the model is built."""
    config = {"trainable": True, "dtype": "float32", "function": "io.write_file"}
    inputs = [["_CONSTANT_VALUE", -1, str(shop.canary), {"contents": "it ran"}]]
    layer = {"module": "keras.src.layers.core.tf_op_layer", "class_name": "TFOpLambda", "config": config}
    return shop.appended(layer | {"registered_name": "TFOpLambda", "inbound_nodes": inputs})


def linked(link) -> Callable[[Workshop], Path]:
    def change(weights):
        del weights["layers/dense/vars/0"]
        weights["layers/dense/vars/0"] = link

    return lambda shop: shop.weighted(change)


def bias(make: Callable[[h5py.Group], None]) -> Callable[[Workshop], Path]:
    """The array `1` of a layer (a bias of 5 numbers) is made otherwise."""

    def change(weights):
        group = weights["layers/dense/vars"]
        assert group["1"].shape == (5,)
        del group["1"]
        make(group)

    return lambda shop: shop.weighted(change)


def bomb_in_hdf5(group: h5py.Group) -> None:
    plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)  # contiguous, and no byte of it written
    h5py.h5d.create(group.id, b"1", h5py.h5t.IEEE_F32LE, h5py.h5s.create_simple((2**50,)), plan)


def virtual(group: h5py.Group) -> None:
    layout = h5py.VirtualLayout((5,), "float32")
    layout[:] = h5py.VirtualSource("/etc/passwd", "data", (5,))
    group.create_virtual_dataset("1", layout)


def circle_of_groups(weights: h5py.File) -> None:
    weights["layers/again"] = weights["layers"]


def circle_of_layers(config: dict, named: dict) -> None:
    named["preprocess"]["inbound_nodes"] = [[["probability", 0, 0, {}]]]


def two_of_one_name(config: dict, named: dict) -> None:
    config["config"]["layers"].append(named["probability"])


def custom_loss(config: dict, named: dict) -> None:
    config["compile_config"] = {"loss": FOREIGN}


FUNCTION = {"module": "stranger", "class_name": "function", "config": "function", "registered_name": "function"}
GET_FILE = {"module": "keras.utils", "class_name": "get_file", "config": {"origin": "http://localhost:9/stranger"}}
UNSAFE = {"module": "keras.config", "class_name": "enable_unsafe_deserialization", "config": {}}
LOOKUP = {"module": "keras.layers", "class_name": "StringLookup", "config": {"vocabulary": "/etc/passwd"}}

FILES: dict[str, Callable[[Workshop], Path]] = {
    # Code: CVE-2024-3660, CVE-2025-1550, CVE-2025-8747, CVE-2025-9905, CVE-2025-9906, CVE-2025-12058, CVE-2026-1462
    "lambda": lambda shop: saved_lambda(shop, "best_epoch.keras"),
    "lambda-h5": lambda shop: saved_lambda(shop, "best_epoch.h5"),
    "lambda-h5-renamed": lambda_renamed,
    "saved-model": saved_model,
    "pickle": pickle_renamed,
    "pickle-in-weights": pickled_weights,
    "foreign-model": lambda shop: shop.configured(lambda config, _: config.update(FOREIGN)),
    "foreign-layer": lambda shop: shop.appended(FOREIGN),
    "foreign-initializer": changed("logits", "kernel_initializer", FOREIGN),
    "foreign-value-in-initializer": changed(
        "logits", "kernel_initializer",
        {"module": "keras.initializers", "class_name": "Constant", "config": {"value": FOREIGN},
         "registered_name": None},
    ),
    "foreign-regularizer": changed("logits", "kernel_regularizer", FOREIGN),
    "foreign-activation": changed("logits", "activation", FUNCTION),
    "foreign-dtype": changed("logits", "dtype", FOREIGN),
    "foreign-argument": entry("probability", inbound_nodes=[[["logits", 0, 0, {"training": FOREIGN}]]]),
    "foreign-module-of-a-known-layer": entry("probability", module="stranger"),
    "registered-by-a-library": entry("logits", registered_name="Addons>WeightNormalization"),
    "nested": nested,
    "any-operation": written_by_operation,
    "wrapped-layer": lambda shop: shop.appended(
        {"module": "keras.layers", "class_name": "TimeDistributed", "config": {"layer": FOREIGN}}
    ),
    "kerass-own-function": lambda shop: shop.appended(GET_FILE),
    "switch-of-safe-mode": lambda shop: shop.appended(UNSAFE),
    "vocabulary-of-any-file": lambda shop: shop.appended(LOOKUP),
    "saved-model-as-a-layer": lambda shop: shop.appended(
        {"module": "keras.layers", "class_name": "TFSMLayer", "config": {"filepath": str(shop.folder)}}
    ),
    "custom-loss": lambda shop: shop.configured(custom_loss),
    # Archives
    "parent-path": lambda shop: shop.zipped(shop.members | {"../canary": "it ran"}),
    "absolute-path": lambda shop: shop.zipped(shop.members | {str(shop.canary): "it ran"}),
    "assets": lambda shop: shop.zipped(shop.members | {"assets/note.txt": "note"}),
    "member-twice": lambda shop: shop.zipped([*shop.members.items(), ("config.json", "{}")]),
    "member-missing": lambda shop: shop.zipped({"config.json": "{}"}),
    "zip-bomb": lambda shop: shop.zipped(
        shop.members | {"metadata.json": b" " * 10**8}, compress_type=zipfile.ZIP_DEFLATED
    ),
    "compressed": lambda shop: shop.zipped(shop.members, compress_type=zipfile.ZIP_DEFLATED),
    "endless-metadata": lambda shop: shop.zipped(shop.members | {"metadata.json": b" " * 10**6}),
    "many-members": lambda shop: shop.zipped(shop.members | {str(i): b"" for i in range(200)}),
    "deep-config": lambda shop: shop.zipped(shop.members | {"config.json": "[" * 10**6}),
    "no-config": lambda shop: shop.zipped(shop.members | {"config.json": b"\xff\xfe"}),
    "another-keras": lambda shop: shop.zipped(shop.members | {"metadata.json": '{"keras_version": "3.12.0"}'}),
    # Descriptions that would take all memory, or all time
    "huge-layer": changed("logits", "units", 2**16),
    "huge-number": changed("logits", "units", 10**30),
    "not-a-number": changed("norm", "momentum", float("nan")),
    "no-shape": entry("logits", build_config=None),
    "another-shape": entry("logits", build_config={"input_shape": [None, 60000]}),
    "circle-of-layers": lambda shop: shop.configured(circle_of_layers),
    "unknown-input": entry("probability", inbound_nodes=[[["nowhere", 0, 0, {}]]]),
    "two-layers-of-one-name": lambda shop: shop.configured(two_of_one_name),
    # Weights: CVE-2026-0897
    "no-hdf5": lambda shop: shop.zipped(shop.members | {WEIGHTS: b"numbers"}),
    "cut-hdf5": lambda shop: shop.zipped(shop.members | {WEIGHTS: shop.members[WEIGHTS][:-2000]}),
    "external-link": linked(h5py.ExternalLink("/etc/passwd", "/")),
    "soft-link": linked(h5py.SoftLink("/layers/dense/vars/1")),
    "hard-link": lambda shop: shop.weighted(circle_of_groups),
    "external-storage": bias(
        lambda group: group.create_dataset("1", (5,), "float32", external=[("/etc/passwd", 0, 20)])
    ),
    "virtual": bias(virtual),
    "bomb-in-hdf5": bias(bomb_in_hdf5),
    "compressed-array": bias(lambda group: group.create_dataset("1", data=np.zeros(5, "float32"), compression="gzip")),
    "texts": bias(lambda group: group.create_dataset("1", data=["a"] * 5, dtype=h5py.string_dtype())),
    "array-missing": bias(lambda group: None),
    "more-arrays": lambda shop: shop.weighted(lambda weights: weights.create_dataset("more", data=np.zeros(3, "f4"))),
}  # fmt: skip
RUN_BY_KERAS = [
    "lambda-h5-renamed", "pickle-in-weights", "foreign-model", "any-operation",
]  # fmt: skip
