"""The known lesions: a file bound to its model, copies that are no evidence, and an exact search."""

import cv2
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from Modules.cli import UserError
from Modules.data.hashing import view
from Modules.data.images import decode
from Modules.data.synthetic import draw
from Modules.evaluation import gallery

SIZE = 64


def unit(vectors):
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def random_vectors(n, dimension=6, seed=0):
    return unit(np.random.default_rng(seed).normal(size=(n, dimension)))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Four pictures, a checkpoint's bytes, and the table that train.py would give."""
    folder = tmp_path_factory.mktemp("gallery")
    (folder / "best_epoch.keras").write_bytes(b"a model")
    for i in range(4):
        image, _ = draw(np.random.default_rng(i), i > 1, 80)
        cv2.imwrite(str(folder / f"{i}.png"), image[..., ::-1])
    return folder


def table_in(folder):
    return pd.DataFrame(
        {
            "file": [str(folder / f"{i}.png") for i in range(4)],
            "isic_id": [f"ISIC_{i}" for i in range(4)],
            "patient_id": ["P1", "P1", None, "P2"],
            "group": ["g1", "g1", "g2", "g3"],
            "target": [0, 0, 1, 1],
            "diagnosis": ["nevus", None, "melanoma", "melanoma"],
        }
    )


def write(folder, file, **options):
    familiar = np.zeros(3), np.eye(3)
    vectors = random_vectors(4)
    gallery.write(file, folder / "best_epoch.keras", table_in(folder), vectors, familiar, SIZE, **options)
    return vectors


def test_the_gallery_is_read_as_it_was_written(home, tmp_path):
    file = tmp_path / "gallery.npz"
    vectors = write(home, file)
    known = gallery.read(file, home / "best_epoch.keras")
    assert set(known) == set(gallery.ARRAYS)
    np.testing.assert_array_equal(known["embeddings"], vectors.astype(np.float16).astype(np.float32))
    assert list(known["ids"]) == ["ISIC_0", "ISIC_1", "ISIC_2", "ISIC_3"]
    assert list(known["patients"]) == ["P1", "P1", "", "P2"]
    assert list(known["diagnoses"]) == ["nevus", "", "melanoma", "melanoma"]
    assert list(known["targets"]) == [0, 0, 1, 1]
    for i in range(4):
        small = decode(gallery.thumbnail(known, i))
        expected = cv2.resize(cv2.imread(str(home / f"{i}.png"))[..., ::-1], small.shape[:2])
        assert small.shape == (gallery.THUMBNAIL, gallery.THUMBNAIL, 3)
        assert np.abs(small.astype(float) - expected).mean() < 12


def test_thumbnails_may_be_left_out(home, tmp_path):
    write(home, tmp_path / "gallery.npz", thumbnails=False)
    known = gallery.read(tmp_path / "gallery.npz", home / "best_epoch.keras")
    assert gallery.thumbnail(known, 0) == gallery.thumbnail(known, 3) == b""


def test_the_gallery_of_another_model_or_version_is_refused(home, tmp_path, monkeypatch):
    write(home, tmp_path / "gallery.npz")
    (tmp_path / "other.keras").write_bytes(b"another model")
    with pytest.raises(UserError, match="of another model"):
        gallery.read(tmp_path / "gallery.npz", tmp_path / "other.keras")
    monkeypatch.setattr(gallery, "VERSION", gallery.VERSION + 1)
    with pytest.raises(UserError, match="version 1, expected 2"):
        gallery.read(tmp_path / "gallery.npz", home / "best_epoch.keras")


def changed(name, change, save=np.savez):
    """The file with one of its arrays changed."""

    def write_changed(folder, file):
        write(folder, file)
        with np.load(file) as saved:
            arrays = dict(saved)
        arrays[name] = change(arrays[name])
        save(file, **arrays)

    return write_changed


