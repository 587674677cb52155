"""What lies beside a model is used only where it is of the kind that train.py writes, and fits the model."""

import json
from itertools import chain
from threading import Event

import numpy as np
import pandas as pd
import pytest
import tensorflow as tf

import modules
from dataset import image_batches, load_manifest, select
from Modules.cli import UserError
from Modules.config import Classifier, Data, Embedding
from Modules.data.images import ImageError
from Modules.evaluation import evidence

FACTS = {name: None for name in evidence.NEEDED} | {
    "config": {"data": {}},
    "threshold": 0.5,
    "in_distribution": {"limit": 3.0},
    "prevalence": 0.0176,
    "calibration": {"training_prevalence": 0.5},
}


def load(folder, facts):
    (folder / "best_epoch.keras").touch()
    (folder / "best_epoch.json").write_text(json.dumps(facts))
    return evidence.load_facts(folder / "best_epoch.keras")


def test_the_facts_are_read_as_they_are(tmp_path):
    for changed in ({}, {"threshold": 1}, {"calibration": None}):
        assert load(tmp_path, FACTS | changed) == FACTS | changed


@pytest.mark.parametrize(
    "changed",
    [
        {"threshold": "0.5"}, {"threshold": float("nan")}, {"threshold": None}, {"in_distribution": {"limit": "1"}},
        {"prevalence": "rare"}, {"prevalence": 2}, {"prevalence": 0}, {"calibration": [1]},
        {"calibration": {"training_prevalence": "half"}}, {"calibration": {"training_prevalence": 1}},
    ],
    ids=str,
)  # fmt: skip
def test_facts_that_are_no_numbers_are_refused(changed, tmp_path):
    with pytest.raises(UserError, match=r"can't use .*best_epoch\.json"):
        load(tmp_path, FACTS | changed)


def test_a_gallery_of_another_length_than_the_models_is_refused():
    x = images = tf.keras.Input((16, 16, 3))
    x = tf.keras.layers.GlobalAveragePooling2D()(tf.keras.layers.ReLU()(x))
    x = tf.keras.layers.UnitNormalization(name="embedding")(tf.keras.layers.Dense(5)(x))
    model = tf.keras.Model(images, tf.keras.layers.Dense(1)(x))
    known = {"embeddings": np.zeros((4, 5)), "centre": np.zeros(6), "whitening": np.eye(6)}
    evidence.check_gallery(model, known)
    for name in known:
        with pytest.raises(UserError, match="does not fit the model beside it"):
            evidence.check_gallery(model, known | {name: known[name][..., :-1]})


def test_validation_images_that_were_learned_from_are_known_but_tell_nothing_of_what_pictures_look_like(
    trained, balanced, tmp_path
):
    model, data = modules.load(trained / "best_epoch.keras"), Data(image_size=32, batch_size=16)
    manifest = load_manifest(balanced)
    training, validation = (select(manifest, split) for split in ("train", "validation"))
    known, limits = [], []
    for learned in (training, pd.concat([training, validation], ignore_index=True)):
        tables = [(table, image_batches(table, data)) for table in (learned, validation)]
        written = evidence.write_gallery(tmp_path / "gallery.npz", trained / "best_epoch.keras", model, *tables, True)
        known.append(written[0])
        limits.append(written[1])
    assert set(known[1]["ids"]) - set(known[0]["ids"]) == set(validation["isic_id"])
    np.testing.assert_allclose(known[0]["centre"], known[1]["centre"], rtol=1e-5)
    assert limits[1]["limit"] == pytest.approx(limits[0]["limit"], rel=1e-4)


def fake(judge, monkeypatch, batches, at_once):
    """What `judge_batches` makes of `batches` of numbers, an odd one being no picture, where `judge` gets numbers."""

    def pictures():
        for batch in batches:
            yield [(i, ImageError(str(i)) if i % 2 else np.full((2, 2, 3), i)) for i in batch]

    monkeypatch.setattr(evidence, "judge", lambda checkpoint, stack, k, views: judge([int(x.max()) for x in stack]))
    return evidence.judge_batches(None, pictures(), 5, at_once=at_once)


BATCHES = [[0, 1, 2], [4], [5, 7], [6, 8], [9, 10]]


def test_batches_are_judged_side_by_side_and_given_in_order(monkeypatch):
    second = Event()

    def judge(numbers):
        if numbers == [0, 2]:
            assert second.wait(10)  # the first is done after the second
        second.set()
        return [f"evidence of {i}" for i in numbers]

    found = [one for batch in fake(judge, monkeypatch, BATCHES, 2) for one in batch]
    assert [number for number, _, _ in found] == list(chain.from_iterable(BATCHES))
    for number, picture, said in found:
        assert (said is picture) if number % 2 else (said == f"evidence of {number}")


@pytest.mark.parametrize("at_once", [1, 2])
def test_no_more_batches_are_in_memory_than_are_judged_at_once_and_the_one_that_was(at_once, monkeypatch):
    taken = []

    def counted():
        for batch in BATCHES:
            taken.append(batch)
            yield batch

    for given, _ in enumerate(fake(list, monkeypatch, counted(), at_once), 1):
        assert len(taken) <= given + at_once


def test_what_goes_wrong_in_a_batch_is_raised_after_the_batches_before_it(monkeypatch):
    def judge(numbers):
        if 6 in numbers:
            raise MemoryError
        return numbers

    batches = fake(judge, monkeypatch, BATCHES, 2)
    assert [len(next(batches)) for _ in range(3)] == [3, 1, 2]
    with pytest.raises(MemoryError):
        next(batches)


def test_real_pictures_get_the_same_evidence_side_by_side_as_alone():
    rng = np.random.default_rng(0)
    network = modules.build_embedding(Embedding(backbone="mobilenet", dense_units=(), embedding_size=16), 32)
    model = modules.join(network, modules.build_classifier(Classifier(), 16))
    width = evidence.with_evidence(model).outputs[2].shape[-1]
    pictures = rng.integers(0, 256, (10, 4, 32, 32, 3), dtype=np.uint8)
    known = {
        "embeddings": np.float32(rng.standard_normal((20, 16))),
        "hashes": rng.integers(0, 2**63, 20, np.uint64),
        "targets": np.arange(20) % 2,
        "ids": np.arange(20).astype(str),
        "groups": np.arange(20).astype(str),
        "diagnoses": np.full(20, ""),
        "centre": np.zeros(width, np.float32),
        "whitening": np.eye(width, dtype=np.float32),
    }
    checkpoint = evidence.open_checkpoint(model, FACTS | {"in_distribution": {"limit": 99.0}}, known)
    batches = [[(i, picture) for i, picture in enumerate(batch)] for batch in pictures]
    together = [one for batch in evidence.judge_batches(checkpoint, batches, 3) for _, _, one in batch]
    alone = [one for batch in pictures for one in evidence.judge(checkpoint, batch, 3)]
    assert len({one.distance for one in alone}) == len(alone)  # else any order would do
    assert [one.distance for one in together] == pytest.approx([one.distance for one in alone], abs=1e-4)
    assert [one.probability for one in together] == pytest.approx([one.probability for one in alone], abs=1e-4)
