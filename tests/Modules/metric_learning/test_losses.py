"""Each loss against a plain loop, then the batches that break losses: one class, one image, identical images, NaN."""

import math
import warnings

import numpy as np
import pytest
import tensorflow as tf

from Modules.cli import UserError
from Modules.metric_learning import losses
from Modules.metric_learning.losses import LOSSES, make_loss

OURS = [name for name in LOSSES if name not in ("tfa-semi-hard", "arcface")]
TRIPLETS = ["semi-hard", "triplet-margin", "batch-hard"]


def batch(size=24, classes=3, dimension=8, seed=0):
    """Labels [size] and unit-length embeddings [size, dimension], float32."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, classes, size)
    embeddings = generator.normal(size=(size, dimension))
    return labels, (embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)).astype(np.float32)


def value_and_gradient(loss, labels, embeddings, **settings):
    embeddings = tf.convert_to_tensor(embeddings)
    with tf.GradientTape() as tape:
        tape.watch(embeddings)
        value = loss(tf.convert_to_tensor(labels), embeddings, **settings)
    return value.numpy(), tf.convert_to_tensor(tape.gradient(value, embeddings)).numpy()


# --- Plain loops: what each loss is, for a reader to check against the paper ------------------------------------------


def distances(embeddings, distance="L2"):
    squared = ((embeddings[:, None].astype(float) - embeddings[None]) ** 2).sum(-1)
    return squared if distance == "squared-L2" else np.sqrt(squared)


def others(labels, anchor):
    positives = [j for j in range(len(labels)) if labels[j] == labels[anchor] and j != anchor]
    return positives, [j for j in range(len(labels)) if labels[j] != labels[anchor]]


def mean(terms):
    return sum(terms) / len(terms) if terms else 0.0


def semi_hard_loop(labels, embeddings, margin=0.2, distance="L2"):
    d, terms = distances(embeddings, distance), []
    for a in range(len(labels)):
        positives, negatives = others(labels, a)
        for p in positives:
            if negatives:
                further = [d[a, n] for n in negatives if d[a, n] > d[a, p]]
                chosen = min(further) if further else max(d[a, n] for n in negatives)
                terms.append(max(0.0, margin + d[a, p] - chosen))
    return mean(terms)


def triplet_margin_loop(labels, embeddings, margin=1.0, distance="L2"):
    d, terms = distances(embeddings, distance), []
    for a in range(len(labels)):
        positives, negatives = others(labels, a)
        if positives and negatives:
            p, n = positives[a % len(positives)], negatives[a % len(negatives)]
            terms.append(max(0.0, margin + d[a, p] - d[a, n]))
    return mean(terms)


def batch_hard_loop(labels, embeddings, margin=0.2, distance="L2", soft=False):
    d, terms = distances(embeddings, distance), []
    for a in range(len(labels)):
        positives, negatives = others(labels, a)
        if positives and negatives:
            gap = max(d[a, p] for p in positives) - min(d[a, n] for n in negatives)
            terms.append(math.log1p(math.exp(gap)) if soft else max(0.0, margin + gap))
    return mean(terms)


def batch_hard_soft_loop(labels, embeddings, distance="L2"):
    return batch_hard_loop(labels, embeddings, distance=distance, soft=True)


def contrastive_loop(labels, embeddings, margin=1.0):
    d, terms = distances(embeddings), []
    for i in range(len(labels)):
        for j in range(i):
            terms.append(0.5 * (d[i, j] if labels[i] == labels[j] else max(0.0, margin - d[i, j])) ** 2)
    return mean(terms)


def supervised_contrastive_loop(labels, embeddings, temperature=0.1):
    s, terms = embeddings.astype(float) @ embeddings.T.astype(float) / temperature, []
    for a in range(len(labels)):
        positives, negatives = others(labels, a)
        if positives:
            total = sum(math.exp(s[a, k]) for k in positives + negatives)
            terms.append(-mean([math.log(math.exp(s[a, p]) / total) for p in positives]))
    return mean(terms)


def multi_similarity_loop(labels, embeddings, alpha=2.0, beta=50.0, base=0.5, epsilon=0.1):
    s, total = embeddings.astype(float) @ embeddings.T.astype(float), 0.0
    for a in range(len(labels)):
        positives, negatives = others(labels, a)
        if positives and negatives:
            pull = [s[a, p] for p in positives if s[a, p] < max(s[a, n] for n in negatives) + epsilon]
            push = [s[a, n] for n in negatives if s[a, n] > min(s[a, p] for p in positives) - epsilon]
            total += math.log(1 + sum(math.exp(-alpha * (x - base)) for x in pull)) / alpha
            total += math.log(1 + sum(math.exp(beta * (x - base)) for x in push)) / beta
    return total / len(labels)


LOOPS = {name: globals()[f"{name.replace('-', '_')}_loop"] for name in OURS}


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize(("size", "classes"), [(24, 2), (24, 3), (24, 12), (7, 2), (3, 2), (2, 1), (1, 1)])
def test_loss_equals_the_loop(name, size, classes):
    for seed in range(3):
        labels, embeddings = batch(size, classes, seed=seed)
        assert LOSSES[name](labels, embeddings).numpy() == pytest.approx(LOOPS[name](labels, embeddings), abs=2e-6)


@pytest.mark.parametrize("name", [*TRIPLETS, "batch-hard-soft"])
def test_squared_distance_equals_the_loop(name):
    labels, embeddings = batch()
    expected = LOOPS[name](labels, embeddings, distance="squared-L2")
    assert LOSSES[name](labels, embeddings, distance="squared-L2").numpy() == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize("margin", [0.05, 0.4, 1.5])
@pytest.mark.parametrize("name", [*TRIPLETS, "contrastive"])
def test_margin_equals_the_loop(name, margin):
    labels, embeddings = batch()
    expected = LOOPS[name](labels, embeddings, margin=margin)
    assert LOSSES[name](labels, embeddings, margin=margin).numpy() == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize("name", OURS)
def test_a_positive_of_another_patient_equals_the_loop_that_skips_the_others(name, monkeypatch):
    """Labels [B, 2]; the loops see who may be whose positive through `others`."""
    labels, embeddings = batch(size=20, classes=2)
    patients = np.random.default_rng(1).integers(0, 5, 20)

    def of_another_patient(classes, anchor):
        positives, negatives = plain_others(classes, anchor)
        return [j for j in positives if patients[j] != patients[anchor]], negatives

    plain_others = others
    monkeypatch.setitem(globals(), "others", of_another_patient)
    both = np.stack([labels, patients], axis=1)
    expected = LOOPS[name](labels, embeddings)
    if name == "contrastive":  # its loop goes over pairs
        d, same = distances(embeddings), labels[:, None] == labels
        pairs = [(i, j) for i in range(20) for j in range(i) if not same[i, j] or patients[i] != patients[j]]
        expected = mean([0.5 * (d[i, j] if same[i, j] else max(0.0, 1 - d[i, j])) ** 2 for i, j in pairs])
    assert LOSSES[name](both, embeddings).numpy() == pytest.approx(expected, abs=2e-6)
    alone = np.stack([labels, np.arange(20)], axis=1)
    assert LOSSES[name](alone, embeddings).numpy() == pytest.approx(LOSSES[name](labels, embeddings).numpy(), abs=1e-7)
    everyone = np.stack([labels, np.zeros(20, int)], axis=1)
    if name in TRIPLETS:
        assert LOSSES[name](everyone, embeddings).numpy() == 0


def arcface_loop(labels, cosines, margin=0.5, scale=64.0):
    terms = []
    for own, row in zip(labels, cosines.astype(float), strict=True):
        logits = scale * row
        beyond = math.acos(row[own]) + margin > math.pi
        logits[own] = scale * (
            row[own] - margin * math.sin(margin) if beyond else math.cos(math.acos(row[own]) + margin)
        )
        terms.append(math.log(sum(np.exp(logits - logits[own]))))
    return mean(terms)


def cosines_to_centres():
    """Of 12 images to 3 centres; the first one's angle and margin are beyond π."""
    labels, cosines = batch(size=12, classes=3, dimension=3)
    cosines[0] = [-0.95, 0.2, 0.2]
    labels[0] = 0
    return labels, cosines


