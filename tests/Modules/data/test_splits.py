"""Shares, classes and images per group come out as asked; the same seed gives the same on any machine."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from Modules.data.splits import SHARES, assign, assign_folds, assign_splits, draw_balanced


def patients(count: int, seed: int = 0, malignant: float = 0.02) -> pd.DataFrame:
    """A table of groups as uneven as the challenge's: 1 to some 100 images each, few of them malignant."""
    rng = np.random.default_rng(seed)
    sizes = np.minimum(1 + rng.exponential(15, count).astype(int), 115)
    group = np.repeat([f"G{number:05d}" for number in range(count)], sizes)
    return pd.DataFrame(
        {
            "isic_id": [f"I{number:06d}" for number in range(len(group))],
            "group": group,
            "target": (rng.random(len(group)) < malignant).astype(int),
        }
    )


groups = st.lists(
    st.tuples(st.integers(0, 8), st.integers(0, 8)).filter(lambda sizes: sum(sizes)), min_size=1, max_size=40
)


@settings(max_examples=150, deadline=None)
@given(groups, st.integers(0, 5), st.sampled_from([SHARES, {0: 0.5, 1: 0.5}, dict.fromkeys(range(5), 0.2)]))
def test_no_group_is_torn_and_no_share_missed_by_more_than_a_few_groups(sizes, seed, shares):
    group = np.repeat([f"G{n}" for n in range(len(sizes))], [sum(size) for size in sizes])
    target = np.concatenate([[0] * benign + [1] * malignant for benign, malignant in sizes])
    parts = pd.Series(assign(group, target, shares, seed))
    assert (parts.groupby(group).nunique() == 1).all()
    largest = max(map(sum, sizes))
    for part, share in shares.items():
        # A group beyond the share, and one more for each class that the part would else be without.
        assert (parts == part).sum() < share * len(group) + 3 * largest
    for label in (0, 1):
        holding = pd.Series(group)[target == label].nunique()
        assert parts[target == label].nunique() == min(holding, len(shares)) or any(
            benign and malignant for benign, malignant in sizes
        )


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("shares", [SHARES, dict.fromkeys(range(5), 0.2)], ids=["splits", "folds"])
def test_a_large_table_is_split_evenly_in_every_respect(seed, shares):
    table = patients(1500)
    table["part"] = assign(table["group"], table["target"], shares, seed)
    share = pd.Series(shares)
    images = table.groupby("part").size() / len(table)
    malignant = table.groupby("part")["target"].sum() / table["target"].sum()
    patients_each = table.groupby("part")["group"].nunique() / table["group"].nunique()
    for fraction, tolerance in ((images, 0.005), (malignant, 0.04), (patients_each, 0.06)):
        assert (abs(fraction / share - 1) < tolerance).all()
    large = table[table.groupby("group")["group"].transform("size") > 32]
    assert (abs(large.groupby("part")["group"].nunique() / large["group"].nunique() - share) < 0.02).all()


def test_three_malignant_groups_suffice_for_three_splits():
    group = [f"G{n:02d}" for n in range(30)]
    target = [1, 1, 1] + [0] * 27
    for seed in range(10):
        parts = assign(group, target, SHARES, seed)
        assert set(parts[:3]) == set(SHARES)


def test_seeds_differ_and_folds_are_not_the_splits():
    table = patients(200)
    first, again, other = (assign_splits(table, seed) for seed in (0, 0, 1))
    assert (first == again).all()
    assert 0.3 < (first == other).mean() < 0.8
    folds = assign_folds(table, 3, seed=0)
    together = pd.crosstab(first, folds, normalize="index")
    assert together.loc["train"].between(0.2, 0.5).all()


def test_the_outcome_is_known():
    """The hash of seed and name decides: pinned, so that no change of library or machine moves an image unseen."""
    table = patients(12, malignant=0.3).groupby("group", as_index=False).first()
    assert "".join(split[:2] for split in assign_splits(table, seed=0)) == "trtrtrtrtetetrtetrtrtrva"


def test_kept_groups_stay_and_the_others_make_up_for_them():
    table = patients(300)
    names = table["group"].unique()
    kept = dict.fromkeys(names[:30], "test")  # half of the test split's share, from one corner of the data
    parts = pd.Series(assign_splits(table, 0, kept), table["group"])
    assert (parts[names[:30]] == "test").all()
    assert abs((parts == "test").mean() - 0.2) < 0.01


def test_balanced_sets_hold_as_many_of_both_classes():
    table = patients(100, malignant=0.2).assign(split=lambda table: assign_splits(table))
    drawn = draw_balanced(table, ["split"], seed=3)
    rows = table[drawn].groupby("split")["target"].agg(["size", "sum"])
    assert (rows["size"] == 2 * rows["sum"]).all()
    assert (rows["sum"] == table.groupby("split")["target"].sum()).all()
    shuffled = table.sample(frac=1, random_state=0)
    assert set(shuffled.loc[draw_balanced(shuffled, ["split"], seed=3), "isic_id"]) == set(table.loc[drawn, "isic_id"])
    assert not draw_balanced(table[table["target"] == 0], ["split"]).any()
    assert draw_balanced(table[:0], ["split"]).shape == (0,)


def test_one_more_image_hardly_changes_the_balanced_set():
    table = patients(50, malignant=0.1).assign(split="train")
    more = pd.concat([table, table[:1].assign(isic_id="J", target=0)], ignore_index=True)
    before = set(table.loc[draw_balanced(table, ["split"]), "isic_id"])
    after = set(more.loc[draw_balanced(more, ["split"]), "isic_id"])
    assert len(before ^ after) <= 2
