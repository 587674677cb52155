"""The table of predictions, as CSV and as JSON lines."""

import csv
import json

import pytest

from Modules.cli import UserError
from Modules.data.images import ImageError
from Modules.evaluation.evidence import UNFAMILIAR, Evidence, Neighbour
from Modules.predictions import COLUMNS, row, written

NEIGHBOURS = (Neighbour(3, "ISIC_3", "malignant", "melanoma", 0.98765432), Neighbour(1, "ISIC_1", "benign", "", 0.5))
ROWS = [
    row("a, b.jpg", Evidence(0.75, 0.05, "malignant", True, 3.0, NEIGHBOURS, 0.5), 0.4),
    row("cat.jpg", Evidence(None, None, UNFAMILIAR, False, 9.0, (), 0.0), 0.4),
    row("x.jpg", ImageError("x.jpg: damaged"), 0.4),
    row("name \udcff.jpg", ImageError("empty file"), 0.4),
]


def test_a_csv_has_one_flat_row_for_each(tmp_path):
    with written(ROWS, tmp_path / "out.csv") as rows:
        assert list(rows) == ROWS
        assert not (tmp_path / "out.csv").exists()
    with open(tmp_path / "out.csv", newline="", encoding="utf-8", errors="surrogateescape") as stream:
        table = list(csv.DictReader(stream))
    assert tuple(table[0]) == COLUMNS
    assert [one["path"] for one in table] == ["a, b.jpg", "cat.jpg", "x.jpg", "name \udcff.jpg"]
    assert table[0]["probability"] == "0.750000"
    assert table[0]["neighbours"] == "ISIC_3:malignant:0.988 ISIC_1:benign:0.500"
    assert (table[1]["probability"], table[1]["prediction"], table[1]["in_distribution"]) == ("", UNFAMILIAR, "False")
    assert (table[2]["probability"], table[2]["in_distribution"], table[2]["error"]) == ("", "", "damaged")


def test_json_lines_hold_the_neighbours_as_objects(tmp_path):
    with written(ROWS, tmp_path / "out.jsonl") as rows:
        list(rows)
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert lines == ROWS
    assert lines[0]["neighbours"][0] == {
        "id": "ISIC_3", "label": "malignant", "diagnosis": "melanoma", "similarity": 0.987654,
    }  # fmt: skip
    assert lines[1]["probability"] is None


def test_two_that_write_the_same_table_do_not_mix(tmp_path, monkeypatch):
    with written(ROWS, tmp_path / "out.csv") as one:
        next(one)
        monkeypatch.setattr("os.getpid", lambda: 1)
        with written(ROWS[:1], tmp_path / "out.csv") as other:
            list(other)
        list(one)
    assert (tmp_path / "out.csv").read_bytes().count(b"\n") == 1 + len(ROWS)
    assert [file.name for file in tmp_path.iterdir()] == ["out.csv"]


def test_a_table_cut_off_leaves_the_former_one(tmp_path):
    (tmp_path / "out.csv").write_text("former")

    def cut_off():
        yield ROWS[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), written(cut_off(), tmp_path / "out.csv") as rows:
        list(rows)

    def other_file():
        yield ROWS[0]
        raise PermissionError(13, "Permission denied", "sheets/1.png")  # --explain's, so no word of ours on --output

    with pytest.raises(PermissionError, match="sheets"), written(other_file(), tmp_path / "out.csv") as rows:
        list(rows)
    assert [file.name for file in tmp_path.iterdir()] == ["out.csv"]
    assert (tmp_path / "out.csv").read_text() == "former"
    with pytest.raises(UserError, match="--output"), written(ROWS, tmp_path / "missing" / "out.csv") as rows:
        list(rows)
