"""What a stranger put into a model file is refused before any of it runs; what we write is read."""

import json
import shutil
import sys
import tempfile
import tracemalloc
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
import tensorflow as tf

import modules
from Modules import model_schema, safe_model
from Modules.cli import UserError
from Modules.config import Classifier, Embedding
from tests.commands import fails
from tests.Modules import hostile


@pytest.fixture
def shop(tmp_path, monkeypatch):
    """Its module can be imported, and it is forgotten afterwards."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    yield hostile.Workshop(tmp_path)
    sys.modules.pop("stranger", None)


@pytest.mark.parametrize("name", hostile.FILES)
def test_a_hostile_file_is_refused_before_its_code_runs(name, shop):
    file = hostile.FILES[name](shop)
    before = list((shop.folder / "temporary").iterdir())
    with pytest.raises(UserError, match=r"best_epoch\.\w+ is no model that train\.py wrote") as refused:
        modules.load(file)
    assert not shop.canary.exists()
    assert len(str(refused.value)) < 600
    assert list((shop.folder / "temporary").iterdir()) == before


@pytest.mark.parametrize("name", hostile.RUN_BY_KERAS)
def test_the_canary_shows_what_keras_alone_would_run(name, shop):
    file = hostile.FILES[name](shop)
    try:
        model = tf.keras.models.load_model(file, compile=False, safe_mode=True)
        model(np.zeros((1, hostile.SIZE, hostile.SIZE, 3), np.float32))
    except Exception:  # what follows the code is of no interest
        pass
    assert shop.canary.exists()


def test_an_honest_file_is_read_and_nothing_is_left_behind(shop):
    model = modules.load(shop.zipped(shop.members))
    probability = model(np.zeros((2, hostile.SIZE, hostile.SIZE, 3), np.float32))
    assert probability.shape == (2, 1)
    assert not list((shop.folder / "temporary").iterdir())
    assert not shop.canary.exists()


@pytest.mark.parametrize("backbone", modules.BACKBONES)
def test_what_our_networks_need_is_known(backbone, tmp_path):
    """Checked, not loaded: building InceptionV3 again takes its time."""
    size = 75 if backbone == "inception_v3" else 32
    views = 4 if backbone == "mobilenet" else 1
    settings = Embedding(backbone=backbone, averaged_views=views, beside_original=views > 1)
    embedding = modules.build_embedding(settings, size)
    if settings.beside_original:
        embedding = modules.beside(embedding, modules.build_backbone(settings, size), last=False)
    embedding = modules.averaged(embedding, views)
    config = Classifier(units=(4,), leaky=backbone != "mobilenet", outputs=1 + (backbone != "mobilenet"), dropout=0.1)
    modules.save(
        modules.join(embedding, modules.build_classifier(config, embedding.output_shape[-1])),
        tmp_path / "best_epoch.keras",
    )
    safe_model.check((tmp_path / "best_epoch.keras").read_bytes())


def test_a_model_that_maps_no_pictures_to_a_probability_is_refused(tmp_path):
    features = tf.keras.Input((3,))
    vectors = tf.keras.layers.UnitNormalization(name="embedding")(features)
    outputs = tf.keras.layers.Dense(1)(vectors)
    tf.keras.Model(features, outputs).save(tmp_path / "best_epoch.keras")
    with pytest.raises(UserError, match="not pictures to a probability"):
        modules.load(tmp_path / "best_epoch.keras")


def test_layers_that_would_fill_the_memory_are_refused(tmp_path):
    x = images = tf.keras.Input((64, 64, 3))
    for _ in range(70):
        x = tf.keras.layers.ZeroPadding2D(64)(x)
    x = tf.keras.layers.GlobalAveragePooling2D()(x)
    x = tf.keras.layers.Dense(1)(tf.keras.layers.UnitNormalization(name="embedding")(x))
    tf.keras.Model(images, x).save(tmp_path / "best_epoch.keras")
    with pytest.raises(UserError, match="numbers an image"):
        modules.load(tmp_path / "best_epoch.keras")


@pytest.mark.parametrize(
    ("megabytes", "make"),
    [
        (1, lambda size: b'{"layers":[%s0]}' % (size // 2 * b"0,")),
        (1, lambda size: b"{%s}" % b",".join(b'"%x":0' % i for i in range(size // 11))),
        (1, lambda size: b"[" * (size // 2) + b"]" * (size // 2)),
        (16, lambda size: b"[%s0]" % (size // 3 * b"[],")),
        (16, lambda size: b"[%s0]" % (size // 5 * b'"ab",')),
    ],
    ids=["items", "keys", "depth", "lists", "words"],
)
def test_errors_about_a_config_take_little_memory(megabytes, make):
    config = make(megabytes * 10**6)
    outer = b'{"module":"keras.src.engine.functional","class_name":"Functional","registered_name":"Functional",'
    config = outer + b'"build_config":{"input_shape":[null,8]},"config":' + config + b"}"
    assert len(config) < safe_model.MEMBERS["config.json"]
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"config|Model") as refused:
        model_schema.check_config(config)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 * 2**20
    assert len(str(refused.value)) < 400


def saved(folder, size: int, layer) -> Path:
    """A model that maps pictures to a probability, with `layer` before the embedding."""
    x = images = tf.keras.Input((size, size, 3))
    x = tf.keras.layers.GlobalAveragePooling2D()(layer(x))
    x = tf.keras.layers.Dense(1)(tf.keras.layers.UnitNormalization(name="embedding")(x))
    modules.save(tf.keras.Model(images, x), folder / "best_epoch.keras")
    return folder / "best_epoch.keras"


def test_pictures_that_no_batch_of_fits_into_memory_are_refused(tmp_path):
    file = saved(tmp_path, 6600, tf.keras.layers.ReLU())
    with pytest.raises(UserError, match="less than or equal to 1024, not 6600"):
        modules.load(file)
    with pytest.raises(UserError, match="--image-size 1100 is too large for mobilenet: at most 1,024 pixels"):
        modules.build_backbone(Embedding(backbone="mobilenet"), 1100)


def test_many_layers_that_would_fill_the_memory_together_are_refused(tmp_path):
    wide = tf.keras.layers.Conv2D(30, 1)  # 31 million numbers
    same = tf.keras.layers.ReLU()

    def many(x):
        return tf.keras.layers.Add()([same(wide(x)) for _ in range(40)])

    with pytest.raises(UserError, match=r"its layers give .* numbers an image"):
        modules.load(saved(tmp_path, 1024, many))


def test_a_model_without_maps_to_tell_texture_from_is_refused(tmp_path):
    with pytest.raises(UserError, match="no layer has maps of 6 pixels a side or more"):
        modules.load(saved(tmp_path, 64, tf.keras.layers.AveragePooling2D(2)))


# --- Weights of a backbone, from elsewhere ----------------------------------------------------------------------------


def test_published_weights_may_be_compressed_but_lead_nowhere(tmp_path):
    file = tmp_path / "mobilenet_notop.weights.h5"
    with h5py.File(file, "w") as weights:
        weights.create_dataset("layers/dense/vars/0", data=np.zeros((50, 2), "f4"), compression="gzip")
    assert safe_model.check_arrays(file, compressed=True) == 100
    with pytest.raises(ValueError, match="does not lie in the file"):
        safe_model.check_arrays(file)
    with h5py.File(file, "a") as weights:
        weights["layers/away"] = h5py.ExternalLink("/etc/passwd", "/")
    with pytest.raises(UserError, match=r"not weights of mobilenet without its top .*'away' is a link"):
        modules.pretrained("mobilenet", str(file))


def test_keras_opens_the_weights_that_were_checked_and_no_archive_behind_them(tmp_path):
    """HDF5 in front, a whole `.keras` archive behind: by its name Keras would open the archive."""
    file = tmp_path / "mobilenet.keras"
    published = tf.keras.applications.MobileNet(include_top=False, weights=None)
    published.save(tmp_path / "hidden.keras")
    with h5py.File(file, "w") as weights:
        weights["0"] = np.zeros(3, "f4")
    with zipfile.ZipFile(tmp_path / "hidden.keras") as hidden, zipfile.ZipFile(file, "a") as archive:
        for name in hidden.namelist():
            archive.writestr(name, hidden.read(name))
    assert safe_model.check_arrays(file, compressed=True) == 3
    with pytest.raises(UserError, match=r"not weights of mobilenet without its top \(expected a \.h5 file"):
        modules.pretrained("mobilenet", str(file))


def test_weights_that_grow_when_read_are_refused(tmp_path):
    with h5py.File(tmp_path / "bomb.h5", "w") as weights:
        weights.create_dataset("0", (2**40,), "f4", chunks=(2**20,), compression="gzip")
    assert (tmp_path / "bomb.h5").stat().st_size < 10**6
    with pytest.raises(ValueError, match="more numbers"):
        safe_model.check_arrays(tmp_path / "bomb.h5", compressed=True)


# --- Files of one training --------------------------------------------------------------------------------------------


def test_files_of_another_training_are_an_error_unless_trusted(trained, tmp_path, monkeypatch, capsys):
    lesion = tmp_path / "text.jpg"
    lesion.write_text("no picture: what is asked ends here, after all files are read")
    for part, name in (("model", "best_epoch.keras"), ("gallery", "gallery.npz")):
        folder = tmp_path / part
        shutil.copytree(trained, folder)
        with zipfile.ZipFile(folder / name, "a") as archive:
            archive.comment = b"not as it was written"
        arguments = [lesion, "--checkpoint", folder / "best_epoch.keras", "--output", tmp_path / "out.csv"]
        line = fails("predict", *arguments, monkeypatch=monkeypatch, capsys=capsys)
        assert f"the {part} of {folder}/best_epoch.keras is not the one" in line
        assert "--trust" in line
        line = fails("predict", *arguments, "--trust", monkeypatch=monkeypatch, capsys=capsys)
        # The gallery knows its model too, and of another one it would say nothing but nonsense.
        assert ("is the gallery of another model" if part == "model" else "none of 1 pictures could be read") in line


@pytest.mark.parametrize("name", ["lambda-h5-renamed", "any-operation", "zip-bomb", "member-missing"])
def test_the_command_refuses_a_hostile_file_in_one_line_also_when_trusted(name, shop, trained, monkeypatch, capsys):
    file = hostile.FILES[name](shop)
    shutil.copy(trained / "best_epoch.json", file.with_name("best_epoch.json"))
    with np.load(trained / "gallery.npz") as known:  # its maker knows what a gallery is bound to
        np.savez(file.with_name("gallery.npz"), **dict(known) | {"checkpoint": safe_model.sha256(file)})
    for arguments, word in (([], "--trust"), (["--trust"], "no model that train.py wrote")):
        assert word in fails("predict", "--checkpoint", file, *arguments, monkeypatch=monkeypatch, capsys=capsys)
    assert not shop.canary.exists()


def test_a_json_without_hashes_is_not_believed(trained, tmp_path):
    facts = json.loads((trained / "best_epoch.json").read_text())
    safe_model.check_hashes(trained / "best_epoch.keras", facts)
    for changed in ({}, {"sha256": None}, {"sha256": facts["sha256"] | {"gallery": "0" * 64}}):
        rest = {key: value for key, value in facts.items() if key != "sha256"}
        with pytest.raises(UserError, match="not the one its JSON was written with"):
            safe_model.check_hashes(trained / "best_epoch.keras", rest | changed)
