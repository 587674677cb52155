"""Lesions, hair, rulers and skin tones on drawn pictures, where the truth is known; a cheating model is found out."""

import cv2
import numpy as np
import pandas as pd
import pytest

from Modules.data import synthetic
from Modules.evaluation import shortcuts as sc
from Modules.evaluation.metrics import evaluate

NOTHING = np.zeros((256, 256), bool)


def skin(seed, add=None):
    """A drawn picture of skin alone, uint8 [256, 256, 3], with what `add(rng, image)` paints on it."""
    rng = np.random.default_rng(seed)
    melanin, blood = synthetic.skin_texture(rng, 256, synthetic.skin_tone(rng))
    image = np.exp(-np.stack([melanin, blood, 0 * melanin], axis=-1) @ synthetic.PIGMENTS)
    painted = image
    while add is not None and np.abs(painted - image).mean() < 0.002:  # many pictures get none
        painted = add(rng, image)
    return (255 * np.clip(painted + rng.normal(0, 0.012, image.shape), 0, 1)).astype(np.uint8)


def test_lesions_are_found_and_covered_whole():
    overlap, cover = [], []
    for seed in range(30):
        image, truth = synthetic.draw(np.random.default_rng(seed), malignant=bool(seed % 2))
        mask, found = sc.lesion_mask(image)
        assert found
        overlap.append((mask & truth).sum() / (mask | truth).sum())
        cover.append((mask & truth).sum() / truth.sum())
    assert np.median(overlap) > 0.75
    assert np.quantile(overlap, 0.1) > 0.6
    assert np.median(cover) > 0.97
    assert np.quantile(cover, 0.1) > 0.9


@pytest.mark.parametrize("value", [0, 128, 255])
def test_a_picture_without_a_lesion_gets_its_middle_covered(value):
    mask, found = sc.lesion_mask(np.full((64, 64, 3), value, np.uint8))
    assert not found
    assert mask[32, 32]
    assert not mask[0].any()
    assert 0.1 < mask.mean() < 0.3


def test_the_light_that_falls_off_towards_the_rim_is_no_lesion():
    y, x = np.mgrid[-1:1:128j, -1:1:128j]
    image = np.repeat((200 * (1 - 0.5 * (x**2 + y**2)))[..., None], 3, axis=2)
    image[np.hypot(x - 0.1, y) < 0.25] *= 0.7
    mask, found = sc.lesion_mask(image.clip(0).astype(np.uint8))
    truth = np.hypot(x - 0.1, y) < 0.25
    assert found
    assert (mask & truth).sum() / (mask | truth).sum() > 0.7


def test_hair_is_told_from_bare_skin():
    bare = [sc.hair_share(sc.strokes(skin(seed)), NOTHING) for seed in range(12)]
    hairy = [sc.hair_share(sc.strokes(skin(seed, synthetic.hair)), NOTHING) for seed in range(12)]
    assert np.mean(np.array(bare) <= sc.HAIRY) > 0.9
    assert np.mean(np.array(hairy) > sc.HAIRY) > 0.6
    assert sc.hair_share(sc.strokes(skin(0, synthetic.hair)), ~NOTHING) == 0  # on the lesion it may be its network


def test_rulers_are_told_from_bare_skin_and_from_hair():
    assert np.mean([sc.has_ruler(sc.strokes(skin(seed, synthetic.ruler))) for seed in range(12)]) > 0.8
    assert np.mean([sc.has_ruler(sc.strokes(skin(seed))) for seed in range(12)]) < 0.1
    assert np.mean([sc.has_ruler(sc.strokes(skin(seed, synthetic.hair))) for seed in range(12)]) < 0.2


