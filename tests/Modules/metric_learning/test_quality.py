"""Each measure against a plain loop that follows its definition."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score, silhouette_score

from Modules.metric_learning import quality
from Modules.metric_learning.quality import embedding_quality, k_shot, pair_distances, spread

properties = settings(max_examples=20, deadline=None)


def make(seed, n=40, classes=2, groups=15, size=6, shift=0.7):
    """Unit-length embeddings whose classes overlap, targets, and names of groups, some of them missing."""
    rng = np.random.default_rng(seed)
    targets = rng.integers(classes, size=n)
    embeddings = rng.normal(size=(n, size)) + shift * np.eye(classes, size)[targets]
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    names = np.array([f"patient {i}" for i in range(groups)] + [None], object)
    return embeddings.astype(np.float32), targets, names[rng.integers(groups + 1, size=n)]


def neighbours(i, query, known, within):
    """Positions in `known` that image i of `query` may be compared with, nearest first, and their distances."""
    (embeddings, _, groups), (others, _, names) = query, known
    allowed = [
        j
        for j in range(len(others))
        if not (within and i == j) and (names is None or names[j] is None or names[j] != groups[i])
    ]
    distance = {j: np.linalg.norm(embeddings[i].astype(float) - others[j]) for j in allowed}
    return sorted(allowed, key=distance.get), distance


def plain_retrieval(query, known, within, k):
    targets, others = query[1], known[1]
    hits = {1: [], 5: []}
    precisions, votes = [], []
    for i, target in enumerate(targets):
        order, distance = neighbours(i, query, known, within)
        relevant = [others[j] == target for j in order]
        if any(relevant):
            for depth, values in hits.items():
                values.append(any(relevant[:depth]))
            r = sum(relevant)
            precisions.append(sum(np.mean(relevant[: m + 1]) for m in range(r) if relevant[m]) / r)
        weights = {j: np.exp((1 - distance[j] ** 2 / 2) / 0.07) for j in order[:k]}
        share = [sum(w for j, w in weights.items() if others[j] == value) for value in np.unique(others)]
        votes.append(np.array(share) / sum(weights.values()))
    votes, classes = np.array(votes), np.unique(others)
    winners = [classes[row == row.max()] for row in votes]
    return {
        "recall_at_1": np.mean(hits[1]),
        "recall_at_5": np.mean(hits[5]),
        "map_at_r": np.mean(precisions),
        "knn_accuracy": np.mean([(target in best) / len(best) for target, best in zip(targets, winners, strict=True)]),
        "knn_roc_auc": np.mean([roc_auc_score(targets == c, votes[:, i]) for i, c in enumerate(classes)]),
    }


def plain_distances(images):
    targets = images[1]
    positive, negative, silhouettes = [], [], []
    for i, target in enumerate(targets):
        order, distance = neighbours(i, images, images, within=True)
        mean = {c: np.mean(d) for c in set(targets) if (d := [distance[j] for j in order if targets[j] == c])}
        positive += [distance[j] for j in order if targets[j] == target]
        negative += [distance[j] for j in order if targets[j] != target]
        b = min(value for c, value in mean.items() if c != target)
        a = mean.get(target, b)
        silhouettes.append((b - a) / max(a, b))
    return {
        "silhouette": np.mean(silhouettes),
        "mean_positive_distance": np.mean(positive),
        "mean_negative_distance": np.mean(negative),
    }


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("seed", range(3))
def test_within_one_set_equals_plain_loops(seed, classes):
    images = make(seed, classes=classes)
    expected = plain_retrieval(images, images, True, 7) | plain_distances(images)
    actual = embedding_quality(*images, k=7)
    assert {name: actual[name] for name in expected} == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("seed", range(3))
def test_with_a_reference_neighbours_come_from_it_alone(seed, classes):
    images, known = make(seed, n=25, classes=classes), make(seed + 100, n=50, classes=classes)
    expected = plain_retrieval(images, known, False, 7) | plain_distances(images)
    actual = embedding_quality(*images, reference=known, k=7)
    assert {name: actual[name] for name in expected} == pytest.approx(expected, abs=1e-5)


def test_blocks_of_rows_make_no_difference(monkeypatch):
    images = make(0)
    whole = embedding_quality(*images)
    monkeypatch.setattr(quality, "BLOCK", 100)  # two rows at a time
    assert embedding_quality(*images) == pytest.approx(whole)


def test_silhouette_without_groups_is_scikit_learns():
    embeddings, targets, _ = make(1, classes=3)
    assert embedding_quality(embeddings, targets, None)["silhouette"] == pytest.approx(
        silhouette_score(embeddings, targets), abs=1e-5
    )


def test_an_image_alone_in_its_class_has_silhouette_0():
    embeddings = make(1, n=12)[0]
    targets = np.array([2] + [0, 1] * 5 + [1])
    assert embedding_quality(embeddings, targets, None)["silhouette"] == pytest.approx(
        silhouette_score(embeddings, targets), abs=1e-5
    )


@pytest.mark.parametrize(("malignant", "expected"), [(3, 0.0), (2, 0.5), (1, 1.0)])
def test_neighbours_at_the_same_distance_share_the_places_that_are_left(malignant, expected):
    """Of four that are tied for two places each has half a vote, whatever their order."""
    known = np.ones((4, 1), np.float32), np.array([1] * malignant + [0] * (4 - malignant)), None
    result = embedding_quality(np.zeros((1, 1), np.float32), np.array([0]), None, known, k=2)
    assert result["knn_accuracy"] == expected


def test_the_tied_have_together_only_the_places_that_a_nearer_one_leaves():
    """Three malignant ones at 0.87 of the benign one's weight: one place, not three."""
    known = np.array([[0], [0.14], [0.14], [0.14]], np.float32), np.array([0, 1, 1, 1]), None
    assert embedding_quality(np.zeros((1, 1), np.float32), np.array([0]), None, known, k=2)["knn_accuracy"] == 1.0