def test_arcface_equals_the_loop():
    labels, cosines = cosines_to_centres()
    assert losses.arcface(labels, cosines).numpy() == pytest.approx(arcface_loop(labels, cosines), rel=1e-5)


# --- Gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OURS)
def test_gradient_equals_finite_differences_of_the_loop(name):
    labels, embeddings = batch(size=10, classes=2, dimension=4)
    _, gradient = value_and_gradient(LOSSES[name], labels, embeddings)
    embeddings, step = embeddings.astype(float), 1e-6
    for i, j in np.ndindex(embeddings.shape):
        nudge = np.zeros_like(embeddings)
        nudge[i, j] = step
        slope = LOOPS[name](labels, embeddings + nudge) - LOOPS[name](labels, embeddings - nudge)
        assert gradient[i, j] == pytest.approx(slope / (2 * step), abs=1e-4)


def test_arcface_gradient_equals_finite_differences_of_the_loop():
    labels, cosines = cosines_to_centres()
    _, gradient = value_and_gradient(losses.arcface, labels, cosines)
    cosines, step = cosines.astype(float), 1e-6
    for i, j in np.ndindex(cosines.shape):
        nudge = np.zeros_like(cosines)
        nudge[i, j] = step
        slope = arcface_loop(labels, cosines + nudge) - arcface_loop(labels, cosines - nudge)
        assert gradient[i, j] == pytest.approx(slope / (2 * step), rel=1e-3, abs=1e-3)


