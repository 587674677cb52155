"""The metric losses: what pulls embeddings of one class together and pushes those of different classes apart.

Notation, the same in every function:

    labels      [B] or [B, 1], integers: the class of each image of the batch; or [B, 2]: class and patient, and then
                only an image of another patient is a positive, so that no network is paid for knowing the patient
    embeddings  [B, D], any float type: row i is the embedding of image i
    d(i, j)     the distance of two rows, "L2" (0..2 for unit vectors) or "squared-L2" (0..4)
    s(i, j)     their inner product, which is the cosine for unit vectors
    a, p, n     anchor, positive (another image of the anchor's class), negative (an image of another class)

Every loss is `loss(labels, embeddings, ...) -> float32 scalar`, computed in float32 (inner products in float64) under
any precision policy, B ≥ 1. It is a mean over its terms, so its size does not depend on B. All but TensorFlow Addons'
take O(B²) memory, and have loss 0 and gradient 0 in a batch without a term (no positive pair; for triplets also one
class). NaN embeddings have loss NaN.

    name                    expects         margin is          on one point  paper
    tfa-semi-hard           unit length     a distance         margin        Schroff 2015, the library's: O(B³) memory
    semi-hard               unit length     a distance         margin        Schroff 2015
    triplet-margin          unit length *   a distance         margin        Balntas 2016
    batch-hard              unit length *   a distance         margin        Hermans 2017
    batch-hard-soft         any             none               ln 2          Hermans 2017
    contrastive             unit length *   a distance                       Hadsell 2006
    arcface                 `CosineHead`    an angle, radians                Deng 2019
    supervised-contrastive  unit length     none               ln(B - 1)     Khosla 2020
    multi-similarity        unit length     none                             Wang 2019

"On one point" is the loss of a network that has collapsed: the same number epoch after epoch is the sign of it.
* defined for any length, but the network may then meet the margin by growing its vectors instead of turning them.

`make_loss` makes the Keras loss of a name, over the global batch where replicas share one; names joined by commas are
a mining schedule.
"""

import inspect
import math
import warnings
from collections.abc import Callable
from functools import partial

import tensorflow as tf

from Modules.cli import UserError, nearest
from Modules.distribution import gathered

DISTANCES = ("L2", "squared-L2")
SCALE = 16.0  # of unit-length embeddings before a classification (NormFace, Wang et al., ACM MM 2017, section 3.3)
FAR = 1e9  # stands for infinity where infinity would turn a gradient into NaN


def inner_products(embeddings: tf.Tensor) -> tf.Tensor:
    """All inner products of a batch, [B, B] float64.

    float64, because a distance is a difference of such products, nearly equal where two vectors are close: in float32
    it is noise below 3e-4, in the TensorFloat-32 that GPUs put in its place below 0.03, where a collapsing network is.
    """
    vectors = tf.cast(embeddings, tf.float64)  # [B, D]
    return tf.matmul(vectors, vectors, transpose_b=True)


def pairwise_distances(embeddings: tf.Tensor, distance: str = "L2") -> tf.Tensor:
    """All distances of a batch, [B, B] float32; `distance` is "L2" or "squared-L2".

    The root is infinitely steep at 0: vectors closer than 1e-6, which float32 cannot tell apart, get gradient 0.
    """
    products = inner_products(embeddings)
    squared_norms = tf.linalg.diag_part(products)  # [B]
    squared = tf.cast(squared_norms[:, None] + squared_norms[None, :] - 2.0 * products, tf.float32)
    return tf.maximum(squared, 0.0) if distance == "squared-L2" else tf.sqrt(tf.maximum(squared, 1e-12))


