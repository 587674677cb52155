"""The networks: rows of unit length, the backbone's own preprocessing, plain flat files, weights in their places."""

import json
import socket
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

import modules
from Modules.cli import UserError
from Modules.config import Classifier, Embedding

SIZE = 32
SMALL = Embedding(backbone="mobilenet", dense_units=(16,), embedding_size=8)
APPLICATIONS = {
    "inception_v3": tf.keras.applications.inception_v3,
    "resnet50": tf.keras.applications.resnet50,
    "mobilenet": tf.keras.applications.mobilenet,
}


def pictures(n=4, size=SIZE, seed=0):
    return np.random.default_rng(seed).uniform(0, 255, (n, size, size, 3)).astype(np.float32)


def embeddings_of(n=6, dimension=8, seed=0):
    vectors = np.random.default_rng(seed).normal(size=(n, dimension))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def shaken(model, seed=0):
    """Every weight and every moving statistic at random, so that none can stand in another's place unnoticed."""
    rng = np.random.default_rng(seed)
    scaled = (value * rng.uniform(0.8, 1.2, value.shape) for value in model.get_weights())
    model.set_weights([value + rng.uniform(0, 0.05) for value in scaled])
    return model


@pytest.fixture(scope="module")
def embedding():
    tf.keras.utils.set_random_seed(0)
    return shaken(modules.build_embedding(SMALL, SIZE))


@pytest.fixture
def _bfloat16():
    tf.keras.mixed_precision.set_global_policy("mixed_bfloat16")


# --- The embedding ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_every_embedding_has_length_one(embedding, batch):
    vectors = embedding(pictures(batch)).numpy()
    assert (vectors.shape, vectors.dtype) == ((batch, 8), np.float32)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def test_an_embedding_does_not_depend_on_its_batch(embedding):
    image = pictures(1)
    alone = embedding(image).numpy()[0]
    for seed in (1, 2):
        among = embedding(np.concatenate([pictures(5, seed=seed), image])).numpy()[-1]
        np.testing.assert_allclose(among, alone, atol=1e-5)


@pytest.mark.usefixtures("_bfloat16")
def test_mixed_precision_reaches_the_backbone_and_stops_at_the_embedding():
    model = shaken(modules.build_embedding(SMALL, SIZE))
    assert model.get_layer("conv1").compute_dtype == "bfloat16"
    assert model.get_layer("dense_1").compute_dtype == "bfloat16"
    for name in ("preprocess", "features", "projection", "embedding"):
        assert model.get_layer(name).compute_dtype == "float32", name
    vectors = model(pictures(3))
    assert vectors.dtype == tf.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert modules.build_classifier(Classifier(dropout=0.1), 8).output.dtype == tf.float32
    assert all(layer.compute_dtype == "float32" for layer in modules.build_classifier(Classifier(), 8).layers)


def test_layers_are_those_of_the_config():
    model = modules.build_embedding(replace(SMALL, dense_units=(12, 10), embedding_size=5), SIZE)
    assert [model.get_layer(name).units for name in ("dense_1", "dense_2", "projection")] == [12, 10, 5]
    assert model.get_layer("dense_1").activation is tf.keras.activations.relu
    assert model.get_layer("projection").activation is tf.keras.activations.linear
    assert model.get_layer("projection").input.shape[-1] == 10


# --- Preprocessing ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", modules.BACKBONES)
def test_preprocessing_is_the_backbones_own(backbone):
    scaling = modules.BACKBONES[backbone][1]
    images = np.concatenate([pictures(2), np.full((1, SIZE, SIZE, 3), 255, np.float32)])
    expected = APPLICATIONS[backbone].preprocess_input(images.copy())
    np.testing.assert_allclose(modules.preprocess(tf.constant(images), scaling), expected, atol=1e-4)


@pytest.mark.parametrize(("scaling", "low", "high"), [("0..1", 0, 1), ("-1..1", -1, 1)])
def test_other_scalings_end_where_their_names_say(scaling, low, high):
    ends = np.broadcast_to(np.float32([0, 255])[:, None, None, None], (2, 1, 1, 3))
    np.testing.assert_allclose(modules.preprocess(tf.constant(ends), scaling)[:, 0, 0, 0], [low, high], atol=1e-6)


def test_the_config_chooses_the_scaling():
    for scaling, expected in (("own", -1), ("-1..1", -1), ("0..1", 0)):
        model = modules.build_backbone(replace(SMALL, input_scaling=scaling), SIZE)
        scaled = tf.keras.Model(model.input, model.get_layer("preprocess").output)
        assert scaled(np.zeros((1, SIZE, SIZE, 3))).numpy().min() == expected