def test_arcface_gradient_is_finite_at_a_centre_and_opposite_to_it():
    cosines = np.float32([[1.0, -1.0], [-1.0, 1.0], [0.0, 0.0]])
    value, gradient = value_and_gradient(losses.arcface, [0, 0, 1], cosines)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


# --- TensorFlow Addons ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("distance", losses.DISTANCES)
@pytest.mark.parametrize(("size", "classes"), [(4, 2), (64, 16), (128, 2)])
def test_semi_hard_equals_tensorflow_addons(size, classes, distance):
    for seed, spread in ((0, 1.0), (1, 0.1)):
        labels, embeddings = batch(size, classes, seed=seed)
        embeddings = spread * embeddings + (1 - spread) * embeddings[:1]  # spread 0.1: a network about to collapse
        labels[:3] = [0, 0, 1]
        settings = {"margin": 0.4, "distance": distance}
        ours, our_gradient = value_and_gradient(losses.semi_hard, labels, embeddings, **settings)
        theirs, their_gradient = value_and_gradient(LOSSES["tfa-semi-hard"], labels, embeddings, **settings)
        assert ours == pytest.approx(theirs, abs=1e-5)
        if spread == 1.0:  # closer together, their float32 distances put near ties in another order
            np.testing.assert_allclose(our_gradient, their_gradient, atol=1e-5)


def test_semi_hard_takes_a_strictly_further_negative_as_tensorflow_addons_does():
    labels = [0, 0, 1, 1, 1]
    embeddings = np.float32([[1, 0], [0, 1], [0, 1], [-1, 0], [0, -1]])  # 1 and 2: the same place, another class
    ours = losses.semi_hard(labels, embeddings, margin=0.4).numpy()
    assert ours == pytest.approx(semi_hard_loop(labels, embeddings, margin=0.4), abs=1e-6)
    assert ours == pytest.approx(LOSSES["tfa-semi-hard"](labels, embeddings, margin=0.4).numpy(), abs=1e-5)


