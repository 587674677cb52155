"""The manifest: one row for every image that was listed, where it went and why. Training starts from nothing else.

`read_manifest` refuses one that was edited by hand or in which a patient, a group or a picture stands on two sides.
"""

import hashlib
import io
import json
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd

from Modules.cli import UserError
from Modules.data.images import ImageError, read_bytes
from Modules.data.metadata import ID, shown
from Modules.data.records import exists, located
from Modules.data.splits import SHARES, assign, draw_balanced

TABLE, FACTS = "manifest.csv", "manifest.json"
GENERATOR = "generate_balanced_dataset.py"
REMEDY = f"Make the data set again with {GENERATOR}"
COLUMNS = (
    "isic_id",
    "source",
    "path",
    "patient_id",
    "target",
    "group",
    "split",
    "balanced",
    "duplicate_of",
    "reason",
    "sha256",
    "fold",
)
# What is known of an image beside its class: for pretraining on diagnoses, and to see whom a model fails.
CLINICAL = ("lesion_id", "sex", "age_approx", "anatom_site_general_challenge", "diagnosis")
SPLITS = (*SHARES, "external", "excluded")
LABELS = ("benign", "malignant")  # folder names, by target
SAMPLE = 64  # files whose hash is checked at each start; --verify checks all


def write_manifest(folder: Path, table: pd.DataFrame, facts: dict) -> None:
    """Write manifest.csv, `table` (COLUMNS, and CLINICAL where known), and manifest.json into `folder`.

    The latter holds `facts`, the counts and the table's hash.
    """
    _check(table, folder)
    table = table.reindex(columns=[*COLUMNS, *CLINICAL])
    data = table.to_csv(index=False, lineterminator="\n").encode()
    (folder / TABLE).write_bytes(data)
    counts = {
        split: {
            label: int(((table["split"] == split) & (table["target"] == target)).sum())
            for target, label in enumerate(LABELS)
        }
        for split in SPLITS
    }
    versions = {
        name: version(name) for name in ("numpy", "pandas", "scipy", "opencv-contrib-python-headless", "pillow")
    }
    facts = {
        "generator": GENERATOR,
        **facts,
        "counts": counts,
        "versions": versions,
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    (folder / FACTS).write_text(json.dumps(facts, indent=2) + "\n")


def read_manifest(folder: Path, verify: bool = False) -> pd.DataFrame:
    """The manifest of the data set in `folder`, checked: COLUMNS and CLINICAL in that order.

    `target` int, `balanced` bool, `fold` int (-1: none), `age_approx` float (years), the rest str
    (NA where empty). Raises UserError, with the offending ids, when it was edited, when a patient, group or picture
    crosses splits or folds (external counts as training), when a picture is missing or another than was written (a
    sample; `verify`: each).
    """
    folder = Path(folder)
    data, facts = _load(folder)
    if hashlib.sha256(data).hexdigest() != facts.get("sha256"):
        raise UserError(f"{folder / TABLE} was changed after it was written. {REMEDY}")
    try:
        table = pd.read_csv(io.BytesIO(data), dtype="str", keep_default_na=False, na_values=[""])
        table = table[list(COLUMNS)].join(table.reindex(columns=list(CLINICAL)).astype("str"))
        table = table.astype({"target": int, "fold": int, "age_approx": float})
        table["balanced"] = table["balanced"].map({"True": True, "False": False}).astype(bool)
    except (ValueError, KeyError, OverflowError) as error:
        raise UserError(f"{folder / TABLE} is no manifest: {error}. {REMEDY}") from None
    _check(table, folder)
    _check_files(table, folder, verify)
    return table


def manifest_sha256(folder: Path) -> str:
    """The sha256 of the manifest in `folder`, which a checkpoint records."""
    return hashlib.sha256((Path(folder) / TABLE).read_bytes()).hexdigest()


def is_data_set(folder: Path) -> bool:
    """Whether `folder` was written by generate_balanced_dataset.py, so that a new run may replace it."""
    try:
        return _load(folder)[1].get("generator") == GENERATOR
    except UserError:
        return False


def fold_view(manifest: pd.DataFrame, fold: int) -> pd.DataFrame:
    """`manifest` as turn `fold` of the cross-validation sees it: that fold is test, an eighth of the rest validation.

    Groups stay whole, external images stay external, `balanced` is drawn anew within each split; depends on nothing but
    the manifest and `fold`. Raises UserError where there is no such fold.
    """
    table = manifest.copy()
    folds = sorted(set(table["fold"]) - {-1})
    if fold not in folds:
        known = f"there are 0 to {folds[-1]}" if folds else f"there are none; {GENERATOR} --folds 5 makes them"
        raise UserError(f"the data set has no fold {fold}: {known}")
    inside = table["fold"] >= 0
    rest = inside & (table["fold"] != fold)
    table.loc[inside, "split"] = "test"
    table.loc[rest, "split"] = assign(
        table.loc[rest, "group"], table.loc[rest, "target"], {"train": 7 / 8, "validation": 1 / 8}, f"fold {fold}"
    )
    table.loc[inside, "balanced"] = draw_balanced(table[inside], ["split"], f"fold {fold}")
    return table


def _load(folder: Path) -> tuple[bytes, dict]:
    if not (folder / TABLE).is_file() or not (folder / FACTS).is_file():
        raise UserError(f"no data set in {folder} ({TABLE} and {FACTS} expected): {GENERATOR} makes it")
    try:
        facts = json.loads((folder / FACTS).read_text())
        if not isinstance(facts, dict):
            raise ValueError("not an object")
    except (ValueError, RecursionError) as error:
        raise UserError(f"{folder / FACTS} is damaged ({error}). {REMEDY}") from None
    return (folder / TABLE).read_bytes(), facts


def _check(table: pd.DataFrame, folder: Path) -> None:
    """Raise UserError with the ids where the table breaks a promise of the manifest."""
    used = table[table["split"] != "excluded"]
    side = used["split"].replace("external", "train")
    inside = used[used["split"] != "external"]
    # With folds every image of the source is tested once: an external one may be grouped with none.
    beside = used[(used["split"] == "external") & (inside["fold"] >= 0).any()]
    drawn = used[used["balanced"]].groupby("split")["target"].mean()
    problems = {
        "a split that isn't one of " + ", ".join(SPLITS): table.loc[~table["split"].isin(SPLITS), "isic_id"],
        "a target that isn't 0 or 1": used.loc[~used["target"].isin([0, 1]), "isic_id"],
        "an id that is none": table.loc[~table["isic_id"].str.fullmatch(f"{ID}(@{ID})?", na=False), "isic_id"],
        "more than one row of an id": table.loc[table["isic_id"].duplicated(), "isic_id"],
        "excluded images in the balanced set": table.loc[table["balanced"] & (table["split"] == "excluded"), "isic_id"],
        "a patient on two sides of the split": _crossing(used["patient_id"], side),
        "a group on two sides of the split": _crossing(used["group"], side),
        "a picture on two sides of the split": _crossing(used["sha256"], side),
        "a patient in two folds": _crossing(inside["patient_id"], inside["fold"]),
        "a group in two folds": _crossing(inside["group"], inside["fold"]),
        "folds for some images only": inside.loc[(inside["fold"] < 0) & (inside["fold"] >= 0).any(), "isic_id"],
        "external images grouped with others": beside.loc[beside["group"].isin(inside["group"]), "isic_id"],
        "a balanced set that is not half malignant": drawn.index[drawn != 0.5],
    }
    labels = used["target"].map(dict(enumerate(LABELS)))
    expected = used["split"] + "/" + labels + "/" + used["isic_id"] + ".jpg"
    problems["a path that contradicts split, target or id"] = used.loc[used["path"] != expected, "isic_id"]
    for what, names in problems.items():
        if len(names):
            raise UserError(f"{folder / TABLE}: {what}: {shown(names)}. {REMEDY}")


def _crossing(key: pd.Series, side: pd.Series) -> list[str]:
    """The values of `key` that stand on more than one side."""
    sides = side.groupby(key.where(key != "")).nunique()
    return sorted(sides.index[sides > 1])


def _check_files(table: pd.DataFrame, folder: Path, verify: bool) -> None:
    used = table[table["split"] != "excluded"]
    files = located(folder, used["path"])
    absent = [path for path, file in zip(used["path"], files, strict=True) if not exists(file)]
    if absent:
        raise UserError(f"{folder}: pictures are missing: {shown(absent)}. {REMEDY}")
    rows = np.arange(len(used)) if verify else np.unique(np.linspace(0, len(used) - 1, SAMPLE).astype(int))
    for row in rows if len(used) else ():
        try:
            same = hashlib.sha256(read_bytes(files[row])).hexdigest() == used["sha256"].iloc[row]
        except ImageError:
            same = False
        if not same:
            raise UserError(f"{files[row]} is another picture than was written. {REMEDY}")
