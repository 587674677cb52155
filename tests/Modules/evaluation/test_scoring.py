"""A model on a split: its outputs in order, its neighbours, the plain classifier to beat."""

import numpy as np
import pandas as pd
import pytest
import tensorflow as tf

from Modules.cli import UserError
from Modules.evaluation import scoring
from Modules.evaluation.metrics import evaluate
from Modules.metric_learning.quality import embedding_quality


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
        quality = embedding_quality(
            embeddings[rows],
            chosen["target"].to_numpy(),
            chosen["group"].to_numpy(),
            (known.astype(np.float32), gallery["targets"], gallery["groups"]),
        )
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


# --- The plain classifier ---------------------------------------------------------------------------------------------


def baseline_auc(strength, n=240):
    rng = np.random.default_rng(0)
    target = np.arange(2 * n) % 2
    features = rng.normal(size=(2 * n, 12)) + strength * target[:, None] * (np.arange(12) < 3)
    train, test = table_of(target[:n], groups=np.arange(n) // 3), table_of(target[n:])
    results = scoring.logistic_baseline(features[:n], train, features[n:], test, 0.5)
    assert results["test"]["n"] == n
    return results["test"]["roc_auc"]


def test_the_baseline_finds_what_is_there_and_nothing_in_noise():
    assert baseline_auc(strength=1.0) > 0.85
    assert 0.4 < baseline_auc(strength=0.0) < 0.6


def test_the_baseline_does_not_care_for_the_scale_of_a_feature():
    rng = np.random.default_rng(0)
    target = np.arange(80) % 2
    features = rng.normal(size=(80, 4)) + target[:, None]
    scaled = features * [1e-4, 1, 1e3, 1] + [0, 100, 0, -100]
    train, test = table_of(target[:40]), table_of(target[40:])
    one, other = (scoring.logistic_baseline(x[:40], train, x[40:], test, 0.5) for x in (features, scaled))
    assert one["test"]["roc_auc"] == pytest.approx(other["test"]["roc_auc"])
    assert one["test"]["brier"] == pytest.approx(other["test"]["brier"], abs=1e-6)


def test_the_baseline_chooses_its_penalty_between_groups_and_with_both_classes(monkeypatch):
    folds = []
    split = scoring.StratifiedGroupKFold.split

    def recorded(self, features, target, groups):
        for parts in split(self, features, target, groups):
            folds.append([(set(groups.iloc[part]), set(target.iloc[part])) for part in parts])
            yield parts

    monkeypatch.setattr(scoring.StratifiedGroupKFold, "split", recorded)
    train = table_of((np.arange(60) % 10 == 0).astype(int), groups=np.arange(60) // 2)
    scoring.logistic_baseline(random_vectors(60), train, random_vectors(6, seed=1), table_of(np.arange(6) % 2), 0.5)
    assert len(folds) == 5
    for (train_groups, train_classes), (test_groups, test_classes) in folds:
        assert not train_groups & test_groups
        assert train_classes == test_classes == {0, 1}


def test_the_baseline_holds_with_the_fewest_images_there_may_be():
    target = np.array([0, 0, 1, 1])
    features = np.array([[0.0], [0.1], [1.0], [1.1]])
    results = scoring.logistic_baseline(features, table_of(target), features, table_of(target), 0.5)
    assert results["test"]["roc_auc"] == 1
    with pytest.raises(UserError, match="one class of a single patient"):
        scoring.logistic_baseline(features, table_of(target, groups=[0, 1, 2, 2]), features, table_of(target), 0.5)


def test_the_baseline_weighs_both_classes_alike():
    """A feature that says nothing: probabilities stay near one half, however rare malignant images are."""
    rng = np.random.default_rng(0)
    target = (np.arange(300) % 10 == 0).astype(int)
    results = scoring.logistic_baseline(
        rng.normal(size=(300, 1)), table_of(target), rng.normal(size=(300, 1)), table_of(target), 0.5
    )
    assert results["test"]["brier"] == pytest.approx(0.25, abs=0.02)
