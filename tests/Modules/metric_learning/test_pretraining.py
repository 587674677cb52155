"""Stage 0: it learns the external images' own diagnoses, keeps the result, and says what it lacks."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

import modules
from dataset import image_batches
from Modules import runtime
from Modules.cli import UserError
from Modules.config import recipe_named
from Modules.data.images import encode_jpeg
from Modules.evaluation.scoring import embed
from Modules.metric_learning.collapse import Diagnosis, Watch
from Modules.metric_learning.pretraining import pretrain
from Modules.metric_learning.quality import embedding_quality

COLOURS = {"nv": (200, 40, 40), "MEL": (40, 200, 40), "bkl": (40, 40, 200)}
OPTIONS = {"seed": 0, "weights": "none", "resume": False, "deterministic": False}


@pytest.fixture(scope="module")
def external(tmp_path_factory):
    """36 pictures of one colour a diagnosis, and noise, as rows of a manifest; two more without a diagnosis."""
    folder, rng, rows = tmp_path_factory.mktemp("external"), np.random.default_rng(0), []
    for i in range(38):
        diagnosis = list(COLOURS)[i % 3] if i < 36 else None
        colour = np.array(COLOURS.get(diagnosis, (0, 0, 0)))
        picture = (colour + rng.integers(-30, 30, (32, 32, 3))).clip(0, 255).astype(np.uint8)
        file = folder / f"{i}.jpg"
        file.write_bytes(encode_jpeg(picture))
        rows.append({"file": str(file), "diagnosis": diagnosis, "patient_id": None, "sha256": str(i), "group": str(i)})
    return pd.DataFrame(rows).assign(target=0)


def recipe(**changes):
    base = recipe_named("lightweight")
    settings = {"backbone": "mobilenet", "loss": "semi-hard", "classification": 1.0, "pretrain_epochs": 12} | changes
    settings |= {"batch_norm_momentum": 0.5}  # three steps an epoch leave slower statistics behind
    data = replace(base.data, image_size=32, batch_size=12, brightness=0.0)
    return replace(base, data=data, embedding=replace(base.embedding, **settings))


def network(config):
    runtime.set_seeds(0)
    return modules.build_embedding(config.embedding, 32)


def test_it_learns_the_diagnoses_and_the_next_run_takes_what_was_learned(external, tmp_path, capsys):
    config = recipe()
    embedding = network(config)
    name = pretrain(embedding, external, config, tmp_path, OPTIONS)
    assert sorted(file.name for file in tmp_path.iterdir()) == [".lock", name]
    known = external.dropna(subset=["diagnosis"]).reset_index(drop=True)
    vectors = embed(embedding, image_batches(known, config.data), len(known), "")[0]
    assert embedding_quality(vectors, pd.factorize(known["diagnosis"])[0], None)["recall_at_1"] > 0.8

    again = network(config)
    assert pretrain(again, external, config, tmp_path, OPTIONS) == name
    assert "has it already" in capsys.readouterr().out
    for one, other in zip(embedding.get_weights(), again.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_another_recipe_or_set_of_images_is_another_pretraining(external, tmp_path, monkeypatch):
    monkeypatch.setattr("Modules.metric_learning.pretraining.NeuralNetwork.fit", lambda self, *_, **__: self.save())
    names = {
        pretrain(network(config), images, config, tmp_path, options)
        for config, images, options in (
            (recipe(), external, OPTIONS),
            (recipe(epochs=7, patience=2), external, OPTIONS),  # lengths of stage 1 do not matter
            (replace(recipe(), data=replace(recipe().data, refit=True)), external, OPTIONS),  # nor whether it refits
            (recipe(margin=0.2), external, OPTIONS),
            (recipe(), external[1:], OPTIONS),
            (recipe(), external, OPTIONS | {"seed": 1}),  # nor does the run's seed
            (recipe(), external, OPTIONS | {"weights": "imagenet"}),
            (recipe(), external, OPTIONS | {"deterministic": True}),
        )
    }
    assert len(names) == 5


def test_a_pretraining_that_was_cut_off_is_not_begun_anew_unasked(external, tmp_path):
    (tmp_path / "state-pretraining-of-another-fold.npz").write_bytes(b"")
    with pytest.raises(UserError, match="holds a run that was cut off: --resume"):
        pretrain(network(recipe()), external, recipe(), tmp_path, OPTIONS)


def test_a_pretraining_that_collapses_is_not_kept(external, tmp_path, monkeypatch):
    fallen = Watch(lambda epochs: Diagnosis("collapse", 1, "it has collapsed"), lambda epochs: False)
    monkeypatch.setattr("Modules.metric_learning.pretraining.watch", lambda *_: fallen)
    with pytest.raises(UserError, match="pretraining failed: it has collapsed"):
        pretrain(network(recipe()), external, recipe(), tmp_path, OPTIONS)
    assert [file.name for file in tmp_path.iterdir()] == [".lock"]


def test_a_single_diagnosis_can_not_be_told_apart(external, tmp_path):
    with pytest.raises(UserError, match="two or more diagnoses, here are 1"):
        pretrain(network(recipe()), external[external["diagnosis"] == "nv"], recipe(), tmp_path, OPTIONS)
