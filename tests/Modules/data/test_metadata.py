"""Tables are read however they are written; what is wrong with one is named by row and column."""

import os
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from Modules.cli import UserError
from Modules.data.metadata import (
    COLUMNS,
    DUPLICATES,
    find_pictures,
    read_duplicates,
    read_metadata,
    read_official,
    read_sources,
    same_ids,
)
from tests.Modules.data import malformed

SHARED = Path(__file__).parents[4] / "shared"
BROKEN, ODD = malformed.broken_tables(), malformed.odd_tables()
ABOUT_PICTURES = {"other-ids", "one-class", "one-patient", "most-absent"}  # wrong only beside the pictures


def write(folder: Path, table: str | bytes, name: str = "train-metadata.csv") -> Path:
    path = folder / name
    path.write_bytes(table if isinstance(table, bytes) else table.encode())
    return path


def write_pictures(folder: Path, names) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"")


@pytest.mark.parametrize("name", sorted(BROKEN.keys() - ABOUT_PICTURES))
def test_a_broken_table_is_refused_in_one_line(name, tmp_path):
    table, word = BROKEN[name]
    write(tmp_path, table)
    with pytest.raises(UserError) as error:
        read_metadata(tmp_path)
    assert word in str(error.value)
    assert "train-metadata.csv" in str(error.value)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("name", ODD)
def test_a_table_is_the_same_however_it_is_written(name, tmp_path):
    write(tmp_path, malformed.PLAIN_TABLE)
    plain = read_metadata(tmp_path)
    assert list(plain.columns) == list(COLUMNS)
    assert plain["target"].tolist() == [0, 1] * 12
    assert plain["target"].dtype == "int64"
    assert plain["patient_id"].tolist() == [f"P{row // 2}" for row in range(24)]
    write(tmp_path, ODD[name])
    pd.testing.assert_frame_equal(read_metadata(tmp_path), plain)


def test_optional_columns_become_missing_values(tmp_path):
    write(tmp_path, "isic_id,target,age_approx,sex\nA,0,45.0,male\nB,1,,\nC,1,85+,unknown\n")
    table = read_metadata(tmp_path)
    assert table["age_approx"].fillna(-1).tolist() == [45, -1, -1]
    assert table["sex"].fillna("-").tolist() == ["male", "-", "unknown"]
    assert table[["patient_id", "lesion_id", "diagnosis"]].isna().all(axis=None)


def test_a_second_table_fills_what_the_first_leaves_empty(tmp_path):
    write(tmp_path, "isic_id,target\nA,0\nB,1\n")
    more = write(tmp_path, "image_name,patient_id,lesion_id,target\nB,P2,L2,1\nA,P1,,0\nC,P3,L3,1\n", "more.csv")
    table = read_metadata(tmp_path, more)
    assert table["patient_id"].tolist() == ["P1", "P2"]
    assert table["lesion_id"].fillna("-").tolist() == ["-", "L2"]
    write(tmp_path, "isic_id,lesion_id\nA,L1\n", "labels-missing.csv")
    assert read_metadata(tmp_path, tmp_path / "labels-missing.csv")["lesion_id"].fillna("-").tolist() == ["L1", "-"]


@pytest.mark.parametrize(
    ("more", "word"),
    [
        ("isic_id,target\nA,1\n", "another target"),
        ("isic_id,patient_id\nA,P1\n", "no patient_id for B"),
        ("isic_id,sex\n,male\n", "row 2, column isic_id"),
    ],
)
def test_a_second_table_must_not_contradict_the_first(more, word, tmp_path):
    write(tmp_path, "isic_id,target\nA,0\nB,1\n")
    with pytest.raises(UserError, match=word):
        read_metadata(tmp_path, write(tmp_path, more, "more.csv"))


