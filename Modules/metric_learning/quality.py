"""How well an embedding separates the classes: neighbours, distances, spread, and the k-shot curve.

Distances are Euclidean, 0..2 between embeddings of unit length (d² = 2 - 2·cosine). No image is ever compared with
itself or with one of its own group (a patient, or what must stay together): a near neighbour shall show that the
embedding knows the disease, not the patient. What is undefined (one class, one group, values that are not finite) is
None, never NaN.
"""

from collections.abc import Iterator

import numpy as np

from Modules.metric_learning.sampling import group_codes

# float32 embeddings [N, D], integer targets [N], names of groups [N] (a missing one is a group of its own) or None.
Labelled = tuple[np.ndarray, np.ndarray, np.ndarray | None]

RETRIEVAL = ("recall_at_1", "recall_at_5", "map_at_r", "knn_roc_auc", "knn_accuracy")
DISTANCES = ("silhouette", "mean_positive_distance", "mean_negative_distance")
SPREAD = ("embedding_std", "effective_rank")
K = 30  # neighbours that vote; on frozen features 20 to 50 differ by about 0.01 in ROC AUC
TEMPERATURE = 0.07  # of a vote's weight, as in the paper that `vote_weights` names
BLOCK = 2**23  # distances held at a time: some hundred megabytes with all that is derived from them


def embedding_quality(
    embeddings: np.ndarray,
    targets: np.ndarray,
    groups: np.ndarray | None,
    reference: Labelled | None = None,
    k: int = K,
) -> dict[str, float | int | None]:
    """The quality of embeddings [N, D] of images of classes [N] (integers) in groups [N] (None: unknown).

    From the neighbours of each image, which come from `reference` alone (the training images) where it is given and
    otherwise from the other groups of the same set:

    recall_at_1, recall_at_5: share of images with one of their own class among the 1 or 5 nearest (Jégou et al. 2011,
        "Product quantization for nearest neighbor search", §V; on classes, Oh Song et al. 2016, §6).
    map_at_r: mean average precision over the R nearest, R being the number of possible neighbours of the image's own
        class (Musgrave et al. 2020, "A metric learning reality check", §3.2).
    knn_roc_auc: ROC AUC of the malignant share of the votes of the k nearest, which weigh as `vote_weights` says; with
        more than two classes the mean over the classes of one against the rest.
    knn_accuracy: share of images whose class has the most votes.

    From the distances inside the set:

    silhouette: mean of (b - a) / max(a, b), -1..1, where a and b are the mean distances to the own and to the nearest
        other class (Rousseeuw 1987, §2).
    mean_positive_distance, mean_negative_distance: over the pairs of one class and of two classes.
    embedding_std, effective_rank: see `spread`.

    Ties, as in a collapsed embedding, count against recall and MAP@R (the other class is taken to be nearer), and share
    the vote among the k nearest in proportion, so that the order of the rows has no say.
    """
    embeddings, targets = np.asarray(embeddings, np.float32), np.asarray(targets)
    codes, reference_codes = numbered_groups(len(targets), groups, reference)
    images = embeddings, targets, codes
    known = (
        images
        if reference is None
        else (np.asarray(reference[0], np.float32), np.asarray(reference[1]), reference_codes)
    )

    result = dict.fromkeys(RETRIEVAL + DISTANCES + SPREAD) | {"n": len(targets)}
    if len(targets) and np.isfinite(embeddings).all():
        result |= spread(embeddings) | class_distances(images)
        if len(np.unique(known[1])) > 1 and np.isfinite(known[0]).all():
            result |= _retrieval(images, known, k)
    return result


def vote_weights(squared: np.ndarray) -> np.ndarray:
    """What the votes of neighbours weigh: exp(cosine / 0.07), up to a constant factor.

    squared: squared distances between embeddings of unit length, any shape, 0..4.

    Wu et al. 2018, "Unsupervised feature learning via non-parametric instance discrimination", §3.4.
    """
    return np.exp(squared / (-2 * TEMPERATURE))


