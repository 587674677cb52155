"""Labelled pictures from anywhere: class folders, a table in ISIC's words, or a CSV of `path,target`.

    table, notes = read_labelled(Path("clinic"))        # clinic/benign/*.jpg, clinic/melanoma/*.jpg
    table, notes = read_labelled(Path("test.csv"))      # image_id,melanoma; pictures anywhere below its folder

Whatever such a set does not tell, patients for instance, is missing from what can be computed; `notes` say so.
"""

import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import cv2
import numpy as np
import pandas as pd

from Modules.cli import UserError
from Modules.data.images import EXTENSIONS, read_image, scan
from Modules.data.manifest import CLINICAL
from Modules.data.metadata import TABLE, read_csv, shown
from Modules.evaluation.gallery import copies, picture_hashes
from Modules.metric_learning.sampling import shuffled

WORDS = {
    "benign": 0, "nevus": 0, "naevus": 0, "nv": 0, "0": 0, "0.0": 0, "notmelanoma": 0, "non-melanoma": 0,
    "malignant": 1, "melanoma": 1, "mel": 1, "1": 1, "1.0": 1,
}  # fmt: skip
PATHS = ("path", "file", "filename", "image_path")
IDS = ("isic_id", "image_name", "image_id", "image", "id")
TARGETS = ("target", "benign_malignant", "melanoma", "mel", "malignant", "label", "class")  # the first one there counts
OTHERS = {"age": "age_approx", "anatom_site_general": "anatom_site_general_challenge", "dx": "diagnosis"}
SAMPLE = 300  # pictures whose size and colour are looked at


def read_labelled(path: Path) -> tuple[pd.DataFrame, list[str]]:
    """The pictures of a labelled set, one row each, and what its reader should know.

    `path`: a folder of class folders (the innermost folder named as a class counts), a folder with one table in it, or
    a table (CSV) that names its pictures by path (from its own folder) or by id (file names anywhere below it). Rows:
    `isic_id`, `file` (str), `target` int, `patient_id` (str or NA), `group` (lesion, else the image) and the other
    columns CLINICAL, NA where unknown. Raises UserError where there is neither, or no picture is left.
    """
    path, notes = Path(path), []
    if not path.exists():
        raise UserError(f"--data {path}: there is no such folder or table")
    source = path if path.is_file() else _table_in(path)
    table = _from_folders(path, notes) if source is None else _from_table(source, notes)
    known = table["patient_id"].notna()
    if not known.all():
        notes.append(
            "no patients are known: each image counts as a patient of its own, so intervals may be too narrow"
            if not known.any()
            else f"{(~known).sum()} images without a patient count as patients of their own"
        )
    missing = [column for column in CLINICAL[1:] if table[column].isna().all()]
    if missing:
        notes.append(f"no table by {', '.join(missing)}: the set does not tell them")
    return table, notes


def without_known(
    table: pd.DataFrame, known: Iterable[str], gallery: dict, size: int, notes: list[str]
) -> pd.DataFrame:
    """`table` without what training or validation knew: by its id among `known`, or as the copy, under whatever name,
    of a picture in the `gallery`, compared at `size` pixels. `table` has been through `readable`."""
    named = table["isic_id"].isin(set(known)).to_numpy()
    hashes = np.stack([picture_hashes(read_image(file, size)) for file in table["file"]])
    copied = np.isin(np.arange(len(table)), copies(hashes, gallery)[:, 0]) & ~named
    for seen, why in ((named, "training or validation knew their ids"), (copied, "copies of training images")):
        if seen.any():
            notes.append(f"{seen.sum()} images left out: {why}")
    if (named | copied).all():
        raise UserError(f"all {len(table)} images were known in training: expected others")
    return table[~(named | copied)].reset_index(drop=True)


def readable(table: pd.DataFrame, notes: list[str]) -> pd.DataFrame:
    """`table` without the pictures that can't be used: unreadable, tiny or blank."""
    reasons = scan(table["file"].tolist())["reason"]
    bad = reasons.notna().to_numpy()
    named = shown(
        f"{os.path.basename(file)}: {why}" for file, why in zip(table["file"][bad], reasons[bad], strict=True)
    )
    if bad.all():
        raise UserError(f"none of {len(table)} pictures can be used: {named}")
    if bad.any():
        notes.append(f"{bad.sum()} pictures left out: {named}")
    return table[~bad].reset_index(drop=True)


def picture_statistics(files: Iterable[str]) -> dict:
    """Size and colour of at most SAMPLE of the pictures: `n`, median `width` and `height` in pixels, and mean and
    standard deviation over the pictures of their mean CIELAB `lightness` (0..100), `a` and `b`."""
    files = list(files)
    rows = []
    for place in np.sort(shuffled(len(files), 0, 0)[:SAMPLE]):
        pixels = read_image(files[place])
        small = cv2.resize(pixels, (64, 64), interpolation=cv2.INTER_AREA) / np.float32(255)
        lab = cv2.cvtColor(small, cv2.COLOR_RGB2LAB)
        rows.append((pixels.shape[1], pixels.shape[0], *lab.reshape(-1, 3).mean(axis=0)))
    rows = np.array(rows, float)
    colours = {
        name: {"mean": float(rows[:, i].mean()), "sd": float(rows[:, i].std())}
        for i, name in enumerate(("lightness", "a", "b"), start=2)
    }
    return {"n": len(rows), "width": float(np.median(rows[:, 0])), "height": float(np.median(rows[:, 1]))} | colours


