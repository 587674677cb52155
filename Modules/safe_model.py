"""Open a model file of unknown origin: first as data, checked part by part; Keras sees it only when all of it is known.

A `.keras` file is a zip archive of a description (config.json) and of numbers (model.weights.h5). What train.py writes
is the narrow kind that passes: nothing compressed, the layers of `model_schema` alone, plain arrays of exactly as many
numbers as those layers have. `.h5` files, pickles and SavedModels can hold code beyond anyone's checking
(CVE-2025-9905): they are refused.
"""

import hashlib
import io
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from zipfile import ZIP_STORED, BadZipFile, ZipFile

import h5py
import tensorflow as tf

from Modules.cli import UserError
from Modules.evaluation.familiarity import texture_layer
from Modules.model_schema import SIDE, check_config

MEMBERS = {"metadata.json": 10_000, "config.json": 2**24, "model.weights.h5": 2**30}  # and their largest sizes
SHOWN, ALL_SHOWN = 2**25, 2**31  # numbers that one layer may give for one image, and all calls of all layers
VERSION = "2."  # of Keras
FILTERS = {h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_FLETCHER32}


def load(file: Path) -> tf.keras.Model:
    """The joined model in `file`: images [B, S, S, 3] -> probability [B, 1], with a layer `embedding`.

    Raises:
        ValueError: anything in the file is not as `modules.save` writes it; nothing of it has run then.
    """
    if file.suffix != ".keras" or not file.is_file():
        raise ValueError("expected a .keras file; .h5 files, pickles and SavedModels can run code")
    data = _read(file, sum(MEMBERS.values()))
    check(data)
    # As load_model of Keras does, but that reads the weights within the archive, from its beginning for every array:
    # half a minute for InceptionV3.
    with ZipFile(io.BytesIO(data)) as archive:
        config = json.loads(archive.read("config.json")) | {"compile_config": None}
        model = tf.keras.saving.deserialize_keras_object(config, safe_mode=True)
        with _copied(archive.read("model.weights.h5"), "model.weights.h5") as copy:
            model.load_weights(copy)
    _check_shapes(model)
    return model


@contextmanager
def checked_weights(file: Path) -> Iterator[Path]:
    """A copy of a .h5 file of weights, for Keras to open.

    Raises:
        ValueError: by name it is no .h5 file, or its content is not as `check_arrays` wants it.
    """
    if file.suffix != ".h5":  # Keras goes by the name, and would open an archive behind the arrays
        raise ValueError("expected a .h5 file")
    data = _read(file, MEMBERS["model.weights.h5"])
    check_arrays(io.BytesIO(data), compressed=True)
    with _copied(data, "a.weights.h5" if file.name.endswith(".weights.h5") else "a.h5") as copy:
        yield copy


def _read(file: Path, limit: int) -> bytes:
    with open(file, "rb") as stream:
        data = stream.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"more than {limit:,} bytes")
    return data