# --- Flat, plain, trainable as asked ----------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", modules.BACKBONES)
def test_the_joined_model_is_flat_and_of_kerass_own_layers(backbone):
    size = 32 if backbone != "inception_v3" else 75
    config = replace(SMALL, backbone=backbone, batch_norm_momentum=0.8)
    classifier = modules.build_classifier(Classifier(outputs=2, dropout=0.4, leaky=True), 8)
    model = modules.join(modules.build_embedding(config, size), classifier)
    for layer in model.layers:
        assert not isinstance(layer, tf.keras.Model), layer.name
        assert getattr(tf.keras.layers, type(layer).__name__, None) is type(layer), layer
        assert not isinstance(layer, tf.keras.layers.Lambda), layer.name
    norms = [layer for layer in model.layers if isinstance(layer, tf.keras.layers.BatchNormalization)]
    assert len(norms) > 20
    assert {layer.momentum for layer in norms} == {0.8}
    assert model.input_shape == (None, size, size, 3)
    assert model.output_shape == (None, 1)


def test_a_frozen_backbone_leaves_the_dense_layers_to_learn_and_preprocessing_never_learns():
    config = replace(SMALL, input_scaling="caffe")  # the one whose preprocessing has weights
    frozen = modules.build_embedding(replace(config, train_backbone=False), SIZE)
    assert [weight.name for weight in frozen.trainable_weights] == [
        "dense_1/kernel:0", "dense_1/bias:0", "projection/kernel:0", "projection/bias:0",
    ]  # fmt: skip
    free = modules.build_embedding(config, SIZE)
    assert len(free.trainable_weights) > 80
    assert not any("preprocess" in weight.name for weight in free.trainable_weights)


def test_a_backbone_is_cut_after_its_inner_layer():
    whole = shaken(modules.build_backbone(SMALL, SIZE))
    cut = modules.build_backbone(replace(SMALL, backbone_layer="conv_pw_3_relu"), SIZE)
    assert cut.output_shape == (None, 128)
    assert "conv_pw_4" not in [layer.name for layer in cut.layers]
    for layer in cut.layers:
        layer.set_weights(whole.get_layer(layer.name).get_weights())
    inner = tf.keras.Model(whole.input, whole.get_layer("conv_pw_3_relu").output)(pictures())
    np.testing.assert_allclose(cut(pictures()), tf.reduce_mean(inner, [1, 2]), atol=1e-5)


# --- Weights ----------------------------------------------------------------------------------------------------------


# --- Views ------------------------------------------------------------------------------------------------------------


def turned(images):
    """The eight flips and turns of square pictures [B, S, S, 3]."""
    upright = [images, images[:, :, ::-1], images[:, ::-1], images[:, ::-1, ::-1]]
    return [*upright, *(view.transpose(0, 2, 1, 3) for view in upright)]


@pytest.mark.parametrize("views", [1, 2, 4, 8])
def test_views_are_the_first_flips_and_turns_to_the_last_bit(views):
    image = tf.keras.Input((6, 6, 3))
    found = tf.keras.Model(image, modules.dihedral_views(image, views))(pictures(size=6))
    found = found if views > 1 else [found]
    assert len(found) == views
    for one, other in zip(found, turned(pictures(size=6)), strict=False):
        np.testing.assert_array_equal(one, other)


def test_the_mean_of_views_is_flat_of_unit_length_and_the_same_whichever_way_up():
    single = shaken(modules.build_embedding(replace(SMALL, averaged_views=8), SIZE))
    model = modules.averaged(single, 8)
    mean = np.mean([single(view, training=False) for view in turned(pictures())], axis=0)
    expected = mean / np.linalg.norm(mean, axis=1, keepdims=True)
    for view in turned(pictures()):
        np.testing.assert_allclose(model(view, training=False), expected, atol=2e-5)
    assert not any(isinstance(layer, tf.keras.Model) for layer in model.layers)
    assert model.get_layer("embedding").output is model.output
    assert (
        len(model.get_weights()) == len(single.get_weights()) + len([x for x in model.layers if "upend" in x.name]) + 1
    )
    assert [weight.shape for weight in model.trainable_weights] == [w.shape for w in single.trainable_weights]


@pytest.mark.parametrize("last", [False, True])
def test_beside_the_trained_embedding_the_original_features_count_as_much(last):
    config = replace(SMALL, averaged_views=1 if last else 2, beside_original=True)
    trained, original = (shaken(build(config, SIZE)) for build in (modules.build_embedding, modules.build_backbone))
    model = modules.beside(trained, original, last)
    features = original(pictures(), training=False).numpy()
    parts = [trained(pictures(), training=False), features / np.linalg.norm(features, axis=1, keepdims=True)]
    np.testing.assert_allclose(model(pictures(), training=False), np.concatenate(parts, axis=1) / np.sqrt(2), atol=1e-5)
    assert model.layers[-1].name == ("embedding" if last else "view_embedding")
    assert not any(isinstance(layer, tf.keras.Model) for layer in model.layers)


