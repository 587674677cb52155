"""Which part of the data each group of images goes to: stratified, reproducible, and never a group in two parts.

All randomness is a hash of seed and name, so the outcome depends on neither the rows' order nor the machine.
"""

import hashlib
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from Modules.cli import UserError
from Modules.data.groups import find_duplicates, group_ids, neighbours
from Modules.data.metadata import read_csv, shown

SHARES = {"train": 0.7, "validation": 0.1, "test": 0.2}
CLASSES = ("malignant", "benign")


def plan(
    table: pd.DataFrame, pairs: pd.DataFrame, seed: int = 0, folds: int = 0, kept: pd.DataFrame | None = None
) -> pd.DataFrame:
    """Where each image goes: `table` sorted by id, with the columns group, split, balanced, fold, duplicate_of, reason.

    `table`: isic_id (unique), patient_id, lesion_id, target, bytes, sha256, external (bool), reason (NA: usable).
    `pairs`: ids in `first`, `second` that show the same picture, `kind` a word. Its larger file stays, ties by id.

    The sources' own images are placed as if there were no external ones. These go to training unless their group holds
    a validation or test image, or with folds any image of the sources.

    `kept` (isic_id, split, fold): an earlier outcome. Its images stay where they were, new images of their groups join
    them, and new images that would tie two of its splits or folds together are left out. Of two of its images that turn
    out to show one picture in different splits, the one in test stays before validation before training.
    """
    table = table.sort_values("isic_id", ignore_index=True)
    own = _place_own(table[~table["external"]].reset_index(drop=True), pairs, seed, folds, kept)
    if table["external"].any():
        external = _place_external(own, table[table["external"]], pairs, seed, folds)
        own = pd.concat([own, external], ignore_index=True).sort_values("isic_id", ignore_index=True)
    return own


def _place_own(
    table: pd.DataFrame, pairs: pd.DataFrame, seed: int, folds: int, kept: pd.DataFrame | None
) -> pd.DataFrame:
    home, precedence = pd.Series(pd.NA, table.index, dtype="str"), np.zeros(len(table))
    bridges, kept_splits, kept_folds = pd.Series(False, table.index), {}, {}
    if kept is not None:
        kept = kept[kept["split"].isin(list(SHARES))].set_index("isic_id")
        keep_folds = bool(folds) and (kept["fold"] >= 0).any()
        if keep_folds and kept["fold"].max() + 1 != folds:
            raise UserError(f"the kept manifest has {kept['fold'].max() + 1} folds: give --folds that number, or 0")
        homes = kept["split"] + ("/" + kept["fold"].astype("str") if keep_folds else "")
        home = table["isic_id"].map(homes)
        precedence = table["isic_id"].map(kept["split"]).map({"test": 0, "validation": 1, "train": 2}).fillna(3)
        near = neighbours(table, pairs, home)
        bridges.loc[near.index[near["touches"].map(len) > 1]] = True
        of = home.set_axis(table["isic_id"])
        ends = [pairs[side].map(of) for side in ("first", "second")]
        pairs_within = pairs[ends[0].isna() | ends[1].isna() | (ends[0] == ends[1])]
    else:
        pairs_within = pairs
    table["rank"] = np.lexsort((table["isic_id"], -table["bytes"], precedence)).argsort()
    table["settled"] = False
    table["duplicate_of"] = pd.Series(pd.NA, table.index, dtype="str")
    usable = table.index[table["reason"].isna()]
    table.loc[usable, ["duplicate_of", "reason"]] = find_duplicates(table.loc[usable], pairs)
    table.loc[bridges & table["reason"].isna(), "reason"] = "leak: it would tie kept splits together"
    table["group"] = table["isic_id"]
    table.loc[~bridges, "group"] = group_ids(table[~bridges], pairs_within)
    if kept is not None:
        homes = home.groupby(table["group"].where(~bridges)).agg(lambda values: sorted(set(values.dropna())))
        if len(torn := homes[homes.map(len) > 1]):
            raise UserError(
                f"the kept manifest puts one group on several sides, so it was made from other patients or lesions: "
                f"{shown(f'the group of {name} in ' + ' and '.join(sides) for name, sides in torn.items())}"
            )
        homes = homes[homes.map(len) == 1].map(lambda values: values[0].split("/"))
        kept_splits = homes.str[0].to_dict()
        kept_folds = homes.str[1].astype(int).to_dict() if keep_folds else {}
    alive = table["reason"].isna()
    table["split"], table["fold"], table["balanced"] = "excluded", -1, False
    table.loc[alive, "split"] = assign_splits(table[alive], seed, kept_splits)
    if folds:
        table.loc[alive, "fold"] = assign_folds(table[alive], folds, seed, kept_folds)
    table.loc[alive, "balanced"] = draw_balanced(table[alive], ["split", "fold"], seed)
    return table


