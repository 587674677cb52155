"""Whatever the patients, lesions and pairs: no group crosses, the rows' order is nothing, the known stay put."""

import pandas as pd
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from Modules.cli import UserError
from Modules.data.plan import plan, read_kept

NO_PAIRS = pd.DataFrame({"first": [], "second": [], "kind": []}, dtype="str")


def make_table(rows, prefix="I"):
    """Rows of (patient, lesion, target, bytes, external); 0 for an unknown patient or lesion."""
    table = pd.DataFrame(
        {
            "isic_id": [f"{prefix}{number:03d}" for number in range(len(rows))],
            "patient_id": pd.Series([f"P{row[0]}" if row[0] else pd.NA for row in rows], dtype="str"),
            "lesion_id": pd.Series([f"L{row[1]}" if row[1] else pd.NA for row in rows], dtype="str"),
            "target": [row[2] for row in rows],
            "bytes": [row[3] for row in rows],
            "external": [row[4] for row in rows],
        }
    )
    return table.assign(reason=pd.Series(pd.NA, table.index, dtype="str"))


def make_pairs(ends, table):
    ids = table["isic_id"].tolist()
    links = [(ids[one % len(ids)], ids[other % len(ids)]) for one, other in ends if one % len(ids) != other % len(ids)]
    return pd.DataFrame(links, columns=["first", "second"], dtype="str").assign(kind="resized")


row = st.tuples(st.integers(0, 12), st.integers(0, 20), st.integers(0, 1), st.integers(1, 3), st.booleans())
tables = st.lists(row, min_size=1, max_size=40).map(make_table)
ends = st.lists(st.tuples(st.integers(0, 59), st.integers(0, 59)), max_size=12)


def reachable(table, pairs):
    """Group of each id by walking from it: the plain oracle of connected components."""
    links = {name: set() for name in table["isic_id"]}
    for one, other in zip(pairs["first"], pairs["second"], strict=True):
        links[one].add(other)
        links[other].add(one)
    for key in ("patient_id", "lesion_id"):
        for _, same in table.groupby(key)["isic_id"]:
            for name in same:
                links[name].update(same)
    groups = {}
    for start in sorted(links):
        waiting = [start]
        while waiting:
            name = waiting.pop()
            if name not in groups:
                groups[name] = start
                waiting.extend(links[name])
    return groups


def assert_no_leak(result, pairs, folds):
    """No link of any kind between used images of two sides (external is training), nor between two folds."""
    used = result[result["split"] != "excluded"].set_index("isic_id")
    side = used["split"].replace("external", "train")
    inside = used[~used["external"]]
    for key in ("patient_id", "lesion_id", "group"):
        assert (side.groupby(used[key]).nunique() <= 1).all()
        if folds:
            assert (inside["fold"].groupby(inside[key]).nunique() <= 1).all()
    for one, other in zip(pairs["first"], pairs["second"], strict=True):
        assert one not in used.index or other not in used.index, "two copies of one picture are used"


@settings(max_examples=60, deadline=None)
@given(tables, ends, st.integers(0, 3), st.sampled_from([0, 2, 5]))
def test_any_table_is_split_without_a_leak(table, links, seed, folds):
    pairs = make_pairs(links, table)
    result = plan(table, pairs, seed, folds)
    assert result["isic_id"].tolist() == sorted(table["isic_id"])
    assert_no_leak(result, pairs, folds)

    own = result[~result["external"]]
    of_own = pairs[pairs["first"].isin(own["isic_id"]) & pairs["second"].isin(own["isic_id"])]
    groups = reachable(own, of_own)
    assert own["group"].tolist() == [groups[name] for name in own["isic_id"]]

    excluded = result["split"] == "excluded"
    assert (excluded == result["reason"].notna()).all()
    assert set(result.loc[~excluded & ~result["external"], "split"]) <= {"train", "validation", "test"}
    assert (result.loc[~excluded & result["external"], "split"] == "external").all()
    assert (result["fold"] >= 0).tolist() == (~excluded & ~result["external"] & (folds > 0)).tolist()
    assert result["fold"].max() < max(folds, 1)

    for columns in (["split"], ["fold"]):
        drawn = result[result["balanced"] & (result["fold"] >= 0 if columns == ["fold"] else True)]
        assert (drawn.groupby(columns)["target"].mean() == 0.5).all()
    assert not result.loc[excluded, "balanced"].any()


@settings(max_examples=30, deadline=None)
@given(tables, ends, st.integers(0, 3), st.randoms(use_true_random=False))
def test_the_outcome_depends_on_neither_row_order_nor_pair_order(table, links, seed, random):
    pairs = make_pairs(links, table)
    order, pair_order = list(table.index), list(pairs.index)
    random.shuffle(order)
    random.shuffle(pair_order)
    swapped = pairs.loc[pair_order].rename(columns={"first": "second", "second": "first"})
    first = plan(table, pairs, seed, 3)
    second = plan(table.loc[order], swapped, seed, 3)
    pd.testing.assert_frame_equal(first, second)


@settings(max_examples=40, deadline=None)
@given(tables, ends)
def test_the_sources_own_split_is_the_same_with_and_without_external_sets(table, links):
    pairs = make_pairs(links, table)
    together = plan(table, pairs, folds=2)
    alone = plan(table[~table["external"]], pairs, folds=2)
    pd.testing.assert_frame_equal(
        together[~together["external"]].reset_index(drop=True)[list(alone.columns)], alone, check_dtype=False
    )


