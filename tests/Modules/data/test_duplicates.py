"""Copies of every kind are found, and nothing else: on drawn pictures, and on real ones where they are at hand."""

from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest

from Modules.data.duplicates import near_duplicates
from Modules.data.local_features import SIDE, Features, align, describe
from Modules.data.synthetic import draw

SHARED = Path(__file__).resolve().parents[4] / "shared"
REAL = SHARED / "isic2020" / "train-image"
needs_images = pytest.mark.skipif(not REAL.is_dir(), reason="the real images are not on this machine")


# --- Copies -----------------------------------------------------------------------------------------------------------


def encode(image, rng, quality=(50, 96)):
    return cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(*quality))])[1].tobytes()


def resize(image, rng):
    factor = rng.uniform(0.5, 1.5)
    return cv2.resize(
        image, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA if factor < 1 else cv2.INTER_CUBIC
    )


def brighten(image, rng):
    return np.clip(image * rng.uniform(0.85, 1.15) + rng.uniform(-15, 15), 0, 255).astype(np.uint8)


def crop(image, rng, least=0.0, most=0.05):
    height, width = image.shape[:2]
    top, bottom, left, right = rng.uniform(least, most, 4)
    return image[round(top * height) : round((1 - bottom) * height), round(left * width) : round((1 - right) * width)]


def turn(image, rng):
    k = rng.integers(1, 8)
    return np.ascontiguousarray(np.rot90(image[:, ::-1] if k >= 4 else image, k % 4))


def everything(image, rng):
    return turn(crop(brighten(resize(image, rng), rng), rng), rng)


def reframe(image, rng):
    """Another section, aspect and white balance."""
    section = crop(image, rng, 0.05, 0.30)
    tinted = np.clip(section * rng.uniform(0.85, 1.15, 3) + rng.uniform(-10, 10, 3), 0, 255).astype(np.uint8)
    return cv2.resize(tinted, (round(200 * rng.uniform(1, 1.5)), 200), interpolation=cv2.INTER_AREA)


ALTERATIONS = {
    "re-encoded": lambda image, rng: image,
    "resized": resize,
    "brighter": brighten,
    "cropped": crop,
    "turned": turn,
    "everything": everything,
    "reframed": reframe,
}


def write_copies(sources, folder, count, seed):
    """`count` altered copies of files drawn from `sources`: their paths, the sources' positions and the alterations."""
    rng = np.random.default_rng(seed)
    rows = []
    for k, source in enumerate(rng.choice(len(sources), count, replace=False).tolist()):
        kind = list(ALTERATIONS)[rng.integers(len(ALTERATIONS))]
        path = folder / f"copy-{k}.jpg"
        path.write_bytes(encode(ALTERATIONS[kind](cv2.imread(str(sources[source])), rng), rng))
        rows.append((path, source, kind))
    return pd.DataFrame(rows, columns=["path", "source", "kind"])


