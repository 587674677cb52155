"""The report counts what is there, and a reader finds what was left out and which pairs were found."""

import cv2
import pandas as pd
import pytest

from Modules.data.report import SHOWN, write_report


def rows(split, count, **more):
    return [{"isic_id": f"{split}{number}", "split": split, **more} for number in range(count)]


def table(listed):
    defaults = {
        "source": "set",
        "patient_id": pd.NA,
        "group": "g",
        "target": 0,
        "balanced": False,
        "sex": pd.NA,
        "age_approx": float("nan"),
        "anatom_site_general_challenge": pd.NA,
        "notes": "",
        "reason": pd.NA,
        "duplicate_of": pd.NA,
        "path": "",
    }
    return pd.DataFrame([{**defaults, **row} for row in listed])


PAIRS = pd.DataFrame(
    [
        ("a", "b", "official"),
        ("c", "d", "official"),
        ("b", "a", "resized"),
        ("a", "b", "byte-identical"),
        ("train0", "test0", "cropped"),
    ],
    columns=["first", "second", "kind"],
)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    listed = [
        *rows("train", 3, group="g1", patient_id="P1", target=1, sex="female", age_approx=45.0, balanced=True),
        *rows("train", 1, isic_id="other", group="g2", sex="male", age_approx=80.0, notes="CMYK, rotated"),
        *rows("test", 2, group="g3", source="other", anatom_site_general_challenge="torso", notes="CMYK"),
        *rows("excluded", SHOWN + 7, reason="unreadable: empty file", path="../x.jpg"),
        {"isic_id": "copy", "split": "excluded", "reason": "duplicate: resized", "duplicate_of": "train0"},
    ]
    write_report(folder, table(listed), PAIRS, {"seed": 3, "external": [], "keep": None})
    assert cv2.imread(str(folder / "report.png")).std() > 20
    return (folder / "report.md").read_text()


@pytest.mark.parametrize(
    "line",
    [
        "# Data set of 6 images",
        "* seed: 3",
        "| train | 4 | 1 | 3 | 75.00 | 2 | 1 | 3 |",
        "| test | 2 | 2 | 0 | 0.00 | 1 | unknown | 0 |",
        "| train | 2 | 2.0 | 3 |",
        "| female | 3 (3) | 0 |",
        "| unknown | 0 | 2 (0) |",
        "| 40-59 | 3 (3) | 0 |",
        "| 80+ | 1 (0) | 0 |",
        "| torso | 0 | 2 (0) |",
        f"| unreadable | {SHOWN + 7} |",
        "| duplicate | 1 |",
        "| excluded0 | unreadable: empty file |  | ../x.jpg |",
        "and 8 more in manifest.csv",
        "| CMYK | 3 |",
        "| rotated | 1 |",
        "| cropped | other and set | 1 |",
        "| cropped | test0 | train0 | other and set |",
    ],
)
def test_the_report_holds(report, line):
    assert line in report.splitlines()


def test_the_official_list_is_compared_with_what_was_found(report):
    assert "Of the official list 2 pairs have both pictures here; 1 of them were also found by looking." in report
    assert "Found beyond the list: 1." in report
    assert "external" not in report
    assert "keep" not in report


def test_a_report_of_little_is_written_too(tmp_path):
    write_report(tmp_path, table(rows("train", 1)), PAIRS[:0], {})
    text = (tmp_path / "report.md").read_text()
    assert text.count("Nothing.") == 2
    assert "Found beyond the list: 0." in text
