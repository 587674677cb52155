"""Who belongs together, who repeats whom, and whom the rest is linked to."""

import pandas as pd

from Modules.data.groups import equal_pairs, find_duplicates, group_ids, neighbours, pictures


def table(**columns):
    size = len(columns["isic_id"])
    defaults = {
        name: pd.Series([pd.NA] * size, dtype="str") for name in ("patient_id", "lesion_id", "picture", "sha256")
    }
    return pd.DataFrame({**defaults, "target": 0, "rank": range(size), "settled": False, **columns})


def pairs(*rows):
    return pd.DataFrame(rows, columns=["first", "second", "kind"], dtype="str")


def test_groups_are_chains_of_any_link():
    """A and B share a patient, B and C a lesion, C and D a picture; E is alone."""
    chain = table(
        isic_id=list("EDCBA"),
        patient_id=[pd.NA, pd.NA, "Q", "P", "P"],
        lesion_id=["M", pd.NA, "L", "L", pd.NA],
        picture=[pd.NA, "C", "C", pd.NA, pd.NA],
    )
    assert group_ids(chain).tolist() == ["E", "A", "A", "A", "A"]
    assert group_ids(chain[:0]).tolist() == []


def test_pictures_are_chains_of_pairs():
    listed = table(isic_id=list("ABCDE"))
    links = pairs(("B", "D", "x"), ("D", "E", "x"), ("A", "unknown", "x"))
    assert pictures(listed, links).fillna("-").tolist() == ["-", "B", "-", "B", "B"]
    assert pictures(listed, pairs()).isna().all()


def test_identical_files_are_pairs_and_unread_ones_are_not():
    listed = table(isic_id=list("ABCDE"), sha256=["x", pd.NA, "x", pd.NA, "x"])
    assert equal_pairs(listed, "sha256", "same")[["first", "second"]].to_numpy().tolist() == [["A", "C"], ["A", "E"]]


def test_the_first_by_rank_stays():
    copies = table(isic_id=list("ABC"), picture=["A"] * 3, rank=[2, 0, 1])
    found = find_duplicates(copies, pairs(("A", "B", "official"), ("A", "C", "resized"), ("B", "A", "cropped")))
    assert found.to_numpy().tolist() == [["B", "duplicate: official"], ["B", "duplicate: by way of another copy"]]
    assert found.index.tolist() == [0, 2]


def test_contradicting_labels_leave_none_unless_one_is_settled():
    copies = table(isic_id=list("ABC"), picture=["A"] * 3, target=[0, 1, 1])
    found = find_duplicates(copies, pairs())
    assert found["duplicate_of"].isna().all()
    assert [reason.split()[-1] for reason in found["reason"]] == ["B", "A", "A"]
    copies["settled"] = [False, False, True]
    found = find_duplicates(copies, pairs())
    assert found["duplicate_of"].to_dict() == {0: "C", 1: "C"}


def test_neighbours_are_found_through_others_without_a_place():
    """A is in test; B is A's patient, C shares a lesion with B; D shows E's picture; F is alone."""
    rows = table(
        isic_id=list("ABCDEF"),
        patient_id=["P", "P", pd.NA, pd.NA, pd.NA, pd.NA],
        lesion_id=[pd.NA, "L", "L", pd.NA, pd.NA, pd.NA],
        picture=[pd.NA, pd.NA, pd.NA, "D", "D", pd.NA],
    )
    place = pd.Series(["test", pd.NA, pd.NA, pd.NA, "train", pd.NA], dtype="str")
    near = neighbours(rows, place)
    assert near["piece"].tolist() == ["B", "B", "D", "F"]
    assert [sorted(touched) for touched in near["touches"]] == [["test"], ["test"], ["train"], []]