def write(path, image, **options):
    path.write_bytes(encode(image, np.random.default_rng(0), **options))
    return path


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Twelve pictures of different lesions."""
    folder = tmp_path_factory.mktemp("drawn")
    rng = np.random.default_rng(3)
    return [write(folder / f"{k}.jpg", draw(rng, malignant=k % 2 == 0)[0], quality=(95, 96)) for k in range(12)]


# --- Drawn pictures ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ALTERATIONS)
def test_copies_of_each_kind_are_found_and_nothing_else(drawn, tmp_path, kind):
    rng = np.random.default_rng(4)
    copies = []
    for k, source in enumerate(drawn[:5]):
        copies.append(tmp_path / f"{k}.jpg")
        copies[-1].write_bytes(encode(ALTERATIONS[kind](cv2.imread(str(source)), rng), rng))
    found = near_duplicates([*drawn, *copies])
    assert list(zip(found["first"], found["second"], strict=True)) == [(k, len(drawn) + k) for k in range(5)]
    expected = {
        "re-encoded": {"same picture, re-encoded"},
        "resized": {"same picture, re-encoded"},
        "brighter": {"same picture, re-encoded"},
        "cropped": {"cropped"},
        "turned": {"mirrored or turned"},
        "everything": {"mirrored or turned"},
        "reframed": {"reframed"},
    }
    assert set(found["kind"]) == expected[kind]
    assert found["score"].between(0.25, 1).all()


def test_different_lesions_of_one_patient_are_no_pair(tmp_path):
    """One skin tone, lesions of one size in one place and, on half of the pictures, the same ruler."""
    rng = np.random.default_rng(5)
    y, x = np.mgrid[-1:1:256j, -1:1:256j]
    distance, angle = np.hypot(x, y), np.arctan2(y, x)
    paths = []
    for k in range(10):
        waves = sum(rng.normal(0, 0.03) * np.cos(n * angle + rng.uniform(0, 6)) for n in range(2, 9))
        mottling = cv2.resize(rng.normal(0, 8, (32, 32)), (256, 256), interpolation=cv2.INTER_CUBIC)
        grey = 190 + mottling - 90 / (1 + np.exp((distance - 0.35 - waves) / 0.03)) + 2 * rng.standard_normal(x.shape)
        image = np.clip(grey[..., None] * [0.75, 0.8, 1.0], 0, 255).astype(np.uint8)
        for tick in range(20, 240, 12) if k % 2 else ():
            cv2.line(image, (tick, 230), (tick, 245), (30, 30, 30), 2)
        paths.append(write(tmp_path / f"{k}.jpg", image))
    assert near_duplicates(paths).empty


def test_order_of_the_files_only_renumbers_the_pairs(drawn, tmp_path):
    paths = [*drawn, *write_copies(drawn, tmp_path, 6, seed=6)["path"]]
    order = np.random.default_rng(7).permutation(len(paths))
    straight, shuffled = near_duplicates(paths), near_duplicates([paths[k] for k in order])
    pairs = {(i, j) for i, j in zip(straight["first"], straight["second"], strict=True)}
    renumbered = {
        tuple(sorted((order[i], order[j]))) for i, j in zip(shuffled["first"], shuffled["second"], strict=True)
    }
    assert renumbered == pairs
    assert len(pairs) == 6
    pd.testing.assert_frame_equal(near_duplicates(paths), straight)


# --- Degenerate input -------------------------------------------------------------------------------------------------


def test_nothing_and_one_picture_have_no_pairs(drawn):
    for paths in ([], drawn[:1]):
        found = near_duplicates(paths)
        assert found.empty
        assert list(found) == ["first", "second", "kind", "score"]


def test_identical_files_are_a_pair_of_score_one(drawn):
    found = near_duplicates([drawn[0], drawn[1], drawn[0]])
    assert found[["first", "second", "kind"]].to_numpy().tolist() == [[0, 2, "same picture, re-encoded"]]
    assert found["score"][0] == pytest.approx(1)


def test_blank_and_unreadable_files_match_nothing(drawn, tmp_path):
    rng = np.random.default_rng(8)
    blank = [
        write(tmp_path / f"{shade}.jpg", np.full((200, 200, 3), shade, np.uint8)) for shade in (0, 128, 128 + 1, 255)
    ]
    noise = [write(tmp_path / f"n{k}.png", (128 + rng.normal(0, 1, (200, 200, 3))).astype(np.uint8)) for k in range(2)]
    (tmp_path / "text.jpg").write_text("not a picture")
    (tmp_path / "empty.jpg").touch()
    bad = [tmp_path / "text.jpg", tmp_path / "empty.jpg", tmp_path / "absent.jpg"]
    found = near_duplicates([*blank, *noise, *bad, *drawn[:2], drawn[0]])
    assert found[["first", "second"]].to_numpy().tolist() == [[9, 11]]


def test_smooth_gradients_are_no_pair(tmp_path):
    """Nothing but light that falls off: what two pictures of bare skin share."""
    y, x = np.mgrid[-1:1:200j, -1:1:200j]
    paths = []
    for k, fall in enumerate((20, 25, 30, 35)):
        image = np.repeat((180 - fall * (x**2 + y**2))[..., None], 3, axis=2).astype(np.uint8)
        paths.append(write(tmp_path / f"{k}.jpg", image))
    assert near_duplicates(paths).empty


# --- Local features ---------------------------------------------------------------------------------------------------


def grey(path):
    return cv2.resize(cv2.imread(str(path), cv2.IMREAD_GRAYSCALE), (SIDE, SIDE), interpolation=cv2.INTER_AREA)


def test_mirrored_features_are_those_of_the_mirrored_picture(drawn):
    mirrored, seen = describe(grey(drawn[0])).mirrored(), describe(np.ascontiguousarray(grey(drawn[0])[::-1]))
    likeness = mirrored.descriptors.astype(float) @ seen.descriptors.astype(float).T / 512**2
    best = likeness.argmax(axis=1)
    distance = np.hypot(*(mirrored.points[:, :2] - seen.points[best, :2]).T)
    assert np.mean((distance < 1) & (likeness.max(axis=1) > 0.97)) > 0.7


def test_align_recovers_the_affine_map(drawn):
    matrix = np.array([[1.1, 0.2, -15.0], [-0.1, 0.9, 12.0]])
    image = grey(drawn[1])
    warped = cv2.warpAffine(image, matrix, (SIDE, SIDE), borderMode=cv2.BORDER_REFLECT)
    found, matches = align(describe(image), describe(warped))
    assert matches >= 10
    corners = np.array([[40, 40], [150, 40], [40, 150], [150, 150]])
    np.testing.assert_allclose(corners @ found[:, :2].T + found[:, 2], corners @ matrix[:, :2].T + matrix[:, 2], atol=2)


def test_align_of_too_few_features_is_nothing():
    none = Features(np.empty((0, 4), np.float32), np.empty((0, 128), np.uint8), 0)
    two = Features(np.ones((2, 4), np.float32), np.eye(2, 128, dtype=np.uint8), 2)
    assert align(none, two) == align(two, none) == align(two, two) == (None, 0)


# --- Real pictures ----------------------------------------------------------------------------------------------------


def recall(sources, folder, count):
    """The share of `count` copies found, and the pairs found among the sources (pairs of positions)."""
    copies = write_copies(sources, folder, count, seed=9)
    found = near_duplicates([*sources, *copies["path"]])
    pairs = set(zip(found["first"], found["second"], strict=True))
    hit = [(source, len(sources) + k) in pairs for k, source in enumerate(copies["source"])]
    print(copies.assign(hit=hit).groupby("kind")["hit"].agg(["sum", "count"]))
    return np.mean(hit), {pair for pair in pairs if pair[1] < len(sources)}


@needs_images
def test_copies_of_real_images_are_found(tmp_path):
    found, others = recall(sorted(REAL.glob("*.jpg"))[:150], tmp_path, 120)
    assert found >= 0.97
    assert not others


@needs_images
@pytest.mark.slow
def test_all_real_images(tmp_path):
    paths = sorted(REAL.glob("*.jpg"))
    found, others = recall(paths, tmp_path, 500)
    assert found >= 0.97
    position = {path.stem: k for k, path in enumerate(paths)}
    listed = pd.read_csv(SHARED / "isic2020" / "ISIC_2020_Training_Duplicates.csv")
    official = {
        tuple(sorted((position[one], position[other])))
        for one, other in listed.itertuples(index=False)
        if one in position and other in position
    }
    assert len(official) == 3
    assert official <= others
    assert len(others - official) <= 3
