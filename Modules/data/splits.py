"""Which part of the data each group of images goes to: stratified, reproducible, and never a group in two parts.

All randomness is a hash of seed and name, so the outcome depends on neither the rows' order nor the machine.
"""

import hashlib
from collections.abc import Hashable, Mapping, Sequence

import numpy as np
import pandas as pd

SHARES = {"train": 0.7, "validation": 0.1, "test": 0.2}
CLASSES = ("malignant", "benign")


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
    stratum, brings = {}, {}  # of each group: its images by class, and that it is one of its stratum
    for name, size, malignant in count.itertuples():
        stratum[name] = (malignant > 0, (size - 1).bit_length())
        brings[name] = {"benign": size - malignant, "malignant": malignant, stratum[name]: 1}
    scale = dict.fromkeys(stratum.values(), 1.0)  # what one group brings on average, so that all weigh alike
    for what in CLASSES:
        numbers = [facts[what] for facts in brings.values() if facts[what]]
        scale[what] = sum(numbers) / max(len(numbers), 1)
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
        key=lambda name: (not stratum[name][0], -stratum[name][1], order_key(seed, name)),
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
                if number
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
