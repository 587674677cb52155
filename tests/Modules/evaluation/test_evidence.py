"""What lies beside a model is used only where it is of the kind that train.py writes, and fits the model."""

import json

import numpy as np
import pandas as pd
import pytest
import tensorflow as tf

import modules
from dataset import image_batches, load_manifest, select
from Modules.cli import UserError
from Modules.config import Data
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