# --- Batches that break losses ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("classes", [1, 2, 5])
@pytest.mark.parametrize("size", [1, 2, 3, 16])
def test_identical_images_have_finite_loss_and_gradient(name, size, classes):
    labels, embeddings = batch(size, classes)
    value, gradient = value_and_gradient(LOSSES[name], labels, np.repeat(embeddings[:1], size, axis=0))
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("size", [1, 2, 3, 16])
def test_batch_without_a_positive_pair_teaches_triplets_nothing_and_is_finite(name, size):
    _, embeddings = batch(size)
    value, gradient = value_and_gradient(LOSSES[name], np.arange(size), embeddings)
    assert np.isfinite(gradient).all()
    if name == "contrastive":
        assert value == pytest.approx(contrastive_loop(np.arange(size), embeddings), abs=2e-6)
    else:
        assert value == 0
        assert not gradient.any()


@pytest.mark.parametrize("name", [*TRIPLETS, "batch-hard-soft", "multi-similarity"])
def test_batch_of_one_class_teaches_nothing(name):
    _, embeddings = batch(8)
    value, gradient = value_and_gradient(LOSSES[name], np.zeros(8, int), embeddings)
    assert value == 0
    assert not gradient.any()


@pytest.mark.parametrize(
    ("name", "expected"), [*((name, 0.3) for name in TRIPLETS), ("supervised-contrastive", math.log(15))]
)
def test_collapsed_network_has_the_loss_that_the_table_says(name, expected):
    labels, embeddings = batch(16, 2)
    loss = make_loss(name, margin=0.3)
    assert loss(labels, np.repeat(embeddings[:1], 16, axis=0)).numpy() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_nan_is_not_hidden(name):
    labels, embeddings = batch(8, 2)
    embeddings[3] = np.nan
    assert np.isnan(tf.function(LOSSES[name])(labels, embeddings).numpy())


def test_distances_of_close_vectors_are_exact():
    _, embeddings = batch(2, dimension=128)
    embeddings[1] = embeddings[0] + 1e-5 * embeddings[1]
    expected = np.linalg.norm(embeddings[0].astype(float) - embeddings[1])
    assert losses.pairwise_distances(embeddings)[0, 1].numpy() == pytest.approx(expected, rel=1e-4)


# --- Shapes, types, compilation ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
def test_graph_eager_and_column_labels_agree(name):
    labels, embeddings = batch()
    eager = LOSSES[name](tf.constant(labels), tf.constant(embeddings))
    any_size = [tf.TensorSpec([None, None], tf.int64), tf.TensorSpec([None, 8], tf.float32)]
    graph = tf.function(LOSSES[name], input_signature=any_size)(labels[:, None], embeddings)
    assert graph.dtype == tf.float32
    assert graph.shape == ()
    assert graph.numpy() == pytest.approx(eager.numpy(), rel=1e-6)


@pytest.mark.parametrize("half", [tf.bfloat16, tf.float16])
@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_is_computed_in_float32(name, half):
    labels, embeddings = batch()
    embeddings = tf.cast(embeddings, half)
    value, gradient = value_and_gradient(LOSSES[name], labels, embeddings)
    assert value.dtype == np.float32
    assert gradient.dtype == half.as_numpy_dtype
    assert value == LOSSES[name](labels, tf.cast(embeddings, tf.float32)).numpy()


# --- Keras ------------------------------------------------------------------------------------------------------------


def small_model():
    start = tf.keras.initializers.GlorotUniform(seed=0)
    dense = tf.keras.layers.Dense(4, kernel_initializer=start)
    return tf.keras.Sequential([tf.keras.layers.Input(8), dense, tf.keras.layers.UnitNormalization()])


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_falls_in_training(name):
    generator = np.random.default_rng(0)
    labels = np.repeat([0, 1], 16)
    images = generator.normal(size=(32, 8)).astype(np.float32) + 1.5 * labels[:, None]
    loss = make_loss(name, margin=0.4)
    model = losses.with_head(small_model(), loss, classes=2, seed=0)
    model.compile(tf.keras.optimizers.Adam(0.02), loss)
    history = model.fit(images, labels, batch_size=32, epochs=15, verbose=0).history["loss"]
    assert history[-1] < 0.9 * history[0]