def test_a_near_neighbour_outvotes_two_far_ones_and_far_from_all_the_votes_still_count():
    known = np.array([[0.0], [1.0], [1.0]], np.float32), np.array([0, 1, 1]), None
    images = np.array([[0.0], [100.0]], np.float32), np.array([0, 1]), None
    result = embedding_quality(*images, known, k=3)
    assert result["knn_accuracy"] == result["knn_roc_auc"] == 1.0


def test_spread_follows_its_definition():
    embeddings = make(2)[0]
    singular = np.linalg.svd(embeddings, compute_uv=False)
    share = singular / singular.sum()
    expected = {
        "embedding_std": np.mean([embeddings[:, d].std() for d in range(embeddings.shape[1])]),
        "effective_rank": np.prod(share**-share),
    }
    assert spread(embeddings) == pytest.approx(expected, rel=1e-5)
    assert spread(embeddings[:3])["effective_rank"] <= 3  # fewer images than dimensions


def test_effective_rank_of_known_matrices():
    assert spread(np.eye(5))["effective_rank"] == pytest.approx(5)
    assert spread(np.ones((8, 5)))["effective_rank"] == pytest.approx(1, abs=1e-5)
    assert spread(np.zeros((8, 5)))["effective_rank"] is None


def test_perfect_separation():
    targets = np.arange(40) % 2
    result = embedding_quality(np.eye(2, dtype=np.float32)[targets], targets, None)
    for name in (*quality.RETRIEVAL, "silhouette"):
        assert result[name] == 1
    assert result["mean_positive_distance"] == 0
    assert result["mean_negative_distance"] == pytest.approx(np.sqrt(2))
    assert result["effective_rank"] == pytest.approx(2)
    assert result["n"] == 40


