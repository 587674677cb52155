"""Where each listed image goes, and why: duplicates out, groups to splits and folds, the 50/50 set drawn."""

from pathlib import Path

import numpy as np
import pandas as pd

from Modules.cli import UserError
from Modules.data.groups import find_duplicates, group_ids, neighbours, pictures
from Modules.data.metadata import read_csv, shown
from Modules.data.splits import SHARES, assign_folds, assign_splits, draw_balanced

PRECEDENCE = {"test": 0, "validation": 1, "train": 2}  # which of two kept copies stays: the one others compare by


def plan(
    table: pd.DataFrame, pairs: pd.DataFrame, seed: int = 0, folds: int = 0, kept: pd.DataFrame | None = None
) -> pd.DataFrame:
    """`table` sorted by id, with the columns group, split, balanced, fold, duplicate_of and reason of the manifest.

    `table`: isic_id (unique), patient_id, lesion_id, target, bytes, external (bool), reason (NA: usable).
    `pairs`: ids in `first`, `second` that show the same picture, `kind` a word. Its larger file stays, ties by id.

    The source's own images are placed as if there were no external ones; these go to training unless their group holds
    an image of validation or test, or with folds any image of the source.

    `kept` (isic_id, split, fold): an earlier outcome. Its images stay where they were and new images of their groups
    join them; new images that would tie two of its splits or folds together are left out. Where two of its images turn
    out to show one picture, the one in test stays before validation before training. Raises UserError where it puts one
    patient or lesion on two sides.
    """
    table = table.sort_values("isic_id", ignore_index=True)
    table["duplicate_of"] = pd.Series(pd.NA, table.index, dtype="str")
    own = _place_own(table[~table["external"]].reset_index(drop=True), pairs, seed, folds, kept)
    if not table["external"].any():
        return own
    external = _place_external(table[table["external"]], own, pairs, seed, folds)
    return pd.concat([own, external]).sort_values("isic_id", ignore_index=True)


def read_kept(path: Path) -> pd.DataFrame:
    """What `plan` keeps: isic_id, split, fold (-1: none) from a data set's folder, its manifest or a list like it."""
    path = Path(path)
    table = read_csv(path / "manifest.csv" if path.is_dir() else path)
    if missing := {"isic_id", "split"} - set(table.columns):
        raise UserError(f"{path}: no column {min(missing)}; a manifest or list to keep has isic_id and split")
    table = table[table["split"].isin(list(SHARES))]
    fold = pd.to_numeric(table["fold"] if "fold" in table else pd.Series(-1, table.index), errors="coerce")
    fold = fold.where(fold == fold.round(), -1).astype(int)
    if table.empty or (fold >= 0).any() != (fold >= 0).all():
        raise UserError(f"{path}: no image of {', '.join(SHARES)} to keep, or only some of them with a fold")
    if len(repeated := table.loc[table["isic_id"].duplicated(), "isic_id"]):
        raise UserError(f"{path}: one id, one row: {shown(repeated)}")
    return table[["isic_id", "split"]].assign(fold=fold)


def _place_own(
    table: pd.DataFrame, pairs: pd.DataFrame, seed: int, folds: int, kept: pd.DataFrame | None
) -> pd.DataFrame:
    home = _homes(table, folds, kept)
    table["picture"] = pictures(table, pairs)
    precedence = home.map(lambda place: PRECEDENCE[place.split("/")[0]], na_action="ignore").astype(float).fillna(3)
    table = _leave_out_duplicates(_ranked(table, precedence), pairs)

    near = neighbours(table, home)
    bridges = near.index[near["touches"].map(len) > 1]
    free = table["reason"].isna()
    table["reason"] = table["reason"].mask(free & table.index.isin(bridges), "leak: it would tie kept splits together")
    # A picture on two kept sides links nothing: all but one of its copies were left out above.
    torn = home.groupby(table["picture"]).nunique()
    linked = table.assign(picture=table["picture"].mask(table["picture"].isin(torn.index[torn > 1]))).drop(bridges)
    table["group"] = near["piece"].reindex(table.index)
    table.loc[linked.index, "group"] = group_ids(linked)
    splits, numbers = _homes_of_groups(table["group"], home)

    alive = table["reason"].isna()
    table["split"], table["fold"], table["balanced"] = "excluded", -1, False
    table.loc[alive, "split"] = assign_splits(table[alive], seed, splits)
    if folds:
        table.loc[alive, "fold"] = assign_folds(table[alive], folds, seed, numbers)
    table.loc[alive, "balanced"] = draw_balanced(table[alive], ["split", "fold"], seed)
    return table