def spread(embeddings: np.ndarray) -> dict[str, float | None]:
    """How much of the space finite embeddings [N, D] fill, N at least 1.

    embedding_std: standard deviation, mean over the dimensions: 1 / √D for evenly spread embeddings of unit length, 0
        for a single point (Chen & He 2021, "Exploring simple Siamese representation learning", §4.1).
    effective_rank: exp of the entropy of the normalised singular values, 1..D (Roy & Vetterli 2007, "The effective
        rank", §2); None if all embeddings are 0.
    """
    embeddings = np.asarray(embeddings, np.float64)
    wide = embeddings.shape[0] < embeddings.shape[1]
    gram = embeddings @ embeddings.T if wide else embeddings.T @ embeddings  # its eigenvalues: singular values, squared
    singular = np.sqrt(np.linalg.eigvalsh(gram).clip(0))
    share = singular[singular > 0] / max(singular.sum(), np.finfo(float).tiny)
    return {
        "embedding_std": float(embeddings.std(axis=0).mean()),
        "effective_rank": float(np.exp(-(share * np.log(share)).sum())) if len(share) else None,
    }


def pair_distances(
    embeddings: np.ndarray, targets: np.ndarray, groups: np.ndarray | None, limit: int = 200_000, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Distances of pairs of one class [P] and of two classes [Q], float32, for a histogram; P + Q is at most `limit`.

    All pairs from different groups where the set has at most `limit` pairs, otherwise a random sample.
    """
    embeddings, targets = np.asarray(embeddings, np.float32), np.asarray(targets)
    n, codes = len(targets), numbered_groups(len(targets), groups)[0]
    if n * (n - 1) // 2 <= limit:
        first, second = np.triu_indices(n, 1)
    else:
        first, second = np.random.default_rng(seed).integers(n, size=(2, limit))
    apart = codes[first] != codes[second]
    first, second = first[apart], second[apart]
    distance = np.empty(len(first), np.float32)
    for start in range(0, len(first), 16_384):
        rows = slice(start, start + 16_384)
        distance[rows] = np.linalg.norm(embeddings[first[rows]] - embeddings[second[rows]], axis=1)
    same = targets[first] == targets[second]
    return distance[same], distance[~same]


def k_shot(
    embeddings: np.ndarray,
    targets: np.ndarray,
    groups: np.ndarray | None,
    reference: Labelled | None = None,
    shots: tuple[int | None, ...] = (1, 5, 20, None),
    repeats: int = 20,
    seed: int = 0,
) -> dict[str, dict[str, float] | None]:
    """ROC AUC of the bare embedding that knows only k references of each class: {"1": {mean, low, high}, ..., "all"}.

    Nearest prototype (Snell et al. 2017, "Prototypical networks for few-shot learning", §2.2): a class is the mean of
    its k references, and the score says how much nearer, in squared distance, it is than the nearest other class. Mean
    and 5-95 % range over `repeats` draws; all references (None) need one draw. References come from `reference`,
    otherwise from the same set. Those of an image's own group are left out of its prototypes; an image that lacks a
    prototype is left out of that draw. A k that a class does not reach gives None.
    """
    embeddings, targets = np.asarray(embeddings, np.float64), np.asarray(targets)
    codes, reference_codes = numbered_groups(len(targets), groups, reference)
    known, known_targets = (embeddings, targets) if reference is None else map(np.asarray, reference[:2])
    classes = np.unique(known_targets)
    members = [np.flatnonzero(known_targets == value) for value in classes]
    usable = len(classes) > 1 and np.isfinite(embeddings).all() and np.isfinite(known).all()

    rng, result = np.random.default_rng(seed), {}
    for k in shots:
        aucs = []
        for _ in range(1 if k is None else repeats):
            if not usable or min(map(len, members)) < (k or 1):
                break
            drawn = [m if k is None else rng.choice(m, k, replace=False) for m in members]
            squared = [_to_prototype(embeddings, codes, known[rows], reference_codes[rows]) for rows in drawn]
            squared = np.stack(squared, axis=1)  # [N, classes]
            complete = np.isfinite(squared).all(axis=1)
            squared = squared[complete]
            others = np.stack([np.delete(squared, c, axis=1).min(axis=1) for c in range(len(classes))], axis=1)
            aucs.append(_roc_auc(targets[complete], others - squared, classes))
        aucs = [auc for auc in aucs if auc is not None]
        low, high = np.quantile(aucs, [0.05, 0.95]) if aucs else (None, None)
        result[str(k or "all")] = (
            {"mean": float(np.mean(aucs)), "low": float(low), "high": float(high)} if aucs else None
        )
    return result


def numbered_groups(
    n: int, groups: np.ndarray | None, reference: Labelled | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The groups of a set of n images and of its reference (by default the set itself), numbered together."""
    names = [None] * n if groups is None else list(groups)
    if reference is None:
        return (group_codes(names),) * 2
    codes = group_codes(names + ([None] * len(reference[1]) if reference[2] is None else list(reference[2])))
    return codes[:n], codes[n:]


def distance_blocks(images: tuple, known: tuple) -> Iterator[tuple[slice, np.ndarray]]:
    """Squared distances [rows, M] of a block of rows of `images` to all M of `known`, infinite inside a group."""
    (left, _, codes), (right, _, known_codes) = images, known
    # Distances do not change when both are moved to the centre, where float32 still resolves a collapsed embedding.
    centre = right.mean(axis=0, dtype=np.float64)
    left, right = (left - centre).astype(np.float32), (right - centre).astype(np.float32)
    left_norm, right_norm = (left**2).sum(axis=1, keepdims=True), (right**2).sum(axis=1)
    rounding = 1e-12 * float(centre @ centre)
    step = max(1, BLOCK // len(right))
    for start in range(0, len(left), step):
        rows = slice(start, start + step)
        norms = left_norm[rows] + right_norm
        squared = norms - 2 * (left[rows] @ right.T)
        squared[squared <= 1e-6 * norms + rounding] = 0  # the same point, but for rounding
        squared[codes[rows, None] == known_codes] = np.inf
        yield rows, squared


def _retrieval(images: tuple, known: tuple, k: int) -> dict[str, float | None]:
    """The metrics named in RETRIEVAL."""
    targets, known_targets, n = images[1], known[1], len(images[1])
    classes, position = np.unique(known_targets, return_inverse=True)
    possible, first, precision = np.zeros(n, int), np.zeros(n, int), np.zeros(n)
    votes = np.zeros((n, len(classes)))

    for rows, squared in distance_blocks(images, known):
        allowed = np.isfinite(squared)
        same = (targets[rows, None] == known_targets) & allowed
        # Sorting is most of the work. As integers, distances sort in the same order, and their last bit can say whether
        # it is the own class: nothing needs to be looked up afterwards, and a tie puts the other class first.
        distance = squared.view(np.int32) & -2
        ordered = np.sort(distance | same, axis=1)
        votes[rows] = _votes(distance, ordered & -2, allowed, position, len(classes), k)

        relevant = ordered & 1
        possible[rows] = r = same.sum(axis=1)
        first[rows] = relevant.argmax(axis=1)
        relevant[np.arange(len(known_targets)) >= r[:, None]] = 0
        hits = relevant.cumsum(axis=1, dtype=np.int32) * relevant
        precision[rows] = (hits / np.arange(1, len(known_targets) + 1)).sum(axis=1)

    some, voted = possible > 0, votes.any(axis=1)
    result = dict.fromkeys(RETRIEVAL)
    if some.any():
        result["recall_at_1"] = float((first[some] < 1).mean())
        result["recall_at_5"] = float((first[some] < 5).mean())
        result["map_at_r"] = float((precision[some] / possible[some]).mean())
    if voted.any():
        winners = np.isclose(votes[voted], votes[voted].max(axis=1, keepdims=True), atol=1e-9)
        right = winners & (targets[voted, None] == classes)
        result["knn_accuracy"] = float((right.sum(axis=1) / winners.sum(axis=1)).mean())
        result["knn_roc_auc"] = _roc_auc(targets[voted], votes[voted], classes)
    return result


def _votes(
    distance: np.ndarray, ordered: np.ndarray, allowed: np.ndarray, own: np.ndarray, classes: int, k: int
) -> np.ndarray:
    """Each class's share of the votes of the k nearest, [rows, classes]; 0 for a row without neighbours.

    All that are exactly as far as the k-th share the places that are left. own: the class of each known image [M].
    """
    k = np.minimum(k, allowed.sum(axis=1, keepdims=True))
    farthest = np.take_along_axis(ordered, k.clip(1) - 1, axis=1)
    nearer, tied = distance < farthest, (distance == farthest) & allowed
    places = (k - nearer.sum(axis=1, keepdims=True)) / tied.sum(axis=1, keepdims=True).clip(1)
    row, known = np.nonzero(nearer | tied)
    squared, nearest = distance.view(np.float32)[row, known], ordered[row, 0].view(np.float32)
    # From the nearest one on, so that what is far from everything is not without votes.
    votes = vote_weights(squared - nearest) * np.where(tied[row, known], places[row, 0], 1)
    table = np.bincount(row * classes + own[known], votes, len(distance) * classes).reshape(-1, classes)
    return table / table.sum(axis=1, keepdims=True).clip(np.finfo(float).tiny)


def class_distances(images: tuple) -> dict[str, float | None]:
    """The metrics named in DISTANCES."""
    classes, own = np.unique(images[1], return_inverse=True)
    one_hot = np.eye(len(classes), dtype=np.float32)[own]
    total, count = np.zeros((2, len(own), len(classes)))  # of the distances from each image to each class
    for rows, squared in distance_blocks(images, images):
        allowed = np.isfinite(squared)
        total[rows] = np.sqrt(np.where(allowed, squared, 0)) @ one_hot
        count[rows] = allowed.astype(np.float32) @ one_hot

    positive = one_hot.astype(bool)
    mean = np.where(count > 0, total / count.clip(1), np.inf)
    b = np.where(positive, np.inf, mean).min(axis=1)
    a, b = mean[positive][np.isfinite(b)], b[np.isfinite(b)]
    a = np.where(np.isfinite(a), a, b)  # an image that is alone in its class counts 0, as in the paper
    silhouette = (b - a) / np.maximum(np.maximum(a, b), np.finfo(float).tiny)

    def average(pairs: np.ndarray) -> float | None:
        return float(total[pairs].sum() / count[pairs].sum()) if count[pairs].any() else None

    return {
        "silhouette": float(silhouette.mean()) if len(silhouette) else None,
        "mean_positive_distance": average(positive),
        "mean_negative_distance": average(~positive),
    }


def _to_prototype(embeddings: np.ndarray, codes: np.ndarray, known: np.ndarray, known_codes: np.ndarray) -> np.ndarray:
    """Squared distance [N] to the mean of `known` [k, D] without the own group; infinite where that leaves none."""
    groups, position = np.unique(known_codes, return_inverse=True)
    sums = np.zeros((len(groups), known.shape[1]))
    np.add.at(sums, position, known)
    own = np.searchsorted(groups, codes).clip(max=len(groups) - 1)
    shared = groups[own] == codes
    left = len(known) - np.where(shared, np.bincount(position)[own], 0)
    prototype = (sums.sum(axis=0) - np.where(shared[:, None], sums[own], 0)) / left.clip(1)[:, None]
    return np.where(left > 0, ((embeddings - prototype) ** 2).sum(axis=1), np.inf)


def _roc_auc(targets: np.ndarray, scores: np.ndarray, classes: np.ndarray) -> float | None:
    """Mean over the classes of one against the rest, of two classes just the second; None where undefined."""
    first = len(classes) == 2
    sides = [(targets == value, score) for value, score in zip(classes[first:], scores.T[first:], strict=True)]
    from sklearn.metrics import roc_auc_score  # slow to import, and not needed to score a picture

    aucs = [roc_auc_score(side, score) for side, score in sides if 0 < side.sum() < len(side)]
    return float(np.mean(aucs)) if aucs else None