def pair_masks(labels: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Which pairs (i, j) are positive (same class, i ≠ j or other patients) and which negative: two [B, B] bool."""
    classes = classes_of(labels)
    same = classes[:, None] == classes[None, :]
    return same & _apart(labels), ~same


def classes_of(labels: tf.Tensor) -> tf.Tensor:
    """The class of each image, [B], from any form of labels."""
    labels = tf.convert_to_tensor(labels)
    return labels if labels.shape.rank == 1 else labels[:, 0]


def _apart(labels: tf.Tensor) -> tf.Tensor:
    """Which images may be each other's positive if they are of one class, [B, B] bool."""
    labels = tf.convert_to_tensor(labels)
    if labels.shape.rank == 2 and labels.shape[1] == 2:
        return labels[:, None, 1] != labels[None, :, 1]
    return ~tf.eye(tf.shape(labels)[0], dtype=tf.bool)


def _mean(values: tf.Tensor, chosen: tf.Tensor) -> tf.Tensor:
    """The mean of `values` where `chosen`, 0 where nothing is."""
    count = tf.reduce_sum(tf.cast(chosen, tf.float32))
    return tf.math.divide_no_nan(tf.reduce_sum(tf.where(chosen, values, 0.0)), count)


def semi_hard(labels, embeddings, margin=0.2, distance="L2"):
    """Every positive pair with its semi-hard negative: the nearest one that is further away than the positive.

    Schroff, Kalenichenko and Philbin, "FaceNet", CVPR 2015, sections 3.1 (loss) and 3.2 (semi-hard). Where no negative
    is further away, the furthest of them: a rule of TensorFlow Addons, whose `TripletSemiHardLoss` this equals within
    1e-5 on every batch with a positive pair and two classes. There B³ triplets are compared; here each anchor's
    negatives are sorted once and each positive's place among them is bisected: O(B² log B) time, O(B²) memory.
    """
    pairwise = pairwise_distances(embeddings, distance)  # [B, B]
    batch = tf.shape(pairwise)[0]
    # In order of class, an anchor's positives (and itself) are a block of columns, and its negatives all that follow it
    # cyclically: two narrow tables, P and N columns wide, in place of two masks over all B.
    _, group, sizes = tf.unique_with_counts(classes_of(labels))
    order = tf.argsort(group, stable=True)  # [B]
    size = tf.gather(sizes, group)[:, None]  # [B, 1]
    first = tf.gather(tf.cumsum(sizes, exclusive=True), group)[:, None]  # [B, 1]
    own = tf.range(tf.reduce_max(sizes))[None, :]  # [1, P], P the largest class
    other = tf.range(tf.maximum(batch - tf.reduce_min(sizes), 1))[None, :]  # [1, N], N the most negatives of an anchor
    positives = tf.gather(order, (first + own) % batch)  # [B, P] columns of `pairwise`
    negatives = tf.gather(order, (first + size + other) % batch)  # [B, N]
    is_pair = (own < size) & (size < batch) & tf.gather(_apart(labels), positives, batch_dims=1)

    to_positive = tf.gather(pairwise, positives, batch_dims=1)  # [B, P]
    to_negative = tf.where(other < batch - size, tf.gather(tf.stop_gradient(pairwise), negatives, batch_dims=1), FAR)
    descending, by_distance = tf.math.top_k(-to_negative, k=tf.size(other))  # [B, N], nearest first
    beyond = tf.searchsorted(-descending, tf.stop_gradient(to_positive), side="right")  # [B, P]
    beyond = tf.clip_by_value(beyond, 0, tf.maximum(batch - size - 1, 0))
    chosen = tf.gather(negatives, tf.gather(by_distance, beyond, batch_dims=1), batch_dims=1)  # [B, P] columns
    to_chosen = tf.gather(pairwise, chosen, batch_dims=1)  # [B, P]
    return _mean(tf.nn.relu(margin + to_positive - to_chosen), is_pair)


def tfa_semi_hard(labels, embeddings, margin=1.0, distance="L2"):
    """`tfa.losses.TripletSemiHardLoss`, as the published systems used it: NaN where a batch has no positive pair."""
    with warnings.catch_warnings():  # the library announces its end of life at every import
        warnings.simplefilter("ignore", UserWarning)
        from tensorflow_addons.losses import TripletSemiHardLoss
    loss = TripletSemiHardLoss(margin=tf.convert_to_tensor(margin, tf.float32), distance_metric=distance)
    return loss(classes_of(labels), tf.cast(embeddings, tf.float32))


def triplet_margin(labels, embeddings, margin=1.0, distance="L2"):
    """One random triplet for each anchor.

    Balntas, Riba, Ponsa and Mikolajczyk, "Learning local feature descriptors with triplets and shallow convolutional
    neural networks", BMVC 2016, margin ranking loss. Batches come shuffled, so the chance lies in their order and none
    is drawn here: anchor i takes the (i mod k)-th of its k candidates in batch order.
    """
    pairwise = pairwise_distances(embeddings, distance)
    positive, negative = pair_masks(labels)
    to_positive, has_positive = _at_random(pairwise, positive)
    to_negative, has_negative = _at_random(pairwise, negative)
    return _mean(tf.nn.relu(margin + to_positive - to_negative), has_positive & has_negative)


def _at_random(pairwise: tf.Tensor, candidate: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """The distance of each row to its (row mod k)-th of k candidates, [B] float32, and whether k > 0, [B] bool."""
    count = tf.reduce_sum(tf.cast(candidate, tf.int32), axis=1)  # [B]
    turn = tf.math.floormod(tf.range(tf.size(count)), tf.maximum(count, 1))
    rank = tf.cumsum(tf.cast(candidate, tf.int32), axis=1, exclusive=True)  # [B, B]
    column = tf.argmax(candidate & (rank == turn[:, None]), axis=1)  # [B]
    return tf.gather(pairwise, column, batch_dims=1), count > 0


def batch_hard(labels, embeddings, margin=0.2, distance="L2", soft=False):
    """Each anchor with its furthest positive and its nearest negative; `soft`: ln(1 + exp(.)) in place of a margin.

    Hermans, Beyer and Leibe, "In Defense of the Triplet Loss for Person Re-Identification", arXiv 1703.07737, 2017,
    section 2: batch hard, soft-margin. Anchors without a positive or a negative are left out.
    """
    pairwise = pairwise_distances(embeddings, distance)
    positive, negative = pair_masks(labels)
    furthest_positive = tf.reduce_max(tf.where(positive, pairwise, -FAR), axis=1)  # [B]
    nearest_negative = tf.reduce_min(tf.where(negative, pairwise, FAR), axis=1)  # [B]
    gap = furthest_positive - nearest_negative
    valid = tf.reduce_any(positive, axis=1) & tf.reduce_any(negative, axis=1)
    return _mean(tf.nn.softplus(gap) if soft else tf.nn.relu(margin + gap), valid)


def contrastive(labels, embeddings, margin=1.0):
    """½ d² for positive pairs, ½ max(0, margin - d)² for negative ones, over all pairs of the batch.

    Hadsell, Chopra and LeCun, "Dimensionality Reduction by Learning an Invariant Mapping", CVPR 2006, equation 4.
    """
    pairwise = pairwise_distances(embeddings)
    positive, negative = pair_masks(labels)
    apart = tf.square(tf.nn.relu(margin - pairwise))
    return 0.5 * _mean(tf.where(positive, tf.square(pairwise), apart), positive | negative)


def supervised_contrastive(labels, embeddings, temperature=0.1):
    """For each anchor, minus the mean over its positives of ln softmax(s(a, ·) / temperature) over all other images.

    Khosla et al., "Supervised Contrastive Learning", NeurIPS 2020, equation 2 (L_out); mean of anchors with positives.
    Images of the anchor's class that may not be its positives count as little as itself.
    """
    positive, negative = pair_masks(labels)
    logits = tf.cast(inner_products(embeddings), tf.float32) / temperature  # [B, B]
    logits = tf.where(positive | negative, logits, -FAR)
    log_probability = logits - tf.reduce_logsumexp(logits, axis=1, keepdims=True)
    count = tf.reduce_sum(tf.cast(positive, tf.float32), axis=1)  # [B]
    per_anchor = tf.math.divide_no_nan(tf.reduce_sum(tf.where(positive, log_probability, 0.0), axis=1), count)
    return -_mean(per_anchor, count > 0)


def multi_similarity(labels, embeddings, alpha=2.0, beta=50.0, base=0.5, epsilon=0.1):
    """Pairs that are hard relative to the anchor's others, weighted by how hard they are.

    Wang, Han, Huang, Dong and Scott, "Multi-Similarity Loss with General Pair Weighting", CVPR 2019, section 4: mining
    (a negative counts if it is more similar than the least similar positive less `epsilon`, a positive if it is less
    similar than the most similar negative plus `epsilon`), then equation 10; `base` is its λ, as in the authors' code.
    """
    similarity = tf.cast(inner_products(embeddings), tf.float32)  # [B, B]
    positive, negative = pair_masks(labels)
    least_positive = tf.reduce_min(tf.where(positive, similarity, FAR), axis=1, keepdims=True)  # [B, 1]
    most_negative = tf.reduce_max(tf.where(negative, similarity, -FAR), axis=1, keepdims=True)  # [B, 1]
    hard_positive = positive & (similarity < most_negative + epsilon)
    hard_negative = negative & (similarity > least_positive - epsilon)

    def soft_sum(exponents, chosen):  # ln(1 + Σ exp(exponents)) over the chosen of each row, [B]
        exponents -= tf.where(chosen, 0.0, FAR)
        return tf.reduce_logsumexp(tf.pad(exponents, [[0, 0], [1, 0]]), axis=1)

    pull = soft_sum(-alpha * (similarity - base), hard_positive) / alpha
    push = soft_sum(beta * (similarity - base), hard_negative) / beta
    return tf.reduce_mean(pull + push)


class CosineHead(tf.keras.layers.Layer):
    """The cosines of each embedding to one learned centre a class: [B, D] → [B, classes] float32 in -1..1."""

    def __init__(self, classes: int, seed: int):
        super().__init__(dtype="float32")
        self.classes, self.draw = classes, tf.keras.initializers.GlorotUniform(seed)

    def build(self, shape):
        self.centres = self.add_weight("centres", [shape[-1], self.classes], initializer=self.draw)

    def call(self, embeddings):
        return tf.matmul(tf.nn.l2_normalize(embeddings, axis=1), tf.nn.l2_normalize(self.centres, axis=0))


def arcface(labels, cosines, margin=0.5, scale=64.0):
    """Cross-entropy of `scale` · cosines, where the angle θ to the own class's centre counts as θ + `margin` (radians).

    Deng, Guo, Xue and Zafeiriou, "ArcFace", CVPR 2019, equation 3. `labels` are 0..classes-1, `cosines` the output of
    `CosineHead`. Beyond π the cosine would rise again: there cos θ - margin · sin(margin), as in the authors' code.
    """
    cosines = tf.clip_by_value(tf.cast(cosines, tf.float32), -1.0 + 1e-6, 1.0 - 1e-6)  # acos has infinite slope at ±1
    angle = tf.acos(cosines)  # [B, classes]
    later = cosines - margin * tf.sin(margin)
    penalised = tf.where(angle + margin > math.pi, later, tf.cos(angle + margin))
    classes = classes_of(labels)
    is_own = tf.one_hot(classes, tf.shape(cosines)[1], on_value=True, off_value=False)
    logits = scale * tf.where(is_own, penalised, cosines)
    return tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(classes, logits))


LOSSES: dict[str, Callable[..., tf.Tensor]] = {
    "tfa-semi-hard": tfa_semi_hard,
    "semi-hard": semi_hard,
    "triplet-margin": triplet_margin,
    "batch-hard": batch_hard,
    "batch-hard-soft": partial(batch_hard, soft=True),
    "contrastive": contrastive,
    "arcface": arcface,
    "supervised-contrastive": supervised_contrastive,
    "multi-similarity": multi_similarity,
}


# The losses that are as large as their margin when all images lie on one point.
MARGIN_LOSSES = ("tfa-semi-hard", "semi-hard", "triplet-margin", "batch-hard")


class MetricLoss(tf.keras.losses.Loss):
    """One loss, or several in turn, and beside it, where `classification` is its weight, a classification.

    With a classification the model's output is that of `with_head`, [B, D + classes]. Margin and turn are variables: a
    compiled step keeps plain numbers for ever.
    """

    def __init__(self, name: str, stages: list[Callable], margins: tuple, distance: str, classification: float):
        super().__init__(name=name)
        self.stages, self.margins, self.distance = stages, margins, distance
        self.classification, self.classes = classification, 0  # `with_head` knows how many
        self.margin = tf.Variable(margins[0], trainable=False, dtype=tf.float32)
        self.stage = tf.Variable(0, trainable=False)

    def call(self, labels, outputs):
        labels, outputs = gathered(labels, outputs)
        value = self._metric_loss(labels, outputs)
        if self.classification:
            logits = outputs[:, -self.classes :]
            entropy = tf.nn.sparse_softmax_cross_entropy_with_logits(classes_of(labels), logits)
            value += self.classification * tf.reduce_mean(entropy)
        return value

    def metric_loss(self, labels, outputs):
        """The metric loss alone: what the collapse watch compares with the margin."""
        return self._metric_loss(*gathered(labels, outputs))

    def metrics(self) -> list[tf.keras.metrics.Metric]:
        """`metric_loss`, where it is not the whole loss."""
        return [tf.keras.metrics.MeanMetricWrapper(self.metric_loss, "metric_loss")] if self.classification else []

    def _metric_loss(self, labels, outputs):
        embeddings = outputs[:, : -self.classes] if self.classification else outputs

        def value(loss):
            known = inspect.signature(loss).parameters
            settings = {name: getattr(self, name) for name in ("margin", "distance") if name in known}
            return loss(labels, embeddings, **settings)

        if len(self.stages) == 1:
            return value(self.stages[0])
        return tf.switch_case(tf.convert_to_tensor(self.stage), [partial(value, loss) for loss in self.stages])

    def margin_of(self, epoch: int, epochs: int) -> float:
        """The margin in `epoch`, from 0, of `epochs`."""
        first, last = self.margins
        return first + (last - first) * epoch / max(epochs - 1, 1)

    def schedule(self, epochs: int) -> tf.keras.callbacks.Callback:
        """The callback that gives each stage its equal share of `epochs` and moves the margin in a straight line."""

        def move(epoch, _):
            self.margin.assign(self.margin_of(epoch, epochs))
            self.stage.assign(epoch * len(self.stages) // epochs)

        return tf.keras.callbacks.LambdaCallback(on_epoch_begin=move)


def make_loss(
    name: str,
    margin: float,
    distance: str = "L2",
    final_margin: float | None = None,
    classification: float = 0.0,
    positives: str = "any",
) -> MetricLoss:
    """The Keras loss called `name` in the table above; several names joined by commas take turns of equal length.

    `make_loss("triplet-margin,semi-hard,batch-hard", 0.2, final_margin=0.4)` mines random, then semi-hard, then hard
    triplets while the margin grows: hard ones fold a network that cannot yet tell anything apart onto one point. Stages
    and margin move only with the callback `loss.schedule(epochs)`. A loss without margin or distance leaves it unused.
    `classification`: weight of a cross-entropy beside it. `positives`: "any", or "other-patient", labels that
    ask for it. Raises `UserError` for an unknown name or distance, and for what can't be combined.
    """
    names = [part.strip() for part in name.split(",")]
    for kind, word, known in [*(("loss", part, LOSSES) for part in names), ("distance", distance, DISTANCES)]:
        if word not in known:
            raise UserError(f"unknown {kind} {word!r}: {nearest(word, known)}")
    if "arcface" in names and (len(names) > 1 or classification):
        raise UserError("arcface works on class centres, a classification by itself: name it alone")
    if positives != "any" and {"tfa-semi-hard", "arcface"} & set(names):
        raise UserError(f"{name} knows no patients: use --positives any, or --loss semi-hard")
    margins = (margin, margin if final_margin is None else final_margin)
    return MetricLoss("-then-".join(names), [LOSSES[part] for part in names], margins, distance, classification)


def with_head(embedding: tf.keras.Model, loss: MetricLoss, classes: int, seed: int) -> tf.keras.Model:
    """The model to train with `loss`, as wide as it expects; save `embedding`.

    Embeddings [B, D] as they are; for arcface the cosines to `classes` centres; for a classification [B, D + classes],
    embeddings and logits side by side. A linear classifier on vectors of length 1 needs weights that grow large before
    it can be sure of anything; it gets them SCALE long.
    """
    with embedding.distribute_strategy.scope():
        if arcface in loss.stages:
            return tf.keras.Model(embedding.input, CosineHead(classes, seed)(embedding.output))
        if not loss.classification:
            return embedding
        loss.classes = classes
        layers = tf.keras.layers
        draw = tf.keras.initializers.GlorotUniform(seed)
        head = layers.Dense(classes, kernel_initializer=draw, dtype="float32", name="classification")
        logits = head(layers.Rescaling(SCALE, dtype="float32")(embedding.output))
        return tf.keras.Model(embedding.input, layers.Concatenate(dtype="float32")([embedding.output, logits]))