BROKEN = {
    "nothing": lambda folder, file: None,
    "empty": lambda folder, file: file.touch(),
    "text": lambda folder, file: file.write_text("no gallery"),
    "one array": lambda folder, file: (np.save(file.with_suffix(".npy"), 0), file.with_suffix(".npy").rename(file)),
    "other arrays": lambda folder, file: np.savez(file, weights=np.zeros(3)),
    "cut short": lambda folder, file: (write(folder, file), file.write_bytes(file.read_bytes()[:-100])),
    "pickled": changed("ids", lambda ids: ids.astype(object)),
    "fewer ids": changed("ids", lambda ids: ids[:-1]),
    "numbers for names": changed("ids", lambda ids: np.arange(len(ids))),
    "thumbnails beyond the end": changed("thumbnail_ends", lambda ends: ends + 1),
    "a third class": changed("targets", lambda targets: targets + 1),
    "compressed": changed("centre", lambda _: np.zeros(10**6, np.float32), np.savez_compressed),
    "ends that go back": changed("thumbnail_ends", lambda ends: ends[::-1]),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_file_that_is_no_gallery_is_the_users_to_mend(home, tmp_path, kind):
    BROKEN[kind](home, tmp_path / "gallery.npz")
    with pytest.raises(UserError, match=r"no gallery of known lesions in .*gallery\.npz.*train"):
        gallery.read(tmp_path / "gallery.npz", home / "best_epoch.keras")


def test_copies_and_their_groups_are_no_evidence(home, tmp_path):
    write(home, tmp_path / "gallery.npz")
    known = gallery.read(tmp_path / "gallery.npz", home / "best_epoch.keras")
    for i, group in ((0, [True, True, False, False]), (2, [False, False, True, False])):
        picture = cv2.resize(cv2.imread(str(home / f"{i}.png"))[..., ::-1], (SIZE, SIZE), interpolation=cv2.INTER_AREA)
        brighter = np.clip(picture.astype(int) + 20, 0, 255).astype(np.uint8)
        for copy in (picture, view(picture, 1), view(picture, 6), brighter):
            assert gallery.relatives(gallery.picture_hashes(copy)[None], known).tolist() == [group]
    stranger, _ = draw(np.random.default_rng(99), True, SIZE)
    both = np.stack([gallery.picture_hashes(stranger), gallery.picture_hashes(picture)])
    assert gallery.relatives(both, known).tolist() == [[False] * 4, group]


# --- The search -------------------------------------------------------------------------------------------------------


def plain_loop(vectors, known, k, excluded):
    found = []
    for row, vector in enumerate(vectors):
        cosines = {i: float(np.dot(vector, other)) for i, other in enumerate(known) if not excluded[row, i]}
        order = sorted(cosines, key=lambda i: -cosines[i])[:k]
        found.append((order, [cosines[i] for i in order]))
    return found


@given(st.integers(0, 9), st.integers(1, 30), st.integers(1, 8), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_the_nearest_known_are_those_of_a_plain_loop(n, m, k, seed):
    rng = np.random.default_rng(seed)
    vectors, known = random_vectors(n, seed=seed), random_vectors(m, seed=seed + 1)
    excluded = rng.random((n, m)) < rng.choice([0, 0.3, 0.9])
    positions, cosines = gallery.nearest_known(vectors, {"embeddings": known}, k, excluded)
    assert positions.shape == cosines.shape == (n, min(k, m))
    for row, (order, values) in enumerate(plain_loop(vectors, known, k, excluded)):
        assert list(positions[row][: len(order)]) == order
        np.testing.assert_allclose(cosines[row][: len(order)], values, atol=1e-6)
        assert np.isneginf(cosines[row][len(order) :]).all()


def test_a_gallery_in_half_precision_gives_the_same_neighbours():
    vectors, known = random_vectors(9), random_vectors(25, seed=1).astype(np.float16)
    for one, other in zip(
        gallery.nearest_known(vectors, {"embeddings": known}, 4),
        gallery.nearest_known(vectors, {"embeddings": known.astype(np.float32)}, 4),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)


def test_a_large_gallery_is_searched_as_a_small_one(monkeypatch):
    vectors, known = random_vectors(20, 32), random_vectors(500, 32, seed=1).astype(np.float16)
    excluded = np.random.default_rng(0).random((20, 500)) < 0.5
    for rows in (None, excluded):
        monkeypatch.setattr(gallery, "LARGE", 10**6)
        expected = gallery.nearest_known(vectors, {"embeddings": known.astype(np.float32)}, 7, rows)
        monkeypatch.setattr(gallery, "LARGE", 100)
        found = gallery.nearest_known(vectors, {"embeddings": known}, 7, rows)
        np.testing.assert_allclose(found[1], expected[1], atol=1e-5)
        assert (found[0] == expected[0]).mean() > 0.99  # but for ties in the last bit
