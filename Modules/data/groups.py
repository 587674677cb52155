"""Which images belong together: a connected component of same patient, same lesion and duplicate picture."""

import numpy as np
import pandas as pd
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

KEYS = ("patient_id", "lesion_id")  # columns whose equal values keep images together


def group_ids(table: pd.DataFrame, pairs: pd.DataFrame) -> np.ndarray:
    """The group of each row of `table`, str [N]: the smallest isic_id in its connected component.

    Rows are linked by equal values in KEYS (NA equals nothing) and by `pairs` (ids in columns `first`, `second`; ids
    that are not in the table are passed over).
    """
    ends = [_positions(table, pairs), *(_star(table[key]) for key in KEYS)]
    label = _components(len(table), *(np.concatenate(side) for side in zip(*ends, strict=True)))
    return table["isic_id"].groupby(label).transform("min").to_numpy(dtype=object)


def identical_pairs(table: pd.DataFrame) -> pd.DataFrame:
    """Pairs of ids (`first`, `second`) whose files are the same byte for byte, by `sha256` (NA or empty: unread)."""
    one, other = _star(table["sha256"].where(table["sha256"] != ""))
    ids = table["isic_id"].to_numpy(dtype=object)
    return pd.DataFrame({"first": ids[other], "second": ids[one]})[one != other].assign(kind="byte-identical")


def find_duplicates(table: pd.DataFrame, pairs: pd.DataFrame) -> pd.DataFrame:
    """Which rows of `table` repeat another's picture: columns `duplicate_of` (an id) and `reason`, NA where none.

    `pairs`: ids in `first`, `second`, and `kind`, a word. Of a picture's rows the first by `table["rank"]` stays. Where
    their targets contradict each other none stays, except those that are `table["settled"]`: they are never taken out.
    """
    result = pd.DataFrame({"duplicate_of": pd.NA, "reason": pd.NA}, index=table.index, dtype="str")
    label = pd.Series(_components(len(table), *_positions(table, pairs)), table.index)
    several = label[label.duplicated(keep=False)]
    kinds = {}
    for one, other, kind in pairs[["first", "second", "kind"]].itertuples(index=False):
        kinds.setdefault(frozenset((one, other)), kind)
    for _, rows in table.loc[several.index].groupby(several, sort=False):
        rows = rows.sort_values(["settled", "rank"], ascending=[False, True])
        kept = rows.iloc[0]
        contradiction = rows["target"].nunique() > 1 and not kept["settled"]
        for row in rows.index[~rows["settled"].astype(bool)]:
            name = rows.loc[row, "isic_id"]
            if contradiction:
                other = rows.loc[rows["target"] != rows.loc[row, "target"], "isic_id"].iloc[0]
                result.loc[row, "reason"] = f"contradicting labels: the same picture as {other}"
            elif name != kept["isic_id"]:
                kind = kinds.get(frozenset((name, kept["isic_id"])), "by way of another")
                result.loc[row] = kept["isic_id"], f"duplicate: {kind}"
    return result


def neighbours(table: pd.DataFrame, pairs: pd.DataFrame, place: pd.Series) -> pd.DataFrame:
    """What the rows without a place (NA in `place`) are linked to, for those rows: `piece` (their group among
    themselves) and `touches` (the frozenset of the places that any row of the piece is linked to).
    """
    loose = table[place.isna()]
    fixed = table[place.notna()]
    home = place[place.notna()]
    piece = pd.Series(group_ids(loose, pairs), loose.index)
    links = [
        (piece[loose[key].notna()], loose[key].dropna(), home.groupby(fixed[key]).agg(set))  # NA keys fall out
        for key in KEYS
    ]
    by_id, home_by_id = piece.set_axis(loose["isic_id"]), home.set_axis(fixed["isic_id"]).map(lambda value: {value})
    for one, other in (("first", "second"), ("second", "first")):
        crossing = pairs[pairs[one].isin(by_id.index) & pairs[other].isin(home_by_id.index)]
        links.append((by_id.loc[crossing[one]], crossing[other], home_by_id))
    touches: dict[str, set] = {}
    for pieces, keys, places in links:
        for name, key in zip(pieces, keys, strict=True):
            if key in places.index:
                touches.setdefault(name, set()).update(places[key])
    return pd.DataFrame({"piece": piece, "touches": [frozenset(touches.get(name, ())) for name in piece]}, loose.index)


def _positions(table: pd.DataFrame, pairs: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """The rows that `pairs` of ids stand in, where both are in the table."""
    row = pd.Series(np.arange(len(table)), index=table["isic_id"].to_numpy(dtype=object))
    first, second = (row.reindex(pairs[side].to_numpy(dtype=object)).to_numpy(float) for side in ("first", "second"))
    both = ~(np.isnan(first) | np.isnan(second))
    return first[both].astype(int), second[both].astype(int)


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