def differences(table: pd.DataFrame, reference: dict, familiar: np.ndarray) -> list[dict]:
    """How the pictures of `table` differ from those of training (`reference`): rows of `what`, `here`, `training` and,
    for colours, `shift`, in standard deviations of training.

    familiar: bool [N], whether the model knows such pictures (`in_distribution`).
    """
    here = picture_statistics(table["file"])
    rows = [
        {"what": "share malignant", "here": float(table["target"].mean()), "training": reference["prevalence"]},
        {"what": "median width, pixels", "here": here["width"], "training": reference["width"]},
        {"what": "median height, pixels", "here": here["height"], "training": reference["height"]},
    ]
    for name, label in (("lightness", "lightness L*"), ("a", "green to red a*"), ("b", "blue to yellow b*")):
        shift = (here[name]["mean"] - reference[name]["mean"]) / max(reference[name]["sd"], 1e-6)
        rows.append({"what": label, "here": here[name]["mean"], "training": reference[name]["mean"], "shift": shift})
    rows.append({"what": "share of a familiar kind", "here": float(np.mean(familiar)), "training": None})
    return rows


def _table_in(folder: Path) -> Path | None:
    """Kaggle's table in `folder`, else the only CSV with a target; None where class folders must do."""
    if (folder / TABLE).is_file():
        return folder / TABLE
    tables = [file for file in sorted(folder.glob("*.csv")) if _named(read_csv(file), TARGETS)]
    if len(tables) > 1:
        raise UserError(f"--data {folder}: {len(tables)} tables with a target, expected one: name it instead")
    return tables[0] if tables else None


def _from_folders(folder: Path, notes: list[str]) -> pd.DataFrame:
    rows, elsewhere = [], Counter()
    for file in _pictures(folder):
        names = [WORDS.get(part.lower()) for part in reversed(file.relative_to(folder).parts[:-1])]
        target = next((label for label in names if label is not None), None)
        if target is None:
            elsewhere[file.parent.name] += 1
        else:
            rows.append({"isic_id": file.stem, "file": str(file), "target": target})
    if not rows:
        raise UserError(
            f"--data {folder}: expected folders benign/ and malignant/ with pictures, a table with a target, "
            "or a data set of generate_balanced_dataset.py"
        )
    if elsewhere:
        notes.append(
            f"{elsewhere.total()} pictures left out, their folder is none of a known class: {counted(elsewhere)}"
        )
    return _completed(pd.DataFrame(rows))


def _from_table(file: Path, notes: list[str]) -> pd.DataFrame:
    raw = read_csv(file)
    raw.columns = [column.lower() for column in raw.columns]
    paths, ids, labels = _named(raw, PATHS), _named(raw, IDS), _named(raw, TARGETS)
    if not labels or not (paths or ids):
        raise UserError(
            f"{file}: expected a column with the target ({', '.join(TARGETS[:4])}, ...) and one with the path or id "
            f"({', '.join((*PATHS[:1], *IDS[:4]))}); it has {', '.join(raw.columns)}"
        )
    words = raw[labels].str.lower()
    target = words.map(WORDS)
    if words.notna().any() and target.isna().all():
        expected = ", ".join(WORDS)
        raise UserError(f"{file}: column {labels} holds {shown(map(repr, words.dropna().unique()))}; known: {expected}")
    table = raw.rename(columns={old: new for old, new in OTHERS.items() if new not in raw.columns})
    table["target"] = target
    if paths:
        table["file"] = [str(file.parent / path) if isinstance(path, str) else None for path in raw[paths]]
        # Two folders may use one name: without ids it is the path that tells pictures apart.
        table["isic_id"] = raw[ids].map(_stem) if ids else table["file"].map(_stem)
        there = table["file"].map(lambda path: path is not None and os.path.isfile(path))
    else:
        found = {picture.stem: str(picture) for picture in _pictures(file.parent)}
        table["isic_id"] = raw[ids].map(_stem)
        table["file"] = table["isic_id"].map(found.get)
        there = table["file"].notna()
    strange = Counter(words[target.isna() & words.notna()])
    if strange:
        notes.append(
            f"{strange.total()} of {len(table)} rows left out, their label is none of a known class: {counted(strange)}"
        )
    for what, bad in (("label", words.isna()), ("picture", ~there & target.notna())):
        if bad.any():
            notes.append(f"{bad.sum()} of {len(table)} rows left out: no {what}")
    table = table[target.notna() & there]
    if table.empty:
        raise UserError(f"{file}: none of its {len(raw)} rows has both a label and a picture in {file.parent}")
    repeated = table["isic_id" if ids else "file"].duplicated()
    if repeated.any():
        notes.append(f"{repeated.sum()} rows left out: their {'id' if ids else 'path'} came before")
    return _completed(table[~repeated])


def counted(words: Counter) -> str:
    return shown(f"{word} ({count})" for word, count in words.most_common())


def _stem(name: object) -> str | None:
    """A picture's id from its name, with or without folder and suffix."""
    return Path(name).stem if isinstance(name, str) else None


def _completed(table: pd.DataFrame) -> pd.DataFrame:
    for column in ("patient_id", *CLINICAL):
        if column not in table:
            table = table.assign(**{column: pd.NA})
    age = pd.to_numeric(table["age_approx"], errors="coerce")
    table = table.assign(
        target=table["target"].astype(int),
        age_approx=age.where(age.between(0, 120)).astype(float),
        group=table["lesion_id"].fillna(table["file"]),
        balanced=False,
    )
    return table[["isic_id", *CLINICAL, "file", "target", "patient_id", "group", "balanced"]].reset_index(drop=True)


def _named(table: pd.DataFrame, names: Iterable[str]) -> str | None:
    columns = {column.lower() for column in table.columns}
    return next((name for name in names if name in columns), None)


def _pictures(folder: Path) -> list[Path]:
    return sorted(
        file for file in folder.rglob("*") if file.suffix.lower() in EXTENSIONS and not file.name.startswith(".")
    )
