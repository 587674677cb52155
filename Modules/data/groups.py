"""Which images belong together: a connected component of same patient, same lesion and same picture."""

import numpy as np
import pandas as pd
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

KEYS = ("patient_id", "lesion_id", "picture")  # columns whose equal values keep images together; NA equals nothing


def group_ids(table: pd.DataFrame) -> np.ndarray:
    """The group of each row of `table` (isic_id and KEYS), str [N]: the smallest isic_id in its connected component."""
    links = [_star(table[key]) for key in KEYS]
    label = _components(len(table), *(np.concatenate(ends) for ends in zip(*links, strict=True)))
    return table["isic_id"].groupby(label).transform("min").to_numpy(dtype=object)


def pictures(table: pd.DataFrame, pairs: pd.DataFrame) -> pd.Series:
    """The picture that each row of `table` shows, named by the smallest id that shows it; NA where no other row does.

    `pairs`: ids (`first`, `second`) of the same picture; those that are not in the table are passed over.
    """
    row = pd.Series(np.arange(len(table)), index=table["isic_id"].to_numpy(dtype=object))
    ends = np.stack([row.reindex(pairs[side].to_numpy(dtype=object)).to_numpy(float) for side in ("first", "second")])
    label = _components(len(table), *ends[:, ~np.isnan(ends).any(axis=0)].astype(int))
    several = np.bincount(label, minlength=1)[label] > 1
    return table["isic_id"].groupby(label).transform("min").where(several)


def equal_pairs(table: pd.DataFrame, column: str, kind: str) -> pd.DataFrame:
    """Pairs of ids (`first`, `second`) whose `column` is the same; each row with the first of its value."""
    one, other = _star(table[column])
    ids = table["isic_id"].to_numpy(dtype=object)
    return pd.DataFrame({"first": ids[other], "second": ids[one]})[one != other].assign(kind=kind)


def find_duplicates(table: pd.DataFrame, pairs: pd.DataFrame) -> pd.DataFrame:
    """The rows of `table` that repeat another's `picture`: columns `duplicate_of` (an id) and `reason`.

    Of a picture's rows the first by `rank` stays. Where their targets contradict each other none stays, except those
    that are `settled`: they are never taken out. `pairs` says what `kind` of copy it is.
    """
    kinds = {}
    for one, other, kind in pairs[["first", "second", "kind"]].itertuples(index=False):
        kinds.setdefault(frozenset((one, other)), kind)
    copies: dict[str, list] = {}
    for row in table[table["picture"].notna()].itertuples():
        copies.setdefault(row.picture, []).append(row)
    found = {}
    for rows in copies.values():
        kept = min(rows, key=lambda row: (not row.settled, row.rank))
        contradiction = not kept.settled and len({row.target for row in rows}) > 1
        for row in rows:
            if contradiction:
                other = min(other.isic_id for other in rows if other.target != row.target)
                found[row.Index] = pd.NA, f"contradicting labels: the same picture as {other}"
            elif row is not kept and not row.settled:
                kind = kinds.get(frozenset((row.isic_id, kept.isic_id)), "by way of another copy")
                found[row.Index] = kept.isic_id, f"duplicate: {kind}"
    return pd.DataFrame(found.values(), index=list(found), columns=["duplicate_of", "reason"], dtype="str")


def neighbours(table: pd.DataFrame, place: pd.Series) -> pd.DataFrame:
    """What the rows without a place (NA in `place`) are linked to: columns `piece` (their group among themselves) and
    `touches` (frozenset of the places that any row of the piece is linked to by KEYS), one row each.
    """
    loose, fixed = table[place.isna()], table[place.notna()]
    piece = pd.Series(group_ids(loose), loose.index)
    touches = {name: set() for name in piece}
    for key in KEYS:
        places = place[place.notna()].groupby(fixed[key]).agg(set).to_dict()
        for name, value in zip(piece, loose[key], strict=True):
            if value in places:
                touches[name] |= places[value]
    return pd.DataFrame({"piece": piece, "touches": [frozenset(touches[name]) for name in piece]}, loose.index)


def _star(values: pd.Series) -> tuple[np.ndarray, np.ndarray]:
    """Links (rows, rows) from each row with a value to the first row that has it."""
    codes = pd.factorize(values)[0]
    rows = np.flatnonzero(codes >= 0)
    _, first, inverse = np.unique(codes[rows], return_index=True, return_inverse=True)
    return rows, rows[first][inverse] if len(rows) else rows


def _components(size: int, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The number of the connected component of each node, int [size]."""
    links = coo_matrix((np.ones(len(first), bool), (first, second)), shape=(size, size))
    return connected_components(links, directed=False)[1]