@settings(max_examples=60, deadline=None)
@given(tables, ends, ends, st.sampled_from([0, 3]), st.integers(1, 60))
def test_kept_images_never_move(table, links, more_links, folds, known):
    """The first `known` rows are split; then the rest arrive, with new links among old and new alike."""
    table["external"] = False
    former = table.iloc[:known]
    pairs = make_pairs(links, former)
    kept = plan(former, pairs, folds=folds)
    assume(not folds or kept["fold"].max() == folds - 1)
    pairs = pd.concat([pairs, make_pairs(more_links, table)], ignore_index=True)
    result = plan(table, pairs, seed=7, folds=folds, kept=kept)
    assert_no_leak(result, pairs, folds)
    before = kept[kept["split"] != "excluded"].set_index("isic_id")
    after = result.set_index("isic_id").loc[before.index]
    stayed = after["split"] != "excluded"
    assert (after["split"] == before["split"])[stayed].all()
    assert (after["fold"] == before["fold"])[stayed].all()
    # What left did so only as a copy of another kept image, or for a contradicting label.
    left = after.loc[~stayed, "reason"].str.split(":").str[0]
    assert set(left) <= {"duplicate", "contradicting labels"}
    assert set(after["duplicate_of"].dropna()) <= set(before.index)


def test_new_images_that_would_tie_kept_splits_are_left_out():
    """Patients P1 (train) and P2 (test) are known; a new patient's two images show one of each."""
    table = make_table([(1, 0, 0, 1, False), (2, 0, 0, 1, False), (3, 0, 0, 1, False), (3, 0, 0, 1, False)])
    kept = pd.DataFrame({"isic_id": ["I000", "I001"], "split": ["train", "test"], "fold": -1})
    pairs = make_pairs([(0, 2), (1, 3)], table)
    result = plan(table, pairs, kept=kept).set_index("isic_id")
    assert result["split"].tolist() == ["train", "test", "excluded", "excluded"]
    assert result.loc["I002", "duplicate_of"] == "I000"
    bridge = make_table([(1, 0, 0, 1, False), (2, 9, 0, 1, False), (1, 9, 0, 1, False), (0, 0, 0, 1, False)])
    result = plan(bridge, NO_PAIRS, kept=kept).set_index("isic_id")
    assert result.loc["I002", ["split", "reason"]].tolist() == ["excluded", "leak: it would tie kept splits together"]
    assert result.loc["I003", "split"] != "excluded"


def test_of_two_kept_copies_the_tested_one_stays():
    """The new file is the largest, the one in test the smallest: size doesn't move what is kept."""
    table = make_table([(1, 0, 0, 2, False), (2, 0, 0, 1, False), (3, 0, 0, 3, False), (1, 0, 0, 1, False)])
    kept = pd.DataFrame({"isic_id": ["I000", "I001", "I003"], "split": ["train", "test", "train"], "fold": -1})
    result = plan(table, make_pairs([(0, 1), (1, 2)], table), kept=kept).set_index("isic_id")
    assert result["split"].tolist() == ["excluded", "test", "excluded", "train"]
    assert result.loc[["I000", "I002"], "duplicate_of"].tolist() == ["I001", "I001"]


def test_kept_images_of_one_patient_on_two_sides_are_an_error():
    table = make_table([(1, 0, 0, 1, False), (1, 0, 0, 1, False)])
    kept = pd.DataFrame({"isic_id": ["I000", "I001"], "split": ["train", "test"], "fold": -1})
    with pytest.raises(UserError, match="that of I000 into test and train"):
        plan(table, NO_PAIRS, kept=kept)


def test_kept_folds_are_kept_only_where_there_are_as_many():
    table = make_table([(patient, 0, patient % 2, 1, False) for patient in range(1, 13)])
    kept = plan(table, NO_PAIRS, folds=3)
    again = plan(table, NO_PAIRS, seed=1, folds=3, kept=kept)
    assert again["fold"].tolist() == kept["fold"].tolist()
    assert (plan(table, NO_PAIRS, folds=0, kept=kept)["fold"] == -1).all()
    assert set(plan(table, NO_PAIRS, folds=4, kept=kept.assign(fold=-1))["fold"]) == {0, 1, 2, 3}
    with pytest.raises(UserError, match="has 3 folds"):
        plan(table, NO_PAIRS, folds=4, kept=kept)


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        (
            "isic_id,split,fold\nA,train,0\nB,test,1\nC,excluded,-1\nD,external,-1\n",
            [("A", "train", 0), ("B", "test", 1)],
        ),
        ("isic_id,split\nA,train\n", [("A", "train", -1)]),
        ("split;isic_id\nvalidation;A\n", [("A", "validation", -1)]),
    ],
)
def test_what_is_kept_is_read_from_a_list_a_manifest_or_a_folder(text, rows, tmp_path):
    (tmp_path / "manifest.csv").write_text(text)
    for path in (tmp_path, tmp_path / "manifest.csv"):
        kept = read_kept(path)
        assert list(kept.itertuples(index=False, name=None)) == rows


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("isic_id,fold\nA,0\n", "no column split"),
        ("isic_id,split\nA,excluded\n", "no image of"),
        ("isic_id,split,fold\nA,train,0\nB,train,\n", "only some of them"),
        ("isic_id,split,fold\nA,train,0\nB,train,0.5\n", "only some of them"),
        ("isic_id,split\nA,train\nA,test\n", "one id, one row: A"),
    ],
)
def test_a_list_that_cannot_be_kept_is_refused(text, word, tmp_path):
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(UserError, match=word):
        read_kept(tmp_path / "list.csv")
