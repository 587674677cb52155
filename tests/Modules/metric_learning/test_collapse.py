"""The watch on histories that were measured (rounded), on numpy embeddings, and on what it must let pass."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from Modules.metric_learning import quality
from Modules.metric_learning.collapse import diagnose, embedding_statistics


def history(*epochs, norm=1.0, prefix=""):
    """Records from (loss, mean positive distance, mean negative distance) of each epoch."""
    names = "mean_positive_distance", "mean_negative_distance", "mean_norm"
    return [
        {"loss": loss} | {f"{prefix}{name}": value for name, value in zip(names, (*distances, norm), strict=True)}
        for loss, *distances in epochs
    ]


# Dense layers on MobileNet features of real images, margin 0.4; where BatchNorm is named, MobileNet from scratch.
HEALTHY = {
    "semi-hard": [
        (0.376, 1.17, 1.44),
        (0.352, 1.13, 1.42),
        (0.321, 1.15, 1.41),
        (0.294, 1.05, 1.36),
        (0.268, 1.15, 1.36),
    ],
    "semi-hard, slow": [
        *[(0.392, 0.855, 0.865), (0.391, 0.862, 0.873), (0.391, 0.868, 0.882), (0.391, 0.875, 0.891)],
        *[(0.391, 0.882, 0.900), (0.391, 0.889, 0.910), (0.390, 0.896, 0.919), (0.390, 0.904, 0.930)],
    ],
    "semi-hard, too fast": [
        *[(0.375, 0.469, 0.839), (0.387, 0.595, 0.918), (0.360, 0.593, 0.742), (0.371, 0.198, 0.276)],
        *[(0.421, 0.494, 0.855), (0.361, 0.639, 1.201), (0.357, 0.602, 1.176)],
    ],
    "close, but the loss is low": [(0.30, 0.05, 0.20)] * 2 + [(0.25, 0.05, 0.20)] * 5,
    "labels of noise": [(0.384, 0.933, 0.929), (0.376, 0.798, 0.792), (0.376, 0.689, 0.682), (0.376, 0.658, 0.649)] * 2,
    "BatchNorm that catches up": [
        *[(0.380, 0, 0), (0.365, 0, 0), (0.368, 0, 0), (0.362, 2e-5, 2e-5), (0.361, 4e-4, 4e-4)],
        *[(0.340, 0.0055, 0.0057), (0.329, 0.100, 0.106), (0.323, 0.89, 1.14)],
    ],
}
COLLAPSED = {
    "batch-hard": [
        (0.580, 0.150, 0.153),
        (0.444, 0.082, 0.083),
        (0.424, 0.060, 0.061),
        (0.417, 0.049, 0.049),
        (0.413, 0.042, 0.043),
    ],
    "batch-hard, at once": [
        (0.471, 4e-3, 5e-3),
        (0.404, 2e-3, 2e-3),
        (0.402, 2e-3, 2e-3),
        (0.401, 1e-3, 1e-3),
        (0.401, 1e-3, 1e-3),
    ],
}
WHOLE_BATCH = [
    (0.399, 0.086, 0.089),
    (0.399, 0.088, 0.094),
    (0.399, 0.090, 0.099),
    (0.398, 0.092, 0.104),
    (0.398, 0.097, 0.112),
]
SOFT_MARGIN = [
    (0.789, 0.153, 0.156),
    (0.716, 0.084, 0.085),
    (0.706, 0.062, 0.062),
    (0.702, 0.050, 0.051),
    (0.700, 0.044, 0.045),
    (0.699, 0.040, 0.041),
]


def epochs_until(records, margin):
    """The number of epochs after which the watch speaks first, and what it says."""
    for epoch in range(len(records) + 1):
        found = diagnose(records[:epoch], margin)
        if found:
            assert found.epoch == epoch
            assert found.message.startswith(f"epoch {epoch}: ")
            assert "\n" not in found.message
            return epoch, found
    return None, None


@pytest.mark.parametrize("name", HEALTHY)
def test_healthy_training_is_left_alone(name):
    assert epochs_until(history(*HEALTHY[name]), 0.4) == (None, None)


@pytest.mark.parametrize("name", COLLAPSED)
def test_a_collapse_is_recognised(name):
    epoch, found = epochs_until(history(*COLLAPSED[name]), 0.4)
    assert (epoch, found.kind) == (5, "collapse")
    assert "with margin 0.4" in found.message
    assert "lower --learning-rate or use --loss semi-hard" in found.message


def test_a_collapse_without_a_margin_is_recognised_once_the_loss_stands():
    epoch, found = epochs_until(history(*SOFT_MARGIN), None)
    assert (epoch, found.kind) == (6, "collapse")
    assert "margin" not in found.message


def test_distances_that_start_small_without_a_margin_may_come_with_a_loss_that_falls():
    losses = 5.0 * 0.98 ** np.arange(8)
    assert epochs_until(history(*[(loss, 0.05, 0.05) for loss in losses]), None) == (None, None)


@pytest.mark.parametrize(("norm", "cure"), [(0.094, "not the batch"), (None, "or normalise each row")])
def test_a_batch_normalised_as_a_whole_is_recognised_though_its_distances_grow(norm, cure):
    epoch, found = epochs_until(history(*WHOLE_BATCH, norm=norm), 0.4)
    assert (epoch, found.kind) == (5, "collapse")
    assert found.message.endswith(cure)


def test_unit_length_embeddings_that_leave_a_narrow_cone_are_left_alone():
    assert epochs_until(history(*WHOLE_BATCH, norm=1.0), 0.4) == (None, None)


def test_an_embedding_of_any_length_that_learns_is_left_alone():
    learning = [(0.304, 10.0, 13.0), (0.227, 10.5, 13.7), (0.215, 10.8, 13.4), (0.167, 9.3, 12.2), (0.155, 8.7, 10.6)]
    assert epochs_until(history(*learning, norm=15.0), 0.4) == (None, None)


def test_an_embedding_of_great_length_that_does_not_learn_is_recognised():
    rows = [(16.7, 12.4, 13.1), (10.2, 9.0, 9.5), (6.7, 6.2, 6.4), (4.3, 4.0, 4.2), (2.9, 2.6, 2.7)]
    epoch, found = epochs_until(history(*rows, norm=6.2), 0.4)
    assert (epoch, found.kind) == (5, "collapse")
    assert "embeddings of length 6.2 instead of 1" in found.message


def test_batch_norm_that_does_not_catch_up_is_a_lag_and_no_collapse():
    losses = [0.380, 0.365, 0.368, 0.362, 0.361, 0.340, 0.329, 0.323]
    epoch, found = epochs_until(history(*[(loss, 0.0, 0.0) for loss in losses]), 0.4)
    assert (epoch, found.kind) == (5, "lag")
    assert "--batch-norm-momentum" in found.message


def test_two_points_that_are_apart_are_no_collapse():
    targets = np.arange(20) % 2
    record = {"loss": 0.0} | embedding_statistics(np.eye(2, dtype=np.float32)[targets], targets, margin=0.4)
    assert record["effective_rank"] == pytest.approx(2)
    moving = [record | {"loss": loss} for loss in (0.2, 0.1, 0.05, 0.01, 0.0)]
    assert epochs_until(moving, 0.4) == (None, None)


def test_a_network_that_does_not_move_is_stuck():
    still = [(loss, 0.848, 0.857) for loss in (0.3921, 0.3917, 0.3919, 0.3923, 0.3920)]
    epoch, found = epochs_until(history(*still), 0.4)
    assert (epoch, found.kind) == (5, "stuck")
    assert "raise --learning-rate" in found.message
    assert epochs_until(history(*still), None)[1].kind == "stuck"


def test_a_plateau_after_the_network_has_moved_is_not_stuck():
    assert epochs_until(history((0.39, 0.85, 0.86), *[(0.30, 1.10, 1.30)] * 9), 0.4) == (None, None)


@pytest.mark.parametrize("loss", [math.nan, math.inf, np.float32("nan")])
def test_a_loss_that_is_no_number_is_recognised_at_once(loss):
    assert epochs_until(history((0.39, 0.85, 0.86), (loss, None, None)), 0.4)[1].kind == "nan"


def test_keras_names_and_epochs_are_understood():
    records = history(*COLLAPSED["batch-hard"], prefix="val_")
    assert diagnose(records, 0.4).kind == "collapse"
    records[-1]["epoch"] = 25
    assert diagnose(records, 0.4).epoch == 25


@pytest.mark.parametrize("value", [None, math.nan])
def test_what_a_small_validation_set_leaves_undefined_is_passed_over(value):
    assert epochs_until(history(*[(0.4, value, value)] * 8, norm=None), 0.4) == (None, None)
    assert epochs_until([{"loss": 0.4}] * 8, 0.4) == (None, None)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.fixed_dictionaries(
            {
                "loss": st.none() | st.floats(-10, 10),
                "mean_positive_distance": st.none() | st.floats(0, 2),
                "mean_negative_distance": st.none() | st.floats(0.25, 2),
                "mean_norm": st.none() | st.just(1.0),
            }
        ),
        max_size=12,
    ),
    st.none() | st.floats(0.1, 2),
)
def test_classes_that_are_apart_are_never_a_collapse(records, margin):
    found = diagnose(records, margin)
    assert found is None or found.kind == "stuck"


# ---------------------------------------------------------------------------------------------- statistics


def unit(seed, n, size=16, shift=0.5):
    rng = np.random.default_rng(seed)
    targets = rng.integers(2, size=n)
    embeddings = rng.normal(size=(n, size)) + shift * targets[:, None]
    return (embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)).astype(np.float32), targets


def plain_triplets(embeddings, targets, groups, margin, power=1):
    """The loss of every triplet: d(a, p) - d(a, n) + margin, cut at 0."""
    n, losses = len(targets), []
    distance = [[np.linalg.norm(a.astype(float) - b) ** power for b in embeddings] for a in embeddings]
    for a in range(n):
        others = [i for i in range(n) if i != a and (groups is None or groups[i] != groups[a])]
        for p in (i for i in others if targets[i] == targets[a]):
            for negative in (i for i in others if targets[i] != targets[a]):
                losses.append(max(0, distance[a][p] - distance[a][negative] + margin))
    return np.array(losses)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize(("margin", "power"), [(0.4, 1), (0.0, 1), (0.4, 2)])
def test_active_triplets_are_counted_one_by_one(margin, power, grouped):
    embeddings, targets = unit(0, 24)
    groups = np.arange(24) // 3 if grouped else None
    actual = embedding_statistics(embeddings, targets, groups, margin or None, squared=power == 2)["active_triplets"]
    assert 0 < actual < 1
    assert actual == pytest.approx((plain_triplets(embeddings, targets, groups, margin, power) > 0).mean())


def test_statistics_agree_with_the_quality_of_the_embedding():
    embeddings, targets = unit(1, 50)
    groups = np.arange(50) // 4
    statistics = embedding_statistics(embeddings, targets, groups)
    expected = quality.embedding_quality(embeddings, targets, groups)
    for name in (*quality.DISTANCES, *quality.SPREAD):
        assert statistics[name] == expected[name]
    assert statistics["mean_norm"] == pytest.approx(1)


def test_a_large_set_is_judged_by_a_fixed_part_of_it():
    embeddings, targets = unit(2, 3000)
    part = embedding_statistics(embeddings, targets, margin=0.4, limit=500)
    assert part == embedding_statistics(embeddings, targets, margin=0.4, limit=500)
    whole = embedding_statistics(embeddings, targets, margin=0.4, limit=3000)
    assert part == pytest.approx(whole, rel=0.1, abs=0.02)
    assert part != whole


@pytest.mark.parametrize("n", [0, 1, 2])
def test_statistics_of_next_to_nothing_are_none(n):
    embeddings = unit(3, 2)[0][:n]
    result = embedding_statistics(embeddings, np.zeros(n, int), margin=0.4)
    assert result["active_triplets"] is result["mean_negative_distance"] is result["silhouette"] is None
    assert (result["mean_norm"] is None) == (n == 0)


def test_statistics_of_what_is_not_finite_are_none():
    embeddings, targets = unit(4, 10)
    embeddings[0, 0] = np.inf
    assert set(embedding_statistics(embeddings, targets).values()) == {None}


@pytest.mark.parametrize("batch", [32, 128])
def test_a_batch_normalised_as_a_whole_sits_at_the_margin_and_is_recognised(batch):
    """x / √(Σ x²) over the batch instead of over each row: distances of √(2 / B), which cannot reach the margin."""
    records = []
    for epoch in range(5):
        embeddings, targets = unit(epoch, batch, shift=0.3 * epoch)  # they even come apart
        embeddings /= np.sqrt((embeddings**2).sum())
        statistics = embedding_statistics(embeddings, targets, margin=0.4)
        loss = float(plain_triplets(embeddings[:32], targets[:32], None, 0.4).mean())
        records.append(statistics | {"loss": loss})
    assert records[0]["mean_negative_distance"] == pytest.approx(np.sqrt(2 / batch), rel=0.15)
    found = diagnose(records, 0.4)
    assert found.kind == "collapse"
    assert found.message.endswith("normalise each row, not the batch")


def test_a_batch_normalised_row_by_row_is_not():
    records = []
    for epoch in range(5):
        embeddings, targets = unit(epoch, 32, shift=0.1 * epoch)
        loss = float(plain_triplets(embeddings, targets, None, 0.4).mean())
        records.append(embedding_statistics(embeddings, targets, margin=0.4) | {"loss": loss})
    assert diagnose(records, 0.4) is None