@properties
@given(st.integers(0, 1000))
def test_the_own_group_never_helps(seed):
    """Each image has a twin of the same group and class; all other images of its class are far away."""
    rng = np.random.default_rng(seed)
    targets = np.arange(10) % 2
    embeddings = rng.normal(size=(10, 16))
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    twins = np.concatenate([embeddings, embeddings]).astype(np.float32)
    pairs = np.tile(np.arange(10), 2)
    assert embedding_quality(twins, np.tile(targets, 2), None)["recall_at_1"] == 1
    alone = embedding_quality(embeddings, targets, None)
    grouped = embedding_quality(twins, np.tile(targets, 2), pairs)
    assert grouped["recall_at_1"] == pytest.approx(alone["recall_at_1"])
    assert grouped["mean_positive_distance"] == pytest.approx(alone["mean_positive_distance"], abs=1e-5)
    as_reference = embedding_quality(embeddings, targets, np.arange(10), (twins, np.tile(targets, 2), pairs))
    assert as_reference["recall_at_1"] == pytest.approx(alone["recall_at_1"])


@properties
@given(st.integers(0, 1000), st.sampled_from([2, 3]))
def test_the_order_of_the_rows_has_no_say(seed, classes):
    embeddings, targets, groups = make(seed, classes=classes)
    embeddings[1::3] = embeddings[0]  # ties
    order = np.random.default_rng(seed).permutation(len(targets))
    shuffled = embedding_quality(embeddings[order], targets[order], groups[order])
    assert shuffled == pytest.approx(embedding_quality(embeddings, targets, groups), abs=1e-5)


def test_a_collapsed_embedding_still_has_its_distances():
    """Float32 alone would see 0 here: the distances are a ten-thousandth of the embeddings' length."""
    rng = np.random.default_rng(0)
    targets = np.arange(60) % 2
    embeddings = (np.ones((60, 8)) / np.sqrt(8) + 1e-4 * rng.normal(size=(60, 8))).astype(np.float32)
    result = embedding_quality(embeddings, targets, None)
    expected = plain_distances((embeddings, targets, np.full(60, None)))
    assert result["mean_negative_distance"] == pytest.approx(expected["mean_negative_distance"], rel=1e-3)


def test_identical_embeddings_find_nothing():
    targets = np.arange(20) % 2
    point = np.full((20, 4), 0.5, np.float32)
    result = embedding_quality(point, targets, None, reference=(point, targets, None), k=3)
    assert result["recall_at_5"] == result["map_at_r"] == result["silhouette"] == 0
    assert result["knn_roc_auc"] == result["knn_accuracy"] == 0.5
    assert result["mean_positive_distance"] == result["mean_negative_distance"] == result["embedding_std"] == 0


@pytest.mark.parametrize(
    ("targets", "groups"),
    [
        pytest.param(np.zeros(6, int), None, id="one class"),
        pytest.param(np.arange(6) % 2, ["a"] * 6, id="one group"),
        pytest.param(np.zeros(1, int), None, id="one image"),
        pytest.param(np.zeros(0, int), None, id="no image"),
    ],
)
def test_what_is_undefined_is_none(targets, groups):
    embeddings = make(0, n=6)[0][: len(targets)]
    result = embedding_quality(embeddings, targets, groups)
    undefined = {name for name, value in result.items() if value is None}
    assert undefined >= set(quality.RETRIEVAL + quality.DISTANCES) - {"mean_positive_distance"}
    assert (result["mean_positive_distance"] is None) == (groups is not None or len(targets) < 2)
    assert all(value is None for value in k_shot(embeddings, targets, groups).values())


def test_values_that_are_not_finite_leave_nothing_defined():
    embeddings, targets, groups = make(0)
    broken = embeddings.copy()
    broken[3, 2] = np.nan
    assert {v for name, v in embedding_quality(broken, targets, groups).items() if name != "n"} == {None}
    result = embedding_quality(embeddings, targets, groups, reference=(broken, targets, groups))
    assert {result[name] for name in quality.RETRIEVAL} == {None}
    assert set(k_shot(embeddings, targets, groups, (broken, targets, groups)).values()) == {None}