@contextmanager
def _copied(data: bytes, name: str) -> Iterator[Path]:
    """What was checked is what is loaded, whatever becomes of the file meanwhile."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / name
        copy.write_bytes(data)
        yield copy


def check(data: bytes) -> None:
    """Raise ValueError unless `data` is a `.keras` file as `modules.save` writes it."""
    if (entries := data.count(b"PK\1\2")) > 100:  # a few can be there by chance
        raise ValueError(f"{entries:,} entries in its directory; expected {len(MEMBERS)}")
    try:
        with ZipFile(io.BytesIO(data)) as archive:
            infos = archive.infolist()
            if sorted(info.filename for info in infos) != sorted(MEMBERS):
                names = ", ".join(repr(info.filename[:40]) for info in infos[:5])
                raise ValueError(f"expected {', '.join(MEMBERS)} in it, not {names or 'nothing'}")
            for info in infos:
                if info.compress_type != ZIP_STORED or info.flag_bits & 1 or info.file_size != info.compress_size:
                    raise ValueError(f"{info.filename} is compressed or encrypted")
                if info.file_size > MEMBERS[info.filename]:
                    raise ValueError(f"{info.filename}: {info.file_size:,} bytes (at most {MEMBERS[info.filename]:,})")
            metadata, config, weights = (archive.read(name) for name in MEMBERS)
    except BadZipFile as error:
        raise ValueError(f"not a .keras file: {error}") from None
    version = str(json.loads(metadata)["keras_version"])
    if not version.startswith(VERSION):
        raise ValueError(f"written by Keras {version[:20]}; expected {VERSION}x")
    expected, there = check_config(config), check_arrays(io.BytesIO(weights))
    if expected != there:
        raise ValueError(f"its layers have {expected:,} weights, its file {there:,}")


def check_arrays(file: Path | io.BytesIO, compressed: bool = False) -> int:
    """How many numbers the HDF5 file holds; a link to another file or place, or data outside it, is a ValueError.

    Arrays must lie in the file as they are, so that it can't grow when it is read; published weights are `compressed`,
    to not more than the largest size.
    """
    try:
        with h5py.File(file, "r") as root:
            numbers, waiting, seen = 0, [root], set()
            while waiting:
                group = waiting.pop()
                for name in group:
                    if not isinstance(group.get(name, getlink=True), h5py.HardLink):
                        raise ValueError(f"{name!r} is a link to another place or file")
                    item = group[name]
                    address = h5py.h5o.get_info(item.id).addr
                    if address in seen:
                        raise ValueError(f"{name!r} is there under two names")
                    seen.add(address)
                    if isinstance(item, h5py.Group):
                        waiting.append(item)
                    else:
                        numbers += _checked_size(name, item, compressed)
                        if numbers * 4 > MEMBERS["model.weights.h5"]:
                            raise ValueError("more numbers than any of our models has")
            return numbers
    except (OSError, RuntimeError) as error:  # of h5py, about bytes that are no HDF5
        raise ValueError(f"not a file of weights: {error}") from None


def _checked_size(name: str, item: object, compressed: bool) -> int:
    """How many numbers one item of an HDF5 file holds."""
    if not isinstance(item, h5py.Dataset) or item.dtype != "float32":
        raise ValueError(f"{name!r} is no array of float32")
    plan = item.id.get_create_plist()
    layouts = {h5py.h5d.CONTIGUOUS, h5py.h5d.COMPACT} | ({h5py.h5d.CHUNKED} if compressed else set())
    if plan.get_external_count() or plan.get_layout() not in layouts:
        raise ValueError(f"the array {name!r} does not lie in the file as it is")
    if {plan.get_filter(i)[0] for i in range(plan.get_nfilters())} - FILTERS:
        raise ValueError(f"the array {name!r} needs an unknown filter")
    if plan.get_layout() != h5py.h5d.CHUNKED and item.id.get_storage_size() != item.size * 4:
        raise ValueError(f"the array {name!r} is larger than its file")
    return item.size


def _check_shapes(model: tf.keras.Model) -> None:
    size = model.input_shape[1]
    if model.input_shape != (None, size, size, 3) or not size or model.output_shape != (None, 1):
        raise ValueError(f"it maps {model.input_shape} to {model.output_shape}, not pictures to a probability")
    if size > SIDE:
        raise ValueError(f"its pictures have {size:,} pixels a side (at most {SIDE:,})")
    if len(model.get_layer("embedding").output.shape) != 2:
        raise ValueError("its layer embedding gives no vectors")
    check_memory(model)
    texture_layer(model)


def check_memory(model: tf.keras.Model, views: int = 1) -> None:
    """Raise ValueError where the layers, called `views` times, give more numbers for an image than memory holds."""
    total = 0
    for layer in model.layers:
        for tensor in tf.nest.flatten([node.outputs for node in layer.inbound_nodes]):
            numbers = tensor.shape[1:].num_elements()
            if numbers is None or numbers > SHOWN:
                raise ValueError(f"layer {layer.name} gives {tensor.shape[1:]} numbers an image")
            total += numbers * views
    if total > ALL_SHOWN:
        raise ValueError(f"its layers give {total:,} numbers an image (at most {ALL_SHOWN:,})")


def sha256(file: Path) -> str:
    """The hash of a file's bytes, as hexadecimal digits."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def absent(file: Path, why: str = "") -> UserError:
    """What to say where a checkpoint's file is not there."""
    return UserError(f"no checkpoint {file}{why}: train one with python train.py, or name another with --checkpoint")


def hashes(checkpoint: Path) -> dict[str, str]:
    """The sha256 of a model's file and of the gallery beside it.

    Raises:
        UserError: one of them is missing.
    """
    found = {}
    for part, file in (("model", checkpoint), ("gallery", checkpoint.with_name("gallery.npz"))):
        try:
            found[part] = sha256(file)
        except OSError as error:
            raise absent(file, f" ({error.strerror})") from None
    return found


def check_hashes(checkpoint: Path, facts: dict) -> None:
    """Raise UserError unless the files are those of which `facts` (best_epoch.json) carries the sha256."""
    known = facts.get("sha256")
    for part, digest in hashes(checkpoint).items():
        if not isinstance(known, dict) or known.get(part) != digest:
            raise UserError(
                f"the {part} of {checkpoint} is not the one its JSON was written with: put the files of one training "
                "together, or use them all the same with --trust"
            )