def _place_external(own: pd.DataFrame, table: pd.DataFrame, pairs: pd.DataFrame, seed: int, folds: int) -> pd.DataFrame:
    table = table.assign(settled=False, rank=np.lexsort((table["isic_id"], -table["bytes"])).argsort())
    table["duplicate_of"] = pd.Series(pd.NA, table.index, dtype="str")
    read = own[own["sha256"].fillna("") != ""].assign(settled=True)
    read["rank"] += len(own) * read["reason"].notna()  # what stays comes before what was left out
    both = pd.concat([read, table[table["reason"].isna()]], ignore_index=True)
    found = find_duplicates(both, pairs).set_axis(both["isic_id"])
    usable = table["reason"].isna()
    table.loc[usable, ["duplicate_of", "reason"]] = found.loc[table.loc[usable, "isic_id"]].to_numpy()

    both = pd.concat([own, table.assign(group=pd.NA)], ignore_index=True)
    near = neighbours(both, pairs, both["group"]).set_axis(table.index)
    split_of = own[own["split"] != "excluded"].groupby("group")["split"].first()
    for row, touched in near["touches"].items():
        splits = sorted({split_of[group] for group in touched if group in split_of.index})
        if pd.isna(table.loc[row, "reason"]) and (splits if folds else set(splits) - {"train"}):
            table.loc[row, "reason"] = f"leak: grouped with images in {' and '.join(splits)}"
    table["group"] = [
        min(touched, default=piece) for touched, piece in near[["touches", "piece"]].itertuples(index=False)
    ]
    alive = table["reason"].isna()
    table["split"] = np.where(alive, "external", "excluded")
    table["fold"], table["balanced"] = -1, False
    table.loc[alive, "balanced"] = draw_balanced(table[alive], ["split"], seed)
    return table


def assign_splits(table: pd.DataFrame, seed: int = 0, kept: Mapping[str, str] | None = None) -> np.ndarray:
    """train, validation or test for each row of `table` (columns group, target), by SHARES; str [N]."""
    return assign(table["group"], table["target"], SHARES, f"{seed}:split", kept)


def assign_folds(table: pd.DataFrame, folds: int, seed: int = 0, kept: Mapping[str, int] | None = None) -> np.ndarray:
    """The fold 0..folds-1 of each row of `table` (columns group, target), equal shares; int [N]."""
    return assign(table["group"], table["target"], dict.fromkeys(range(folds), 1 / folds), f"{seed}:fold", kept)


