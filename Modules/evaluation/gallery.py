"""The known lesions: what `gallery.npz` holds, and the search for those most similar to a picture.

The file belongs to one checkpoint, by the hash of its bytes: the embeddings of two models have nothing in common.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from zipfile import ZIP_STORED, ZipFile

import cv2
import numpy as np
import pandas as pd
from tqdm import tqdm

from Modules.cli import UserError
from Modules.data.hashing import VIEWS, close_pairs, phash
from Modules.data.images import read_image, resize
from Modules.safe_model import sha256

VERSION = 1
# Name: (kind of dtype, number of dimensions). All but the last four have one row for each lesion.
ARRAYS = {
    "embeddings": ("f", 2),
    "ids": ("U", 1),
    "patients": ("U", 1),
    "groups": ("U", 1),
    "diagnoses": ("U", 1),
    "targets": ("i", 1),
    "hashes": ("u", 1),
    "thumbnails": ("u", 1),
    "thumbnail_ends": ("i", 1),
    "centre": ("f", 1),
    "whitening": ("f", 2),
}
ROWS = list(ARRAYS)[:7]
THUMBNAIL = 96  # pixels a side
QUALITY = 80  # of a thumbnail's JPEG: about 2.5 kB
COPY_RADIUS = 2  # bits; within 7 each real picture has a dozen others that are no copies of it
BLOCK = 256  # embeddings compared with the whole gallery at once
LARGE = 10**6  # lesions from which on faiss searches, whose index holds float16 where the product needs float32
_indexing = Lock()  # batches are judged side by side


def write(
    file: Path,
    checkpoint: Path,
    table: pd.DataFrame,
    embeddings: np.ndarray,
    familiar: tuple[np.ndarray, np.ndarray],
    size: int,
    thumbnails: bool = True,
) -> None:
    """Write the lesions of `table` (the manifest's columns, and `file`) as the gallery of `checkpoint`.

    embeddings: float [N, D] of unit length, kept as float16. familiar: what `familiarity.fit` returned. size: pixels a
    side at which copies are recognised, the model's. thumbnails: with a small JPEG of each.
    """

    def look(path: str) -> tuple[np.uint64, bytes]:
        picture = read_image(path, size)
        small = cv2.cvtColor(resize(picture, THUMBNAIL), cv2.COLOR_RGB2BGR)
        jpeg = cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])[1].tobytes() if thumbnails else b""
        return picture_hashes(picture)[0], jpeg

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        files = tqdm(table["file"], "thumbnails", unit="image", leave=False, ncols=80, disable=None)
        seen = pool.map(look, files)
        hashes, jpegs = zip(*seen, strict=True)
    diagnoses = table["diagnosis"] if "diagnosis" in table else pd.Series(pd.NA, table.index)
    np.savez(
        file,
        version=VERSION,
        checkpoint=sha256(checkpoint),
        embeddings=embeddings.astype(np.float16),
        ids=table["isic_id"].to_numpy(str),
        patients=table["patient_id"].fillna("").to_numpy(str),
        groups=table["group"].to_numpy(str),
        diagnoses=diagnoses.fillna("").to_numpy(str),
        targets=table["target"].to_numpy(np.int8),
        hashes=np.array(hashes, np.uint64),
        thumbnails=np.frombuffer(b"".join(jpegs), np.uint8),
        thumbnail_ends=np.cumsum([len(jpeg) for jpeg in jpegs]),
        centre=familiar[0].astype(np.float32),
        whitening=familiar[1].astype(np.float32),
    )


def read(file: Path, checkpoint: Path) -> dict[str, np.ndarray]:
    """ARRAYS of the gallery in `file`, the embeddings as float32 (float16 where there are more than LARGE).

    Raises:
        UserError: no such file, another kind or version, or the gallery of another checkpoint.
    """
    try:
        with open(file, "rb") as stream, ZipFile(stream) as archive:
            if any(info.compress_type != ZIP_STORED for info in archive.infolist()):
                raise ValueError("compressed, so that it could grow when it is read")
        with open(file, "rb") as stream, np.load(stream, allow_pickle=False) as saved:
            version, bound_to = int(saved["version"]), str(saved["checkpoint"])
            gallery = {name: saved[name] for name in ARRAYS} if version == VERSION else {}
    except Exception as error:  # a file of any content can fail anywhere in NumPy
        raise UserError(
            f"no gallery of known lesions in {file} ({error}); train.py writes it beside the model"
        ) from None
    if version != VERSION:
        raise UserError(f"{file} is a gallery of version {version}, expected {VERSION}: train again")
    if bound_to != sha256(checkpoint):
        raise UserError(f"{file} is the gallery of another model than {checkpoint}: put its own beside it")
    _check(file, gallery)
    exact = np.float32 if len(gallery["ids"]) <= LARGE else np.float16
    return gallery | {"embeddings": gallery["embeddings"].astype(exact)}


def _check(file: Path, gallery: dict[str, np.ndarray]) -> None:
    n, kinds = len(gallery["ids"]), {name: (array.dtype.kind, array.ndim) for name, array in gallery.items()}
    ends = gallery["thumbnail_ends"]
    fits = kinds == ARRAYS and n > 0 and all(len(gallery[name]) == n for name in (*ROWS, "thumbnail_ends"))
    fits = fits and set(np.unique(gallery["targets"])) <= {0, 1}
    if not (fits and (np.diff(ends, prepend=0) >= 0).all() and ends[-1] == len(gallery["thumbnails"])):
        raise UserError(f"no gallery of known lesions in {file} (its arrays don't fit one another): train again")


def thumbnail(gallery: dict, position: int) -> bytes:
    """The JPEG of one lesion; empty where the gallery has none."""
    start = gallery["thumbnail_ends"][position - 1] if position else 0
    return gallery["thumbnails"][start : gallery["thumbnail_ends"][position]].tobytes()


def picture_hashes(picture: np.ndarray) -> np.ndarray:
    """The perceptual hashes of the 8 flips and turns of uint8 [S, S, 3] RGB: uint64 [8], as it is first."""
    return phash(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY))


def copies(hashes: np.ndarray, gallery: dict) -> np.ndarray:
    """Which pictures, `hashes` uint64 [M, 8], are which lesions, however turned, scaled or encoded: int64 [P, 2]."""
    return close_pairs(hashes.ravel(), gallery["hashes"], COPY_RADIUS)[:, :2] // (VIEWS, 1)


def relatives(hashes: np.ndarray, gallery: dict) -> np.ndarray:
    """Which lesions are no evidence about pictures with `hashes` uint64 [M, 8]: copies and their groups, bool [M, N].

    A group is a patient, or what else must stay together, as in every figure of the test split.
    """
    found = np.zeros((len(hashes), len(gallery["hashes"])), bool)
    for picture, lesion in copies(hashes, gallery):
        found[picture] |= gallery["groups"] == gallery["groups"][lesion]
    return found


def nearest_known(
    embeddings: np.ndarray, gallery: dict, k: int, excluded: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The k lesions most similar to each embedding, nearest first: places in the gallery and cosines, both [M, k].

    Exact. excluded: bool [M, N], lesions that don't count for an embedding; where fewer than k are left, the last
    cosines are -inf.
    """
    known = gallery["embeddings"]
    k = min(k, len(known))
    if len(known) > LARGE:
        return _nearest_of_many(embeddings, gallery, k, excluded)
    positions, cosines = [np.zeros((0, k), int)], [np.zeros((0, k), np.float32)]
    for start in range(0, len(embeddings), BLOCK):
        similarity = embeddings[start : start + BLOCK] @ known.T
        if excluded is not None:
            similarity[excluded[start : start + BLOCK]] = -np.inf
        nearest = np.argpartition(-similarity, k - 1, axis=1)[:, :k]
        values = np.take_along_axis(similarity, nearest, axis=1)
        order = np.argsort(-values, axis=1, kind="stable")
        positions.append(np.take_along_axis(nearest, order, axis=1))
        cosines.append(np.take_along_axis(values, order, axis=1))
    return np.concatenate(positions), np.concatenate(cosines)


def _nearest_of_many(
    embeddings: np.ndarray, gallery: dict, k: int, excluded: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    import faiss  # here alone: a second OpenMP in the process, for galleries that few have

    known = gallery["embeddings"]
    with _indexing:
        if "index" not in gallery:  # exact: every lesion is compared, in float16 as it is on disk
            index = faiss.IndexScalarQuantizer(
                known.shape[1], faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT
            )
            for start in range(0, len(known), LARGE):
                index.add(known[start : start + LARGE].astype(np.float32))
            gallery["index"] = index
    rows = np.zeros((len(embeddings), 1), bool) if excluded is None else excluded
    found, values = np.zeros((len(embeddings), k), int), np.full((len(embeddings), k), -np.inf, np.float32)
    for row, vector in enumerate(embeddings):
        cosines, positions = gallery["index"].search(vector[None], min(k + int(rows[row].sum()), len(known)))
        kept = [i for i, place in enumerate(positions[0]) if excluded is None or not excluded[row, place]][:k]
        found[row, : len(kept)], values[row, : len(kept)] = positions[0, kept], cosines[0, kept]
    return found, values
