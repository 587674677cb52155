"""What each stage is judged by, against the same numbers computed by hand."""

import numpy as np
import pandas as pd
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score, log_loss, precision_score, recall_score

from Modules.config import Embedding
from Modules.evaluation.validation import classifier_figures, embedding_figures, watch
from Modules.metric_learning.collapse import embedding_statistics
from Modules.metric_learning.losses import make_loss
from Modules.metric_learning.quality import embedding_quality
from Modules.metric_learning.sampling import shuffled

CONFIG = Embedding(loss="semi-hard", margin=0.3)


def vectors_and_table(n=22, dimension=4, seed=0):
    """Unit-length vectors [n, dimension], and a table in order of class, as a manifest's folders are."""
    rng = np.random.default_rng(seed)
    targets = np.sort(np.arange(n) % 2)
    vectors = rng.normal(size=(n, dimension)) + 0.8 * targets[:, None]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    groups = [f"group {i // 3}" for i in range(n)]
    table = pd.DataFrame({"target": targets, "group": groups, "patient_id": groups})
    return vectors.astype(np.float32), table


def two_outputs(dimension=4, factor=1.0):
    """The vectors as they are, and what the loss takes: the same, or times `factor`."""
    inputs = tf.keras.Input((dimension,))
    same = tf.keras.layers.Activation("linear")(inputs)
    return tf.keras.Model(inputs, [same, tf.keras.layers.Rescaling(factor)(same)])


def figures_of(vectors, table, config=CONFIG, batch_size=8, factor=1.0, loss=None):
    batches = tf.data.Dataset.from_tensor_slices((vectors, table["target"])).batch(5)
    loss = loss or make_loss(config.loss, config.margin, config.distance)
    return embedding_figures(two_outputs(vectors.shape[1], factor), batches, table, loss, config, batch_size)


# --- The embedding ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [8, 11, 22, 100])
def test_val_loss_is_the_mean_over_shuffled_batches_of_nearly_equal_size(batch_size):
    vectors, table = vectors_and_table()
    loss, order = make_loss("semi-hard", 0.3), shuffled(22, 0, 0)
    total, start = 0.0, 0
    for size in {8: [8, 7, 7], 11: [11, 11], 22: [22], 100: [22]}[batch_size]:
        part = order[start : start + size]
        total += size * float(loss(table["target"].to_numpy()[part], vectors[part]))
        start += size
    assert total > 0
    assert figures_of(vectors, table, batch_size=batch_size)["val_loss"] == pytest.approx(total / 22, rel=1e-5)


def test_a_positive_of_another_patient_is_asked_for_in_validation_too():
    vectors, table = vectors_and_table(n=8)
    one = table.assign(patient_id="the same")
    config = Embedding(loss="semi-hard", margin=0.3, positives="other-patient")
    assert figures_of(vectors, one)["val_loss"] > 0
    assert figures_of(vectors, one, config)["val_loss"] == 0


def test_no_batch_of_validation_holds_a_single_class():
    vectors, table = vectors_and_table()
    seen = []
    figures_of(vectors, table, loss=lambda targets, embeddings: seen.append(targets) or 0.0)
    assert [len(targets) for targets in seen] == [8, 7, 7]
    assert all(set(targets) == {0, 1} for targets in seen)


def test_the_loss_takes_the_second_output_and_the_rest_the_embedding():
    vectors, table = vectors_and_table()
    norms = []

    def loss(targets, outputs):
        norms.append(np.linalg.norm(outputs, axis=1))
        return 0.25

    figures = figures_of(vectors, table, factor=3.0, loss=loss)
    np.testing.assert_allclose(np.concatenate(norms), 3, rtol=1e-5)
    assert figures["val_loss"] == 0.25
    assert figures["val_mean_norm"] == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("distance", ["L2", "squared-L2"])
def test_the_other_figures_are_quality_and_statistics_of_the_images(distance):
    vectors, table = vectors_and_table()
    config = Embedding(loss="semi-hard", margin=0.3, distance=distance)
    figures = figures_of(vectors, table, config)
    targets, groups = table["target"].to_numpy(), table["group"].to_numpy()
    quality = embedding_quality(vectors, targets, groups)
    statistics = embedding_statistics(vectors, targets, groups, 0.3, distance == "squared-L2")
    expected = {f"val_{name}": quality[name] for name in ("recall_at_1", "knn_accuracy", "knn_roc_auc")}
    expected |= {f"val_{name}": value for name, value in statistics.items()}
    assert {name: value for name, value in figures.items() if name != "val_loss"} == pytest.approx(expected, abs=1e-6)