def assign(
    group: Sequence[str],
    target: Sequence[int],
    shares: Mapping[Hashable, float],
    seed: Hashable,
    kept: Mapping[str, Hashable] | None = None,
) -> np.ndarray:
    """Deal whole groups out to the parts of `shares`; the part of each row, [N].

    Stratified by class and by images per group (in powers of two): groups with a malignant image are dealt first, large
    before small, and each goes to the part that is furthest behind its share of what has been dealt; never to one that
    has its share of all images already, so that no part exceeds its share by a group or more. While there are only as
    many groups of a class left as parts without an image of it, those parts are served. `kept` fixes some groups.
    """
    table = pd.DataFrame({"group": np.asarray(group, object), "malignant": np.asarray(target, int)})
    count = table.groupby("group")["malignant"].agg(["size", "sum"])
    stratum = np.ceil(np.log2(count["size"])).astype(int) * 2 + (count["sum"] > 0)
    brings = {  # its images by class, and that it is one group of its stratum
        name: {"benign": size - malignant, "malignant": malignant, kind: 1}
        for name, size, malignant, kind in zip(
            count.index, count["size"].tolist(), count["sum"].tolist(), stratum.tolist(), strict=True
        )
    }
    scale = {what: 1.0 for what in stratum} | {what: float(count["size"].mean()) for what in ("benign", "malignant")}
    behind = {part: dict.fromkeys(scale, 0.0) for part in shares}
    room = {part: share * len(table) for part, share in shares.items()}
    holds = {part: dict.fromkeys(scale, 0) for part in shares}
    waiting = {what: sum(facts[what] > 0 for facts in brings.values()) for what in CLASSES}

    def give(name: str, chosen: Hashable) -> None:
        room[chosen] -= brings[name]["benign"] + brings[name]["malignant"]
        for what, number in brings[name].items():
            holds[chosen][what] += number
            for part, share in shares.items():
                behind[part][what] += share * number - (number if part == chosen else 0)
        for what in CLASSES:
            waiting[what] -= brings[name][what] > 0

    parts = {name: part for name, part in (kept or {}).items() if name in brings}
    for name, part in parts.items():
        give(name, part)
    for name in sorted(
        brings.keys() - parts.keys(),
        key=lambda name: (brings[name]["malignant"] == 0, -int(stratum[name]), order_key(seed, name)),
    ):
        candidates = [part for part in shares if room[part] > 1e-9] or list(shares)
        for what in CLASSES:
            without = [part for part in shares if not holds[part][what]]
            if brings[name][what] and without and waiting[what] <= len(without):
                candidates = without
                break
        parts[name] = max(
            candidates,
            key=lambda part: sum(
                number * (behind[part][what] + shares[part] * number) / scale[what] ** 2
                for what, number in brings[name].items()
            ),
        )
        give(name, parts[name])
    return table["group"].map(parts).to_numpy()


def draw_balanced(table: pd.DataFrame, within: Sequence[str], seed: int = 0) -> np.ndarray:
    """As many benign as malignant images within each combination of the columns `within`, bool [N]."""
    chance = [order_key(seed, name) for name in table["isic_id"]]
    order = np.argsort(np.array(chance), kind="stable")
    shuffled = table.iloc[order]
    rank = shuffled.groupby([*within, "target"]).cumcount()
    classes = shuffled.groupby([*within, "target"]).size().unstack("target").reindex(columns=[0, 1]).fillna(0)
    limit = classes.min(axis=1).rename("limit")
    taken = rank.to_numpy() < shuffled.join(limit, on=list(within))["limit"].to_numpy()
    result = np.empty(len(table), bool)
    result[order] = taken
    return result


def order_key(seed: Hashable, name: str) -> bytes:
    """A position in a random order that is the same on every machine."""
    return hashlib.sha256(f"{seed}:{name}".encode()).digest()


def read_kept(path: Path) -> pd.DataFrame:
    """What `plan` keeps: isic_id, split, fold (-1: none) from a data set's folder, its manifest or a list like it."""
    path = Path(path)
    table = read_csv(path / "manifest.csv" if path.is_dir() else path)
    if missing := {"isic_id", "split"} - set(table.columns):
        raise UserError(
            f"{path}: a manifest or list to keep has the columns isic_id and split; no {sorted(missing)[0]}"
        )
    fold = pd.to_numeric(table["fold"] if "fold" in table else pd.Series(-1, table.index), errors="coerce")
    table = pd.DataFrame({"isic_id": table["isic_id"], "split": table["split"], "fold": fold.fillna(-1).astype(int)})
    table = table[table["split"].isin(list(SHARES))]
    repeated = table.loc[table["isic_id"].duplicated(), "isic_id"]
    if len(repeated):
        raise UserError(f"{path}: one id, one row: {shown(repeated)}")
    return table