def _homes(table: pd.DataFrame, folds: int, kept: pd.DataFrame | None) -> pd.Series:
    """Where each row was before: "test", or "test/3" where folds are kept too; NA for what is new."""
    if kept is None:
        return pd.Series(pd.NA, table.index, dtype="str")
    kept = kept[kept["split"].isin(list(SHARES))]
    home = kept.set_index("isic_id")["split"]
    if folds and kept["fold"].max() >= 0:
        if kept["fold"].max() + 1 != folds:
            raise UserError(f"what --keep names has {kept['fold'].max() + 1} folds: give --folds that number, or 0")
        home = home + "/" + kept.set_index("isic_id")["fold"].astype("str")
    return home.reindex(table["isic_id"]).set_axis(table.index)


def _homes_of_groups(groups: pd.Series, home: pd.Series) -> tuple[dict[str, str], dict[str, int]]:
    """The kept split and the kept fold of each group that has one."""
    homes = home.dropna().groupby(groups).agg(lambda places: sorted(set(places)))
    if len(torn := homes[homes.map(len) > 1]):
        raise UserError(
            "what --keep names was made from other patients or lesions; it puts one group on several sides: "
            + shown(f"that of {name} into {' and '.join(sides)}" for name, sides in torn.items())
        )
    parts = {group: sides[0].split("/") for group, sides in homes.items()}
    return (
        {group: part[0] for group, part in parts.items()},
        {group: int(part[1]) for group, part in parts.items() if len(part) > 1},
    )


def _place_external(table: pd.DataFrame, own: pd.DataFrame, pairs: pd.DataFrame, seed: int, folds: int) -> pd.DataFrame:
    both = pd.concat([own, table], ignore_index=True)
    both["picture"] = pictures(both, pairs)
    both = _leave_out_duplicates(_ranked(both, both["reason"].notna(), settled=~both["external"]), pairs)

    near = neighbours(both, both["group"])
    splits = both[both["split"] != "excluded"].groupby("group")["split"].first().to_dict()
    sides = near["touches"].map(lambda groups: sorted({splits[group] for group in groups if group in splits}))
    leaks = sides.map(lambda sides: bool(sides) if folds else bool(set(sides) - {"train"}))
    table = both[both["external"]].copy()
    table["group"] = [min(groups, default=piece) for piece, groups in near.itertuples(index=False)]
    told = "leak: grouped with images of " + sides.str.join(" and ")
    table["reason"] = table["reason"].mask(leaks & table["reason"].isna(), told)
    alive = table["reason"].isna()
    table["split"], table["fold"], table["balanced"] = np.where(alive, "external", "excluded"), -1, False
    table.loc[alive, "balanced"] = draw_balanced(table[alive], ["split"], seed)
    return table


def _ranked(table: pd.DataFrame, precedence: pd.Series, settled: pd.Series | bool = False) -> pd.DataFrame:
    """With `rank`, the order in which copies of a picture are preferred: `precedence`, then larger files, then ids."""
    return table.assign(rank=np.lexsort((table["isic_id"], -table["bytes"], precedence)).argsort(), settled=settled)


def _leave_out_duplicates(table: pd.DataFrame, pairs: pd.DataFrame) -> pd.DataFrame:
    """With `duplicate_of` and `reason` filled in for what repeats another image."""
    table = table.copy()
    open_to = table["reason"].isna() | table["settled"]
    found = find_duplicates(table[open_to], pairs)
    table.loc[found.index, ["duplicate_of", "reason"]] = found
    return table
