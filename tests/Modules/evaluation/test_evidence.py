"""What lies beside a model is used only where it is of the kind that train.py writes, and fits the model."""

import json
from itertools import chain
from threading import Barrier, Lock

import numpy as np
import pandas as pd
import pytest
import tensorflow as tf

import modules
from dataset import image_batches, load_manifest, select
from Modules.cli import UserError
from Modules.config import Data
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


@pytest.mark.parametrize(("views", "at_once"), [(1, 2), (8, 1)])
def test_batches_are_judged_side_by_side_and_given_in_order(views, at_once, monkeypatch):
    wrong, taken, busy, most, lock = ImageError("no picture"), [], [], [], Lock()
    both = Barrier(at_once)

    def judge(checkpoint, pictures, k, views):
        with lock:
            busy.append(None)
            most.append(len(busy))
        both.wait(10)
        with lock:
            busy.pop()
        return [("evidence", picture.max()) for picture in pictures]

    def batches():
        for i in range(6):
            taken.append(i)
            yield [(f"{i}a", np.full((2, 2, 3), i)), (f"{i}b", wrong), (f"{i}c", np.full((2, 2, 3), 10 + i))]
        yield [("none", wrong)]

    monkeypatch.setattr(evidence, "judge", judge)
    found = evidence.judge_batches(None, batches(), 5, views)
    first = next(found)
    assert len(taken) <= at_once + 1
    said = [(source, one) for batch in (first, *found) for source, _, one in batch]
    expected = [((f"{i}a", ("evidence", i)), (f"{i}b", wrong), (f"{i}c", ("evidence", 10 + i))) for i in range(6)]
    assert said == [*chain.from_iterable(expected), ("none", wrong)]
    assert max(most) == at_once