def test_what_is_undefined_is_nan():
    vectors, table = vectors_and_table()
    vectors[3, 0] = np.nan
    figures = figures_of(vectors, table)
    assert np.isnan([figures["val_loss"], figures["val_recall_at_1"], figures["val_silhouette"]]).all()


STILL = {"val_mean_positive_distance": 0.2, "val_mean_negative_distance": 0.2, "val_mean_norm": 1.0}


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("semi-hard", 0.3, "collapse"),
        ("triplet-margin, batch-hard", 0.3, "collapse"),
        ("contrastive", 0.3, "stuck"),
        ("contrastive,batch-hard", 0.3, "stuck"),
        ("semi-hard", 0.1, "stuck"),
    ],
)
def test_the_watch_knows_which_losses_end_at_their_margin(name, value, kind):
    """Ten epochs with all images close together and the loss at one value."""
    look = watch(make_loss(name, 0.3), name, 10)
    assert look.diagnose([{"loss": value, **STILL}] * 10).kind == kind
    assert look.diagnose([{"loss": value, **STILL}]) is None


@pytest.mark.parametrize("done", [5, 12, 20])
def test_the_watch_compares_each_epoch_with_its_own_margin(done):
    loss = make_loss("semi-hard", 0.2, final_margin=0.4)
    look = watch(loss, "semi-hard", 20)
    at_margin = [{"loss": margin, **STILL} for margin in np.linspace(0.2, 0.4, 20)][:done]
    assert look.diagnose(at_margin).kind == "collapse"
    assert f"with margin {at_margin[-1]['loss']:g}" in look.diagnose(at_margin).message
    assert not look.healthy(at_margin)
    below = [record | {"loss": 0.8 * record["loss"]} for record in at_margin]
    assert look.healthy(below)
    assert look.diagnose(below) is None


# --- The classifier ---------------------------------------------------------------------------------------------------


def as_it_is():
    """A classifier whose input [N, 1] is the probability."""
    inputs = tf.keras.Input((1,))
    return tf.keras.Model(inputs, tf.keras.layers.Activation("linear")(inputs))


MODEL = as_it_is()


def classified(targets, probability):
    return classifier_figures(MODEL, np.array(probability, np.float32)[:, None], np.array(targets))


@given(
    st.lists(st.tuples(st.integers(0, 1), st.sampled_from([0.01, 0.3, 0.49, 0.5, 0.7, 0.99])), min_size=1, max_size=30)
)
@settings(max_examples=60, deadline=None)
def test_the_classifiers_figures_are_those_of_scikit_learn(pairs):
    targets, probability = np.array([target for target, _ in pairs]), np.array([value for _, value in pairs])
    called = probability >= 0.5
    counts = np.bincount(targets, minlength=2)
    expected = {
        "val_loss": log_loss(targets, probability, labels=[0, 1], sample_weight=1 / counts[targets]),
        "val_accuracy": accuracy_score(targets, called),
        "val_precision": precision_score(targets, called, zero_division=0),
        "val_recall": recall_score(targets, called, zero_division=0),
        "val_f1_score": f1_score(targets, called, zero_division=0),
    }
    assert classified(targets, probability) == pytest.approx(expected, abs=1e-5)


def test_both_classes_weigh_alike_whatever_their_shares():
    few = classified([0, 1], [0.2, 0.4])["val_loss"]
    many = classified([0] * 50 + [1], [0.2] * 50 + [0.4])["val_loss"]
    assert few == pytest.approx(many, rel=1e-5) == pytest.approx(-(np.log(0.8) + np.log(0.4)) / 2, rel=1e-5)


def test_certainty_that_is_wrong_costs_much_but_not_infinity():
    assert classified([0, 1], [1.0, 0.0])["val_loss"] == pytest.approx(-np.log(1e-7), rel=1e-3)
    assert classified([0, 1], [0.0, 1.0])["val_loss"] == pytest.approx(0, abs=1e-6)
