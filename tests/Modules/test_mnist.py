"""The warm-up where MNIST can't be downloaded: scikit-learn's digits through the whole path, in a few steps."""

import json

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds

from Modules import mnist, runtime
from Modules.cli import UserError
from Modules.metric_learning.quality import embedding_quality
from Modules.mnist import build_network, load_images, warm_up


@pytest.fixture(scope="module", autouse=True)
def _offline():
    def refuse(*_, **__):
        raise OSError("network is unreachable")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mnist.socket, "create_connection", refuse)
        patch.setattr(tfds.core.DatasetBuilder, "is_prepared", lambda self: False)
        yield


def test_digits_take_the_place_of_mnist_and_it_is_said(capsys):
    name, (images, digits), (test_images, test_digits) = load_images()
    assert name == "digits"
    said = capsys.readouterr().out
    assert "can't be downloaded (network is unreachable)" in said
    assert "scikit-learn's digits" in said
    assert images.dtype == test_images.dtype == np.float32
    assert images.shape[1:] == test_images.shape[1:] == (28, 28, 1)
    assert (images.min(), images.max()) == (0, 1)
    assert len(images) + len(test_images) == 1797
    assert len(test_images) == 360
    assert set(digits) == set(test_digits) == set(range(10))
    assert not {image.tobytes() for image in images} & {image.tobytes() for image in test_images}


def test_mnist_is_brought_into_the_same_form(monkeypatch):
    class Connection:
        def close(self):
            pass

    def part(n):
        return {"image": np.full((n, 28, 28, 1), 255, np.uint8), "label": np.arange(n) % 10}

    def load(name, split, **_):
        assert (name, split) == ("mnist", ["train", "test"])
        return [part(30), part(20)]

    monkeypatch.setattr(mnist.socket, "create_connection", lambda *_, **__: Connection())
    monkeypatch.setattr(tfds, "load", load)
    monkeypatch.setattr(tfds, "as_numpy", lambda parts: parts)
    name, (images, digits), (test_images, _) = load_images()
    assert (name, images.shape, test_images.shape) == ("MNIST", (30, 28, 28, 1), (20, 28, 28, 1))
    assert images.dtype == np.float32
    assert images.max() == 1
    np.testing.assert_array_equal(digits, np.arange(30) % 10)


def test_every_embedding_has_length_one():
    vectors = build_network()(np.random.default_rng(0).uniform(size=(5, 28, 28, 1)).astype(np.float32)).numpy()
    assert vectors.shape == (5, 64)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


@pytest.fixture(scope="module")
def warm(tmp_path_factory):
    """The folder and the result of 30 steps."""
    folder = tmp_path_factory.mktemp("mnist")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mnist, "STEPS", 30)
        patch.setattr(mnist, "SHOWN", 100)
        return folder, warm_up(folder, seed=0)


def test_the_digits_come_apart(warm):
    quality, history = warm[1]["test"], warm[1]["history"]
    assert quality["n"] == 360
    assert quality["knn_accuracy"] > 0.8  # 0.1 by chance
    assert history["loss"][-1] < history["loss"][0] / 2
    assert len(history["val_knn_accuracy"]) == 3
    # Nearest neighbours tell digits apart in pixels already: the clouds must be further apart than before training.
    runtime.set_seeds(0)
    images, digits = load_images()[2]
    untrained = embedding_quality(build_network().predict(images, verbose=0), digits, None)
    assert quality["silhouette"] > untrained["silhouette"] + 0.2


def test_everything_is_written_and_nothing_left_over(warm):
    folder, result = warm
    written = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert written == [".lock", "embedding.keras", "figures/curves.png", "figures/tsne.png", "mnist.json"]
    assert json.loads((folder / "mnist.json").read_text())["test"] == result["test"]


def test_the_saved_embedding_opens_without_our_code(warm):
    """Without our loss too, in safe mode, with every default."""
    saved = tf.keras.models.load_model(warm[0] / "embedding.keras")
    images, digits = load_images()[2]
    vectors = saved.predict(images, verbose=0)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    silhouette = embedding_quality(vectors, digits, None)["silhouette"]
    assert silhouette == pytest.approx(warm[1]["test"]["silhouette"], abs=1e-4)


def test_a_run_of_another_seed_is_not_gone_on_with(tmp_path, monkeypatch):
    monkeypatch.setattr(mnist, "STEPS", 1)
    monkeypatch.setattr(mnist.NeuralNetwork, "forget", lambda self: None)
    warm_up(tmp_path, seed=0)
    with pytest.raises(UserError, match="seed"):
        warm_up(tmp_path, seed=1, resume=True)


def test_an_unfinished_run_is_not_overwritten(tmp_path):
    (tmp_path / "state-embedding.npz").touch()
    with pytest.raises(UserError, match="--resume"):
        warm_up(tmp_path, seed=0)