def test_head_trains_the_embedding_and_stays_out_of_it():
    embedding = small_model()
    before = [weight.numpy() for weight in embedding.trainable_weights]
    loss = make_loss("arcface", margin=0.5)
    model = losses.with_head(embedding, loss, classes=3, seed=0)
    model.compile("sgd", loss)
    labels, images = batch(16, 3)
    model.fit(images, labels, verbose=0)
    assert model.output_shape == (None, 3)
    assert embedding.output_shape == (None, 4)
    assert not np.allclose(before[0], embedding.trainable_weights[0])
    assert losses.with_head(embedding, make_loss("semi-hard", 0.2), classes=3, seed=0) is embedding


def test_a_classification_beside_the_metric_loss_is_weighed_and_told_apart_from_it():
    labels, embeddings = batch(size=12, classes=3, dimension=5)
    images = tf.keras.Input((5,))
    embedding = tf.keras.Model(images, tf.keras.layers.UnitNormalization(name="embedding")(images))
    loss = make_loss("semi-hard", 0.3, classification=0.7)
    learner = losses.with_head(embedding, loss, classes=3, seed=0)
    outputs = learner(embeddings)
    assert outputs.shape == (12, 8)
    kernel, bias = learner.get_weights()
    logits = 16 * embeddings @ kernel + bias
    cross_entropy = mean(
        [math.log(sum(math.exp(x - row[y]) for x in row)) for row, y in zip(logits, labels, strict=True)]
    )
    metric = semi_hard_loop(labels, embeddings, 0.3)
    assert loss.metric_loss(labels, outputs).numpy() == pytest.approx(metric, abs=2e-6)
    assert loss(labels, outputs).numpy() == pytest.approx(metric + 0.7 * cross_entropy, abs=1e-5)


def test_mining_schedule_moves_stage_and_margin_inside_the_compiled_step():
    labels, images = batch(16, 2)
    names = ["triplet-margin", "semi-hard", "batch-hard"]
    loss = make_loss(", ".join(names), margin=0.2, final_margin=0.7)
    model = small_model()
    model.compile(tf.keras.optimizers.SGD(0.0), loss)  # rate 0: what changes is the loss alone
    history = model.fit(images, labels, batch_size=16, epochs=6, shuffle=False, verbose=0, callbacks=[loss.schedule(6)])
    embeddings = model(images)
    expected = [
        LOSSES[name](labels, embeddings, margin=margin).numpy()
        for name, margin in zip(np.repeat(names, 2), np.linspace(0.2, 0.7, 6), strict=True)
    ]
    np.testing.assert_allclose(history.history["loss"], expected, atol=1e-6)


def test_the_stages_that_are_not_on_do_nothing():
    images = batch(16, 2)[1]
    labels = np.arange(16)  # no positive pair, of which TensorFlow Addons makes NaN
    loss, model = make_loss("triplet-margin,tfa-semi-hard", margin=0.2), small_model()
    model.compile(tf.keras.optimizers.SGD(0.1), loss)
    model.fit(images, labels, batch_size=16, epochs=1, verbose=0, callbacks=[loss.schedule(2)])
    assert all(np.isfinite(weight).all() for weight in model.get_weights())


def test_published_recipes_get_the_loss_of_tensorflow_addons():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        import tensorflow_addons as tfa
    labels, embeddings = batch()
    for distance in losses.DISTANCES:
        theirs = tfa.losses.TripletSemiHardLoss(margin=0.4, distance_metric=distance)(labels, embeddings)
        assert make_loss("tfa-semi-hard", 0.4, distance)(labels, embeddings).numpy() == pytest.approx(theirs.numpy())


@pytest.mark.parametrize(
    ("name", "distance", "hint"),
    [
        ("semihard", "L2", "did you mean semi-hard?"),
        ("semi-hard,batch-hrad", "L2", "did you mean batch-hard?"),
        ("semi-hard", "L3", "did you mean L2?"),
        ("semi-hard,arcface", "L2", "name it alone"),
    ],
)
def test_wrong_names_are_answered_in_one_line(name, distance, hint):
    with pytest.raises(UserError, match=hint.replace("?", r"\?")):
        make_loss(name, 0.4, distance)
