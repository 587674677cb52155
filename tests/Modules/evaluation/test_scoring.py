"""A model on a split: its outputs in order, its neighbours, the plain classifier to beat."""

import numpy as np
import pandas as pd
import pytest
import tensorflow as tf

from Modules.evaluation import scoring
from Modules.evaluation.metrics import evaluate
from Modules.metric_learning.quality import embedding_quality, k_shot


def table_of(target, balanced=None, groups=None):
    groups = np.arange(len(target)) if groups is None else groups
    return pd.DataFrame(
        {
            "isic_id": [f"ISIC_{i:07d}" for i in range(len(target))],
            "target": target,
            "balanced": np.ones(len(target), bool) if balanced is None else balanced,
            "group": [f"group {i}" for i in groups],
            "patient_id": [f"patient {i}" for i in groups],
        }
    )


def unit(vectors):
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def random_vectors(n, dimension=6, seed=0):
    return unit(np.random.default_rng(seed).normal(size=(n, dimension)))


# --- A model on batches -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    """A joined model in small: [B, 4, 4, 3] -> probability [B, 1], with a layer named `embedding`."""
    tf.keras.utils.set_random_seed(0)
    images = tf.keras.Input((4, 4, 3))
    x = tf.keras.layers.Dense(5)(tf.keras.layers.Flatten()(images))
    x = tf.keras.layers.Dropout(0.5)(tf.keras.layers.UnitNormalization(name="embedding")(x))
    return tf.keras.Model(images, tf.keras.layers.Dense(1, activation="sigmoid")(x))


IMAGES = np.random.default_rng(0).uniform(-1, 1, (11, 4, 4, 3)).astype(np.float32)
BATCHES = tf.data.Dataset.from_tensor_slices((IMAGES, np.zeros(11, np.int32))).batch(4)


def test_scores_come_in_order_one_for_each_image(model):
    probability, embeddings = scoring.score(model, BATCHES, 11, "test")
    assert (probability.shape, embeddings.shape) == ((11,), (11, 5))
    assert probability.dtype == embeddings.dtype == np.float32
    np.testing.assert_allclose(probability, model(IMAGES, training=False)[:, 0], atol=1e-6)
    between = tf.keras.Model(model.input, model.get_layer("embedding").output)
    np.testing.assert_allclose(embeddings, between(IMAGES), atol=1e-6)


def test_a_compiled_model_takes_batches_of_any_size_and_drops_nothing_out(model):
    run = scoring.compiled(scoring.with_embedding(model))
    for n in (1, 4, 11):
        probability, embeddings = run(IMAGES[:n])
        np.testing.assert_allclose(probability, model(IMAGES[:n], training=False), atol=1e-6)
        assert embeddings.shape == (n, 5)


# --- evaluate_split ---------------------------------------------------------------------------------------------------


def test_a_split_is_evaluated_on_its_balanced_set_and_on_the_whole():
    rng = np.random.default_rng(0)
    target = rng.integers(0, 2, 40)
    table = table_of(target, balanced=np.arange(40) % 3 > 0, groups=np.arange(40) // 2)
    table.index += 100  # positions count, not labels
    probability, embeddings = rng.uniform(size=40), random_vectors(40)
    known = random_vectors(30, seed=1).astype(np.float16)
    gallery = {
        "embeddings": known,
        "targets": rng.integers(0, 2, 30).astype(np.int8),
        "groups": np.array([f"group {i}" for i in range(30)]),
    }
    results = scoring.evaluate_split(table, probability, embeddings, gallery, 0.4)
    assert list(results) == ["test", "test_full"]
    for view, rows in (("test", table["balanced"].to_numpy()), ("test_full", np.ones(40, bool))):
        chosen = table[rows]
        expected = evaluate(chosen["target"].to_numpy(), probability[rows], 0.4, chosen["patient_id"].to_numpy())
        images = embeddings[rows], chosen["target"].to_numpy(), chosen["group"].to_numpy()
        lesions = known.astype(np.float32), gallery["targets"], gallery["groups"]
        quality = embedding_quality(*images, lesions) | {"k_shot": k_shot(*images, lesions)}
        assert results[view] == {**expected, "embedding": {**quality, "collapsed": False}}
    assert results["test"]["n"] < results["test_full"]["n"] == 40


def test_images_on_one_spot_are_called_collapsed():
    target = np.arange(12) % 2
    spot = unit(np.ones((12, 6)) + np.random.default_rng(0).normal(0, 0.01, (12, 6)))
    gallery = {"embeddings": random_vectors(4), "targets": np.arange(4) % 2, "groups": np.array(list("abcd"))}
    for embeddings, collapsed in ((spot, True), (random_vectors(12), False)):
        results = scoring.evaluate_split(table_of(target), np.full(12, 0.5), embeddings, gallery, 0.5)
        assert results["test"]["embedding"]["collapsed"] == collapsed


def test_an_unknown_patient_counts_as_its_group():
    table = table_of(np.array([0, 1, 0]), groups=[0, 0, 1])
    table["patient_id"] = ["patient 7", np.nan, np.nan]
    assert list(scoring.units(table)) == ["patient 7", "group 0", "group 1"]