def test_one_view_is_the_network_itself(embedding):
    assert modules.averaged(embedding, 1) is embedding


def test_a_batch_normalised_as_a_whole_has_length_one_and_leaves_its_rows_short():
    model = shaken(modules.build_embedding(replace(SMALL, normalisation="batch"), SIZE))
    vectors = model(pictures(16), training=False).numpy()
    assert np.linalg.norm(vectors) == pytest.approx(1, abs=1e-5)
    assert np.linalg.norm(vectors, axis=1).max() < 0.5


def test_the_backbones_weights_are_taken_out_as_they_are_put_in(embedding):
    weights = modules.backbone_weights(embedding)
    backbone = modules.build_backbone(SMALL, SIZE, weights)
    inside = tf.keras.Model(embedding.input, embedding.get_layer("features").output)
    np.testing.assert_array_equal(backbone(pictures(), training=False), inside(pictures(), training=False))


@pytest.fixture(scope="module")
def published():
    """MobileNet as keras.applications builds it."""
    return shaken(tf.keras.applications.MobileNet(include_top=False, weights=None, input_shape=(SIZE, SIZE, 3)), seed=3)


@pytest.mark.parametrize(
    ("name", "scaling"), [("mobilenet_notop.weights.h5", "own"), ("mobilenet_1_0_224_tf_no_top.h5", "caffe")]
)
def test_weights_land_in_their_layers(published, tmp_path, name, scaling):
    published.save_weights(tmp_path / name)
    weights = modules.pretrained("mobilenet", str(tmp_path / name))
    model = modules.build_embedding(replace(SMALL, input_scaling=scaling), SIZE, weights)
    features = tf.keras.Model(model.input, model.get_layer("features").output)
    application = APPLICATIONS["resnet50" if scaling == "caffe" else "mobilenet"]
    expected = tf.reduce_mean(published(application.preprocess_input(pictures())), [1, 2])
    assert np.std(expected) > 1e-3
    np.testing.assert_allclose(features(pictures()), expected, rtol=1e-3, atol=1e-4)