def test_the_second_table_may_be_the_only_one(tmp_path):
    (tmp_path / "source").mkdir()
    table = write(tmp_path, malformed.PLAIN_TABLE, "labels.csv")
    assert len(read_metadata(tmp_path / "source", table)) == 24
    with pytest.raises(UserError, match="--metadata"):
        read_metadata(tmp_path / "source")
    with pytest.raises(UserError, match="no folder"):
        read_metadata(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no file"):
        read_metadata(tmp_path / "source", tmp_path / "nowhere.csv")
    with pytest.raises(UserError, match="directory"):
        read_metadata(tmp_path / "source", tmp_path / "source")
    os.mkfifo(tmp_path / "pipe.csv")
    with pytest.raises(UserError, match="device: expected a table"):
        read_metadata(tmp_path / "source", tmp_path / "pipe.csv")


def test_a_table_beyond_all_sizes_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "read_bytes", lambda _: pytest.fail("read"))
    with open(tmp_path / "train-metadata.csv", "wb") as stream:
        stream.truncate(2**40)  # a sparse file
    with pytest.raises(UserError, match="1,099,511,627,776 bytes"):
        read_metadata(tmp_path)


def test_pictures_are_found_in_both_layouts(tmp_path):
    folder = tmp_path / "train-image"
    with pytest.raises(UserError, match="no folder"):
        find_pictures(tmp_path)
    write_pictures(folder, ["notes.txt", ".hidden.jpg"])
    with pytest.raises(UserError, match="no picture"):
        find_pictures(tmp_path)
    write_pictures(folder / "image", ["A.jpg", "B.JPEG"])
    write_pictures(folder, ["B.png", "C.tif"])
    assert find_pictures(tmp_path) == {
        "A": folder / "image" / "A.jpg",
        "B": folder / "B.png",
        "C": folder / "C.tif",
    }


def test_sources_are_told_apart(tmp_path, capsys):
    for name, ids in (("one/set", "AB"), ("two/set", "BC")):
        folder = tmp_path / name
        write_pictures(folder / "train-image", [f"{letter}.jpg" for letter in ids])
        write(folder, "isic_id,target\n" + "".join(f"{letter},0\n" for letter in ids))
    table = read_sources(tmp_path / "one/set", [tmp_path / "two/set"])
    assert table["isic_id"].tolist() == ["A", "B", "B@set-1", "C"]
    assert table["source"].tolist() == ["set", "set", "set-1", "set-1"]
    assert table["external"].tolist() == [False, False, True, True]
    assert table["file"].tolist()[2] == tmp_path / "two/set/train-image/B.jpg"
    assert same_ids(table)[["first", "second"]].to_numpy().tolist() == [["B", "B@set-1"]]
    assert same_ids(table[:1]).empty
    assert capsys.readouterr().err.count("no patient_id") == 2


def test_a_list_of_duplicates_is_pairs_of_ids(tmp_path):
    assert read_official(tmp_path).empty
    path = write(tmp_path, "image_name_1,image_name_2\nA,B\nC,C\n", DUPLICATES)
    assert read_official(tmp_path).to_numpy().tolist() == [["A", "B", "official"]]
    with pytest.raises(UserError, match="no file"):
        read_official(tmp_path, tmp_path / "nowhere.csv")
    for text, word in (("image_name_1\nA\n", "two columns"), ("one,two\nA,\n", "row 2"), ("", "empty")):
        path.write_text(text)
        with pytest.raises(UserError, match=word):
            read_duplicates(path)


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=200), st.sampled_from([b"", b"isic_id,target\n", malformed.PLAIN_TABLE.encode()]))
def test_any_bytes_are_a_table_or_a_user_error(tmp_path_factory, data, start):
    folder = tmp_path_factory.mktemp("table")
    write(folder, start + data)
    try:
        table = read_metadata(folder)
    except UserError:
        return
    assert table["isic_id"].is_unique
    assert set(table["target"]) <= {0, 1}


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real images are not here")
def test_the_real_tables_are_read():
    table = read_sources(SHARED / "isic2020", [SHARED / "ham10000"])
    assert table["source"].value_counts().to_dict() == {"isic2020": 1144, "ham10000": 5984}
    assert table["file"].notna().all()
    assert table.groupby("source")["target"].sum().to_dict() == {"isic2020": 584, "ham10000": 491}
    assert len(read_official(SHARED / "isic2020")) == 425