def test_the_typology_angle_is_its_formula_and_falls_with_melanin():
    fair, dark = np.full((4, 4, 3), (230, 190, 170), np.uint8), np.full((4, 4, 3), (90, 60, 45), np.uint8)
    everywhere = np.ones((4, 4), bool)
    lightness, _, b = cv2.cvtColor(np.float32(fair[:1, :1] / 255), cv2.COLOR_RGB2LAB)[0, 0]
    assert sc.typology_angle(fair, everywhere) == pytest.approx(np.degrees(np.arctan((lightness - 50) / b)), abs=1e-3)
    assert sc.typology_angle(fair, everywhere) > 28 > 0 > sc.typology_angle(dark, everywhere)


def test_covering_changes_the_mask_alone_and_leaves_no_lesion():
    image, truth = synthetic.draw(np.random.default_rng(3), malignant=True)
    around = cv2.dilate(truth.astype(np.uint8), np.ones((15, 15), np.uint8)) > 0
    result = sc.covered(image, around)
    np.testing.assert_array_equal(result[~around], image[~around])
    skin_tone = image[~around].mean(axis=0)
    before, after = (np.abs(each[truth].mean(axis=0) - skin_tone).max() for each in (image, result))
    assert after < 0.3 * before
    assert sc.covered(image, ~NOTHING).std(axis=(0, 1)).max() < 1  # nothing is left to fill it from


def test_the_rim_alone_is_three_tenths_of_the_picture():
    result = sc.rim_alone(np.full((100, 200, 3), 7, np.uint8))
    assert (result > 0).mean() == pytest.approx(1 - sc.CENTRE, abs=0.02)
    assert (result[[0, -1]] == 7).all()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Malignant ones have a darker lesion, and a bright stripe along the upper rim that a camera might leave."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    rows = []
    y, x = np.mgrid[-1:1:64j, -1:1:64j]
    for number in range(24):
        target = number % 2
        image = np.full((64, 64, 3), 190) + rng.normal(0, 3, (64, 64, 3))
        image[np.hypot(x, y) < 0.4] -= 50 + 40 * target + rng.normal(0, 10)
        image[:3] += 40 * target
        file = folder / f"{number}.png"
        cv2.imwrite(str(file), image.clip(0, 255).astype(np.uint8))
        rows.append({"file": str(file), "target": target, "patient_id": None, "group": str(number)})
    return pd.DataFrame(rows)


def lesion_reader(images):
    """Reads the middle of the picture alone: images [B, 32, 32, 3] to probabilities [B]."""
    return 1 / (1 + np.exp((images[:, 12:20, 12:20].mean(axis=(1, 2, 3)) - 120) / 20))


def rim_reader(images):
    return 1 / (1 + np.exp((200 - images[:, 0].mean(axis=(1, 2))) / 20))


@pytest.mark.parametrize(("model", "honest"), [(lesion_reader, True), (rim_reader, False)])
def test_a_model_that_reads_the_camera_is_found_out(pictures, model, honest):
    from Modules.data.images import read_image

    whole = model(np.stack([read_image(file, 32) for file in pictures["file"]]).astype(np.float32))
    found = sc.shortcuts(pictures, whole, model, 32, 0.5)
    views = {name: view["roc_auc"] for name, view in found["views"].items()}
    assert views["whole"] == pytest.approx(evaluate(pictures["target"].to_numpy(), whole, resamples=2)["roc_auc"])
    assert views["whole"] > 0.9
    for name in ("lesion_covered", "rim_alone"):
        assert (views[name] < 0.7) == honest
    assert found["n"] == found["lesion_found"] == 24
    for stratum in ("hair", "ruler", "skin tone"):
        assert sum(row["n"] for row in found["strata"] if row["stratum"] == stratum) == 24


def test_of_many_images_the_same_part_is_looked_at(pictures, monkeypatch):
    monkeypatch.setattr(sc, "MOST", 5)
    seen = []

    def model(images):
        seen.append(len(images))
        return lesion_reader(images)

    found = sc.shortcuts(pictures, np.linspace(0, 1, 24), model, 32, 0.5)
    assert (found["n"], found["n_malignant"]) == (10, 5)
    assert sum(seen) == 2 * 10
    assert found == sc.shortcuts(pictures, np.linspace(0, 1, 24), lesion_reader, 32, 0.5)