def test_a_folder_stands_for_the_backbones_file_in_it(published, tmp_path):
    published.save_weights(tmp_path / "mobilenet_notop.weights.h5")
    for one, other in zip(modules.pretrained("mobilenet", str(tmp_path)), published.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_none_is_random_weights():
    assert modules.pretrained("mobilenet", "none") is None


def test_a_missing_file_names_what_was_expected(tmp_path):
    with pytest.raises(UserError, match=r"lost\.h5.*expected imagenet, none, a file, or a folder"):
        modules.pretrained("mobilenet", str(tmp_path / "lost.h5"))
    with pytest.raises(UserError, match=r"no file .*resnet50_notop\.weights\.h5"):
        modules.pretrained("resnet50", str(tmp_path))


@pytest.mark.parametrize("name", ["mobilenet.h5", "mobilenet.weights.h5"])
def test_a_file_of_something_else_is_the_users_to_mend(tmp_path, name):
    (tmp_path / name).write_text("no weights")
    with pytest.raises(UserError, match=f"{name}: not weights of mobilenet without its top"):
        modules.pretrained("mobilenet", str(tmp_path / name))


def test_weights_of_another_network_are_refused(tmp_path):
    modules.build_classifier(Classifier(), 8).save_weights(tmp_path / "any.weights.h5")
    with pytest.raises(UserError, match="not weights of mobilenet"):
        modules.pretrained("mobilenet", str(tmp_path / "any.weights.h5"))


def test_a_failed_download_names_the_three_ways_out_and_does_not_wait_for_ever(monkeypatch):
    def unreachable(*_, **__):
        assert 0 < socket.getdefaulttimeout() < 60
        raise OSError("URL fetch failure")

    monkeypatch.setitem(modules.BACKBONES, "mobilenet", (unreachable, "-1..1"))
    ways = r"connect and retry; --weights PATH, .*mobilenet_notop.*; --weights none"
    with pytest.raises(modules.DownloadError, match=ways):
        modules.pretrained("mobilenet", "imagenet")
    assert socket.getdefaulttimeout() is None


@pytest.mark.parametrize(
    ("changes", "size", "message"),
    [
        ({"backbone": "mobilnet"}, SIZE, "unknown backbone 'mobilnet': did you mean mobilenet"),
        ({"input_scaling": "0-1"}, SIZE, "unknown input scaling '0-1': did you mean 0..1"),
        ({"backbone_layer": "conv_pw_3_rel"}, SIZE, "no layer 'conv_pw_3_rel': did you mean conv_pw_3_relu"),
        ({}, 16, "--image-size 16 does not suit mobilenet"),
    ],
)
def test_a_network_that_cannot_be_built_says_why(changes, size, message):
    with pytest.raises(UserError, match=message):
        modules.build_embedding(replace(SMALL, **changes), size)


@pytest.mark.parametrize("weights", ["imagenet", "none"])
def test_weights_of_an_unknown_backbone_name_the_nearest(weights):
    with pytest.raises(UserError, match="unknown backbone 'mobilnet': did you mean mobilenet"):
        modules.pretrained("mobilnet", weights)


# --- The classifier ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outputs", [1, 2])
def test_the_classifier_gives_one_probability(outputs):
    config = Classifier(units=(7, 5), leaky=True, dropout=0.4, outputs=outputs)
    model = modules.build_classifier(config, 8)
    values = model(embeddings_of()).numpy()
    assert (values.shape, values.dtype) == ((6, 1), np.float32)
    assert ((values > 0) & (values < 1)).all()
    assert [layer.units for layer in model.layers if isinstance(layer, tf.keras.layers.Dense)][:2] == [7, 5]
    np.testing.assert_array_equal(model(embeddings_of(), training=False), values)


def test_dropout_drops_its_share_anew_at_each_step_and_keeps_the_mean():
    layer = modules.ResumableDropout(0.4)
    ones = np.ones((100, 100), np.float32)
    first, second = (layer(ones, training=True).numpy() for _ in range(2))
    np.testing.assert_array_equal(layer(ones), ones)
    for dropped in (first, second):
        assert set(np.unique(dropped)) == {np.float32(0), np.float32(1 / 0.6)}
        assert dropped.mean() == pytest.approx(1, abs=0.03)
    assert np.corrcoef(first.ravel(), second.ravel())[0, 1] == pytest.approx(0, abs=0.05)
    other = modules.ResumableDropout(0.4)
    assert not np.array_equal(other(ones, training=True), first)
    other.set_weights([layer.get_weights()[0] - [0, 2]])
    np.testing.assert_array_equal(other(ones, training=True), first)


def test_leaky_units_pass_what_relu_stops():
    for leaky in (True, False):
        model = modules.build_classifier(Classifier(units=(4,), leaky=leaky), 8)
        active = tf.keras.Model(model.input, model.get_layer("classifier_1_active").output)(embeddings_of(50))
        assert (active.numpy().min() < 0) == leaky


def test_two_logits_give_the_softmax_of_the_second():
    model = shaken(modules.build_classifier(Classifier(units=(7,), outputs=2), 8))
    model.get_layer("difference").set_weights([np.float32([[-1], [1]])])
    logits = tf.keras.Model(model.input, model.get_layer("logits").output)(embeddings_of())
    assert logits.shape == (6, 2)
    np.testing.assert_allclose(model(embeddings_of())[:, 0], tf.nn.softmax(logits)[:, 1], atol=1e-6)


def test_two_logits_learn_as_by_cross_entropy():
    """One step of plain gradient descent, against the same dense layers under a softmax."""
    targets = np.int32([0, 1, 1, 0, 1, 0])
    tf.keras.utils.set_random_seed(0)
    model = modules.build_classifier(Classifier(units=(7, 5), leaky=True, outputs=2), 8)
    logits = tf.keras.Model(model.input, model.get_layer("logits").output)
    with tf.GradientTape() as tape:
        by_softmax = tf.nn.sparse_softmax_cross_entropy_with_logits(targets, logits(embeddings_of()))
        loss = tf.reduce_mean(by_softmax)
    gradients = tape.gradient(loss, logits.weights)
    expected = [value - 0.5 * step for value, step in zip(logits.get_weights(), gradients, strict=True)]
    model.compile(tf.keras.optimizers.SGD(0.5), tf.keras.losses.BinaryCrossentropy())
    result = model.train_on_batch(embeddings_of(), targets[:, None].astype(np.float32))
    assert result == pytest.approx(float(loss), abs=1e-5)
    for value, wanted in zip(logits.get_weights(), expected, strict=True):
        np.testing.assert_allclose(value, wanted, atol=1e-5)
    np.testing.assert_array_equal(model.get_layer("difference").get_weights()[0], [[-1], [1]])


@given(
    targets=st.lists(st.integers(0, 1), min_size=1, max_size=20),
    seed=st.integers(0, 1000),
)
@settings(max_examples=30, deadline=None)
def test_metrics_are_those_of_a_count(targets, seed):
    targets = np.array(targets)
    probability = np.random.default_rng(seed).uniform(0, 1, len(targets)).astype(np.float32)
    values = {}
    for metric in modules.classifier_metrics():
        metric.update_state(targets[:, None].astype(np.float32), probability[:, None])
        values[metric.name] = float(np.squeeze(metric.result()))
    called = probability > 0.5
    hits = (called & (targets == 1)).sum()
    assert values == pytest.approx(
        {
            "accuracy": (called == targets).mean(),
            "precision": hits / max(called.sum(), 1),
            "recall": hits / max(targets.sum(), 1),
            "f1_score": 2 * hits / max(called.sum() + targets.sum(), 1),
        },
        abs=1e-5,
    )


# --- Joined, saved, loaded --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def joined(embedding):
    return modules.join(embedding, shaken(modules.build_classifier(Classifier(outputs=2), 8), seed=1))


def test_the_joined_model_is_one_after_the_other(embedding):
    classifier = shaken(modules.build_classifier(Classifier(units=(7,), dropout=0.5), 8))
    model = modules.join(embedding, classifier)
    np.testing.assert_allclose(model(pictures()), classifier(embedding(pictures())), atol=1e-6)
    np.testing.assert_allclose(
        tf.keras.Model(model.input, model.get_layer("embedding").output)(pictures()), embedding(pictures()), atol=1e-6
    )


def test_a_calibration_is_a_fixed_layer_that_moves_the_logit_and_keeps_the_ranking(embedding, tmp_path):
    classifier = shaken(modules.build_classifier(Classifier(units=(7,), outputs=2, dropout=0.5), 8))
    model = modules.join(embedding, classifier, (0.5, -1.25))
    logit = modules.logit_model(classifier)(embedding(pictures()))
    np.testing.assert_allclose(model(pictures()), tf.sigmoid(0.5 * logit - 1.25), atol=1e-6)
    np.testing.assert_allclose(classifier(embedding(pictures())), tf.sigmoid(logit), atol=1e-6)
    layer = model.get_layer("calibration")
    assert not layer.trainable
    assert layer.dtype == "float32"
    modules.save(model, tmp_path / "model.keras")
    np.testing.assert_allclose(modules.load(tmp_path / "model.keras")(pictures()), model(pictures()), atol=1e-6)


def test_what_is_saved_is_what_is_loaded_and_names_no_code_of_ours(joined, tmp_path):
    file = tmp_path / "best_epoch.keras"
    modules.save(joined, file)
    assert list(tmp_path.iterdir()) == [file]
    loaded = modules.load(file)
    np.testing.assert_allclose(loaded(pictures()), joined(pictures()), atol=1e-6)
    assert loaded.optimizer is None
    with zipfile.ZipFile(file) as archive:
        config = json.loads(archive.read("config.json"))
    for layer in config["config"]["layers"]:
        assert layer["module"].startswith("keras."), layer
        assert layer["registered_name"] is None, layer


def test_a_save_that_fails_leaves_the_former_file(joined, tmp_path, monkeypatch):
    file = tmp_path / "best_epoch.keras"
    file.write_bytes(b"former")

    def full_disk(self, path):
        path.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(tf.keras.Model, "save", full_disk)
    with pytest.raises(OSError, match="no space"):
        modules.save(joined, file)
    assert file.read_bytes() == b"former"


def test_a_missing_checkpoint_says_how_to_get_one(tmp_path):
    with pytest.raises(UserError, match=r"no checkpoint .*best_epoch\.keras.*train\.py.*--checkpoint"):
        modules.load(tmp_path / "best_epoch.keras")


def not_a_model(file):
    file.write_text("no model")


def another_zip(file):
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("readme.txt", "no model")


def a_model_of_another_kind(file):
    tf.keras.Sequential([tf.keras.layers.Dense(1, input_shape=(3,))]).save(file)


def a_model_that_runs_code(file):
    images = tf.keras.Input((3,))
    tf.keras.Model(images, tf.keras.layers.Lambda(lambda x: x + 1, name="embedding")(images)).save(file)


@pytest.mark.parametrize("write", [not_a_model, another_zip, a_model_of_another_kind, a_model_that_runs_code])
def test_a_file_that_train_did_not_write_is_refused(tmp_path, write):
    file = tmp_path / "best_epoch.keras"
    write(file)
    with pytest.raises(UserError, match=r"best_epoch\.keras is no model that train\.py wrote"):
        modules.load(file)