def test_fewer_neighbours_than_k_all_vote():
    embeddings, targets, _ = make(3, n=6)
    targets[:2] = 0, 1
    known = (embeddings, targets, None)
    few, many = (embedding_quality(*make(4, n=30), reference=known, k=k) for k in (6, 50))
    assert many == pytest.approx(few)
    assert embedding_quality(*make(4, n=30), reference=known, k=2) != pytest.approx(few)


def test_pair_distances_are_those_of_all_pairs_from_different_groups():
    embeddings, targets, groups = make(5)
    expected = {True: [], False: []}
    for i in range(len(targets)):
        for j in range(i):
            if groups[i] is None or groups[i] != groups[j]:
                expected[targets[i] == targets[j]].append(np.linalg.norm(embeddings[i] - embeddings[j]))
    positive, negative = pair_distances(embeddings, targets, groups)
    assert np.sort(positive) == pytest.approx(np.sort(expected[True]), abs=1e-6)
    assert np.sort(negative) == pytest.approx(np.sort(expected[False]), abs=1e-6)


def test_pair_distances_beyond_the_limit_are_a_sample():
    images = make(6, n=300)
    whole, sample = pair_distances(*images), pair_distances(*images, limit=5000)
    assert 4000 < sum(map(len, sample)) <= 5000
    for all_pairs, some in zip(whole, sample, strict=True):
        assert some.mean() == pytest.approx(all_pairs.mean(), rel=0.02)
    assert all(map(np.array_equal, sample, pair_distances(*images, limit=5000)))
    assert not all(map(np.array_equal, sample, pair_distances(*images, limit=5000, seed=1)))


@pytest.mark.parametrize("within", [True, False])
def test_k_shot_with_all_references_is_the_nearest_prototype(within):
    images = make(7)
    known = images if within else make(8, n=60)
    scores, rows = [], []
    for i in range(len(images[1])):
        order, _ = neighbours(i, images, known, within)
        squared = []
        for value in (0, 1):
            prototype = np.mean([known[0][j].astype(float) for j in order if known[1][j] == value], axis=0)
            squared.append(((images[0][i] - prototype) ** 2).sum())
        scores.append(squared[0] - squared[1])
        rows.append(i)
    expected = roc_auc_score(images[1][rows], scores)
    result = k_shot(*images, reference=None if within else known, shots=(None,))
    assert result == {
        "all": {"mean": pytest.approx(expected), "low": pytest.approx(expected), "high": pytest.approx(expected)}
    }


def test_k_shot_learns_from_more_references():
    images, known = make(9, n=200, size=32), make(10, n=200, size=32)
    result = k_shot(*images, reference=known)
    assert list(result) == ["1", "5", "20", "all"]
    assert result["1"]["mean"] < result["5"]["mean"] < result["20"]["mean"] < result["all"]["mean"]
    assert all(value["low"] <= value["mean"] <= value["high"] for value in result.values())
    assert result == k_shot(*images, reference=known)
    assert result != k_shot(*images, reference=known, seed=1)


def test_k_shot_of_more_than_there_are_is_none():
    embeddings, targets, _ = make(11, n=30)
    targets[:] = 0
    targets[:4] = 1
    result = k_shot(embeddings, targets, None, shots=(4, 5))
    assert result["4"] is not None
    assert result["5"] is None


def test_k_shot_draws_each_reference_once():
    (*images, _), (embeddings, targets, _) = make(12), make(13, n=20)
    targets[:] = np.arange(20) % 2
    result = k_shot(*images, None, reference=(embeddings, targets, None), shots=(10, None))
    assert result["10"] == pytest.approx(result["all"])


def test_k_shot_of_separate_classes_is_perfect():
    targets = np.arange(60) % 3
    result = k_shot(np.eye(3)[targets], targets, None, shots=(1, None))
    assert {value["low"] for value in result.values()} == {1}
