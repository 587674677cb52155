"""The real command on real files: what it makes cannot leak, what it can't use it names, what it can't do it says."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import generate_balanced_dataset as command
from Modules.cli import UserError, run
from Modules.data.images import read_image
from Modules.data.manifest import read_manifest
from Modules.data.output import replacing
from tests.Modules.data import malformed

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the real images are not here")


def make_source(folder: Path, count: int = 24, first: int = 0, size: int = 64) -> Path:
    """A data set of malformed.PLAIN_TABLE's kind: pictures A0, A1, ...; two a patient, one of them malignant."""
    (folder / "train-image").mkdir(parents=True)
    rows = ["isic_id,patient_id,target"]
    for number in range(first, first + count):
        image = malformed.picture(seed=number, size=size)
        (folder / f"train-image/A{number}.jpg").write_bytes(malformed.encoded(image))
        rows.append(f"A{number},P{number // 2},{number % 2}")
    (folder / "train-metadata.csv").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Not to be changed: copy it."""
    return make_source(tmp_path_factory.mktemp("data") / "source")


@pytest.fixture
def call(monkeypatch, tmp_path, capsys):
    """Run the command in a temporary folder: its exit code, what it printed, and the line on stderr where it failed."""
    monkeypatch.chdir(tmp_path)

    def called(*arguments):
        monkeypatch.setattr(sys, "argv", ["generate_balanced_dataset.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            run(command.main)
        captured = capsys.readouterr()
        if ended.value.code:
            assert captured.err.count("\n") == 1, captured.err
            assert not list(tmp_path.glob(".*.partial"))
        return ended.value.code, captured.out, captured.err

    return called


def copied(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target))


def table_of(folder: Path) -> pd.DataFrame:
    return read_manifest(folder, verify=True).set_index("isic_id")


def test_a_data_set_is_made_whole(source, call, tmp_path):
    code, printed, _ = call("--source", source, "--output", "made", "--size", 64, "--folds", 2, "--seed", 5)
    assert code == 0
    assert max(map(len, printed.splitlines())) <= 80
    assert "the largest holds 2 images" in printed
    made = tmp_path / "made"
    table = table_of(made)
    assert table["split"].value_counts().to_dict() == {"train": 16, "test": 6, "validation": 2}
    files = {path.relative_to(made).as_posix() for path in made.rglob("*.jpg")}
    assert files == set(table["path"])
    first = table.iloc[0]
    assert os.path.samefile(made / first["path"], source / f"train-image/{first.name}.jpg")  # a hard link
    facts = json.loads((made / "manifest.json").read_text())
    assert {"seed": 5, "folds": 2, "size": 64, "source": str(source)}.items() <= facts.items()
    report = (made / "report.md").read_text()
    assert "| train | 16 | 8 | 8 | 50.00 | 8 | 8 | 16 |" in report
    assert (made / "report.png").stat().st_size > 10_000


def test_the_same_seed_gives_the_same_bytes(source, call, tmp_path):
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        assert call("--source", source, "--output", name, "--size", 48, "--seed", seed)[0] == 0
    one, two, three = (Path(name).joinpath("manifest.csv").read_bytes() for name in ("one", "two", "three"))
    assert one == two != three
    written = next((tmp_path / "one").rglob("A3.jpg"))
    assert read_image(written).shape == (48, 48, 3)
    difference = read_image(written).astype(int) - read_image(source / "train-image/A3.jpg", 48)
    assert np.abs(difference).mean() < 3


def test_the_published_layout_with_id_and_target_only(source, call, tmp_path):
    nested = copied(source, tmp_path / "nested")
    (nested / "train-image").rename(tmp_path / "image")
    (nested / "train-image").mkdir()
    (tmp_path / "image").rename(nested / "train-image/image")
    table = pd.read_csv(nested / "train-metadata.csv")
    table[["isic_id", "target"]].to_csv(nested / "train-metadata.csv", index=False)
    code, _, warned = call("--source", nested, "--output", "made", "--size", 64)
    assert code == 0
    assert "no patient_id" in warned
    assert table_of(tmp_path / "made")["group"].is_unique
    table.to_csv("all.csv", index=False)
    assert call("--source", nested, "--output", "made", "--size", 64, "--metadata", "all.csv")[0] == 0
    assert table_of(tmp_path / "made")["group"].nunique() == 12


def test_duplicates_are_dropped_and_named(source, call, tmp_path):
    """B0 is A0 again; A4 and A9 are an official pair; B1 is A1 with the other label."""
    twice = copied(source, tmp_path / "twice")
    for number in (0, 1):
        shutil.copy(twice / f"train-image/A{number}.jpg", twice / f"train-image/B{number}.jpg")
    with (twice / "train-metadata.csv").open("a") as table:
        table.write("B0,P90,0\nB1,P91,0\n")
    (twice / "ISIC_2020_Training_Duplicates.csv").write_text("image_name_1,image_name_2\nA9,A3\n")
    assert call("--source", twice, "--output", "made", "--size", 64)[0] == 0
    table = table_of(tmp_path / "made")
    assert table.loc["B0", ["split", "duplicate_of", "reason"]].tolist() == [
        "excluded",
        "A0",
        "duplicate: byte-identical",
    ]
    larger, smaller = sorted(("A3", "A9"), key=lambda name: -(twice / f"train-image/{name}.jpg").stat().st_size)
    assert table.loc[smaller, ["duplicate_of", "reason"]].tolist() == [larger, "duplicate: official"]
    assert table.loc[["A1", "B1"], "reason"].str.startswith("contradicting labels").all()
    assert table.loc[["A0", "A1", "B0", "B1"], "group"].nunique() == 1  # patients P0, P90 and P91 are one
    assert table.loc[["A2", "A3", "A8", "A9"], "group"].nunique() == 1
    assert "| duplicate | 2 |" in (tmp_path / "made/report.md").read_text()


def test_broken_and_odd_files_through_the_real_command(source, tmp_path):
    """Every one is named with its reason, the readable ones are used, and nothing of it ends the run."""
    mixed = copied(source, tmp_path / "mixed")
    broken, odd = malformed.broken(), malformed.odd()
    words = {**{name: word for name, (_, word) in broken.items()}, **malformed.write_special(mixed / "train-image")}
    words["never-there"] = "absent"
    for name, (data, _) in {**broken, **odd}.items():
        (mixed / f"train-image/{name}.jpg").write_bytes(data)
    with (mixed / "train-metadata.csv").open("a") as table:
        table.writelines(f"{name},{name},0\n" for name in [*words, *odd])
    assert len(words) >= 40
    arguments = ["--source", str(mixed), "--output", str(tmp_path / "made"), "--size", "64"]
    python = [sys.executable, str(ROOT / "generate_balanced_dataset.py"), *arguments]
    ended = subprocess.run([*python, "--max-excluded", "99"], capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    assert "Traceback" not in ended.stderr
    table = table_of(tmp_path / "made")
    for name, word in words.items():
        assert table.loc[name, "split"] == "excluded"
        assert word in table.loc[name, "reason"]
    assert table.loc["black", "path"] == "../mixed/train-image/black.jpg"
    assert pd.isna(table.loc["never-there", "path"])
    reasons = table.loc[list(odd), "reason"].dropna()
    assert reasons.str.startswith(("duplicate", "contradicting")).all()  # most of them show one picture
    assert f"  and {len(words) - 10} more in manifest.csv" in ended.stdout
    assert all(len(line) <= 80 or line.endswith("manifest.csv") for line in ended.stdout.splitlines())

    ended = subprocess.run(python, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 2
    assert f"{len(words)} of " in ended.stderr
    assert "--max-excluded" in ended.stderr.splitlines()[-1]
    assert len(table_of(tmp_path / "made")) == len(table)  # as it was


@pytest.mark.parametrize("name", malformed.broken_tables())
def test_a_broken_table_is_one_line(name, source, call, tmp_path):
    data, word = malformed.broken_tables()[name]
    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / "train-image").symlink_to(source / "train-image")
    (folder / "train-metadata.csv").write_bytes(data)
    code, _, message = call("--source", folder, "--output", "made", "--size", 64)
    assert code == 2
    assert word in message
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--sorce", "x"], "--source"),
        (["--source", "nowhere"], "no folder nowhere"),
        (["--source", "empty"], "train-metadata.csv"),
        (["--source", "pictureless"], "no picture in"),
        (["--size", "8"], "between 32 and 4096"),
        (["--size", "large"], "--size"),
        (["--folds", "1"], "--folds 1"),
        (["--folds", "13"], "13 folds"),
        (["--output", "SOURCE"], "something else"),
        (["--output", "SOURCE/made"], "lie in each other"),
        (["--output", "file"], "something else"),
        (["--output", "file/made"], "cannot write"),
        (["--output", "full"], "something else"),
        (["--duplicates", "nowhere.csv"], "no file nowhere.csv"),
        (["--metadata", "nowhere.csv"], "no file nowhere.csv"),
        (["--keep", "nowhere.csv"], "no file nowhere.csv"),
        (["--keep", "file"], "no column"),
        (["--keep", "torn.csv"], "one group on several sides"),
        (["--external", "nowhere"], "no folder nowhere"),
        (["--external", "SOURCE"], None),
        (["--drop-diagnosis", "nevus"], "no diagnosis"),
        (["--max-excluded", "-1"], "--max-excluded"),
        (["--list", "x.csv"], "--metadata"),
        (["--metadata", "SOURCE/train-metadata.csv", "--list", "nowhere/x.csv"], "cannot write nowhere/x.csv"),
    ],
)
def test_what_cannot_be_done_is_one_line(arguments, words, source, call, tmp_path):
    for name in ("empty", "full", "pictureless"):
        (tmp_path / name).mkdir()
    (tmp_path / "pictureless/train-image").mkdir()
    shutil.copy(source / "train-metadata.csv", tmp_path / "pictureless")
    for name in ("file", "full/thesis.txt"):
        (tmp_path / name).write_text("a,b\n1,2\n")
    (tmp_path / "torn.csv").write_text("isic_id,split\nA0,train\nA1,test\n")
    arguments = [argument.replace("SOURCE", str(source)) for argument in arguments]
    code, _, message = call("--source", source, "--output", "made", "--size", "64", *arguments)
    assert code == (2 if words else 0)
    assert (words or "") in message
    assert (tmp_path / "full/thesis.txt").is_file()


def test_an_interrupted_run_leaves_the_former_data_set(source, call, tmp_path, monkeypatch):
    arguments = ("--source", source, "--output", "made", "--size", 64)
    assert call(*arguments)[0] == 0
    (tmp_path / ".made.partial").mkdir()  # of a run that was killed
    before = (tmp_path / "made/manifest.csv").read_bytes()

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "write_report", interrupted)
    monkeypatch.setattr(sys, "argv", ["generate_balanced_dataset.py", *map(str, arguments), "--seed", "9"])
    with pytest.raises(SystemExit) as ended:
        run(command.main)
    assert ended.value.code == 130
    assert (tmp_path / "made/manifest.csv").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
    table_of(tmp_path / "made")


def test_a_kill_between_the_renames_and_a_second_run_cost_nothing(source, call, tmp_path):
    arguments = ("--source", source, "--output", "made", "--size", 64)
    assert call(*arguments)[0] == 0
    before = (tmp_path / "made/manifest.csv").read_bytes()
    (tmp_path / "made").rename(tmp_path / ".made.former")
    with replacing(tmp_path / "other"), pytest.raises(UserError, match="another run is writing"):
        replacing(tmp_path / "other").__enter__()
    shutil.rmtree(tmp_path / "other")

    def interrupted():
        with replacing(tmp_path / "made"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (tmp_path / "made/manifest.csv").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_a_picture_that_vanishes_is_one_line(source, call, tmp_path, monkeypatch):
    """Scanned, but gone when it is to be written."""
    going = copied(source, tmp_path / "going")
    scanned = command.scan

    def scan(paths):
        found = scanned(paths)
        (going / "train-image/A5.jpg").unlink()
        return found

    monkeypatch.setattr(command, "scan", scan)
    for size in (48, 64):
        code, _, message = call("--source", going, "--output", "made", "--size", size)
        assert code == 2
        assert "A5" in message
        shutil.copy(source / "train-image/A5.jpg", going / "train-image/A5.jpg")


def test_an_output_that_is_a_link_is_followed(source, call, tmp_path):
    (tmp_path / "large-disk").mkdir()
    (tmp_path / "made").symlink_to(tmp_path / "large-disk")
    for _ in range(2):
        assert call("--source", source, "--output", "made", "--size", 64)[0] == 0
    assert (tmp_path / "made").is_symlink()
    assert len(table_of(tmp_path / "large-disk")) == 24
    assert {path.name for path in tmp_path.iterdir()} == {"large-disk", "made"}


def test_absent_images_are_counted(source, call, tmp_path):
    fewer = copied(source, tmp_path / "fewer")
    (fewer / "train-image/A7.jpg").unlink()
    code, printed, _ = call("--source", fewer, "--output", "made", "--size", 64)
    assert code == 0
    assert "1 absent\n  A7: absent\n" in printed
    assert table_of(tmp_path / "made").loc["A7", ["split", "reason"]].tolist() == ["excluded", "absent"]
    assert call("--source", fewer, "--output", "made", "--size", 64, "--max-excluded", 0)[0] == 2


def test_new_images_move_no_known_one(source, call, tmp_path):
    assert call("--source", source, "--output", "made", "--size", 64)[0] == 0
    before = table_of(tmp_path / "made")
    grown = copied(source, tmp_path / "grown")
    more = make_source(tmp_path / "more", count=20, first=24)
    for path in (more / "train-image").iterdir():
        path.rename(grown / "train-image" / path.name)
    with (grown / "train-metadata.csv").open("a") as table:
        table.write((more / "train-metadata.csv").read_text().partition("\n")[2])
        table.write("A90,P0,0\n")  # one more of a known patient
    (grown / "train-image/A90.jpg").write_bytes(malformed.encoded(malformed.picture(90)))
    assert call("--source", grown, "--output", "made", "--size", 64, "--keep", "made")[0] == 0
    after = table_of(tmp_path / "made")
    assert (after.loc[before.index, "split"] == before["split"]).all()
    assert after.loc["A90", "split"] == before.loc["A0", "split"]
    assert after["split"].value_counts()["train"] > before["split"].value_counts()["train"]


def test_external_sets_are_for_training_and_what_is_tested_stays_out(source, call, tmp_path):
    """An external copy of a test image is left out, with what is of its lesion; so is one of a training image."""
    assert call("--source", source, "--output", "made", "--size", 64)[0] == 0
    alone = table_of(tmp_path / "made")
    tested, trained = (alone.index[alone["split"] == split][0] for split in ("test", "train"))
    outside = make_source(tmp_path / "outside", count=4, first=60)
    shutil.copy(source / f"train-image/{tested}.jpg", outside / "train-image/B1.jpg")
    shutil.copy(source / f"train-image/{trained}.jpg", outside / "train-image/B2.jpg")
    labels = alone["target"]
    rows = [f"A{number},L{number},{number % 2}" for number in range(60, 64)]
    rows += [f"B1,L60,{labels[tested]}", f"B2,L61,{labels[trained]}"]
    (outside / "train-metadata.csv").write_text("\n".join(["isic_id,lesion_id,target", *rows]))
    for folds, also_out in ((0, set()), (2, {"A61"})):
        ended = call("--source", source, "--external", outside, "--output", "made", "--size", 64, "--folds", folds)
        assert ended[0] == 0
        table = table_of(tmp_path / "made")
        pd.testing.assert_series_equal(table.loc[alone.index, "split"], alone["split"])
        added = table[table["source"] == "outside"]
        assert set(added.index[added["split"] == "excluded"]) == {"A60", "B1", "B2"} | also_out
        assert added["split"].isin(["external", "excluded"]).all()
        assert added.loc["B1", "duplicate_of"] == tested
        assert added.loc["A60", "reason"].startswith("leak: grouped with images of test")


def test_other_cancers_can_be_left_out(source, call, tmp_path):
    told = copied(source, tmp_path / "told")
    table = pd.read_csv(told / "train-metadata.csv")
    table["diagnosis"] = np.where(table["target"] == 1, "melanoma", "nevus")
    table.loc[[0, 4], "diagnosis"] = "BCC"
    table.to_csv(told / "train-metadata.csv", index=False)
    assert call("--source", told, "--output", "made", "--size", 64, "--drop-diagnosis", "bcc")[0] == 0
    made = table_of(tmp_path / "made")
    assert made.index[made["split"] == "excluded"].tolist() == ["A0", "A4"]
    assert made.loc["A0", "reason"] == "diagnosis: bcc"
    code, _, message = call("--source", told, "--output", "made", "--size", 64, "--drop-diagnosis", "akiec")
    assert code == 2
    assert "bcc, melanoma, nevus" in message


@needs_shared
def test_the_canonical_list_is_made_again_the_same(call, tmp_path):
    table, pairs = SHARED / "isic2020/full-train-metadata.csv", SHARED / "isic2020/ISIC_2020_Training_Duplicates.csv"
    assert call("--metadata", table, "--duplicates", pairs, "--folds", 5, "--list", "list.csv")[0] == 0
    canonical = ROOT / "splits/isic2020.csv"
    assert (tmp_path / "list.csv").read_bytes() == canonical.read_bytes()
    rows = pd.read_csv(canonical).merge(pd.read_csv(table), on="isic_id", validate="1:1")
    used = rows[rows["split"] != "excluded"]
    assert len(rows) == 33_126
    assert len(used) == 33_126 - 425
    for key in ("patient_id", "lesion_id"):
        assert (used.groupby(key)[["split", "fold"]].nunique() == 1).all(axis=None)
    for part in ("split", "fold"):
        assert (used[used["balanced"]].groupby(part)["target"].mean() == 0.5).all()


@needs_shared
def test_the_canonical_list_is_kept_on_the_real_images(call, tmp_path):
    """On some of them; the official pairs among them, of which the list has one image and the other is left out."""
    few = tmp_path / "few"
    few.mkdir()
    (few / "train-image").symlink_to(SHARED / "isic2020/train-image")
    table = pd.read_csv(SHARED / "isic2020/train-metadata.csv")
    pairs = pd.read_csv(SHARED / "isic2020/ISIC_2020_Training_Duplicates.csv")
    pairs = pairs[pairs.isin(set(table["isic_id"])).all(axis=1)].stack()
    chosen = table["isic_id"].isin(pairs) | (table.index % 20 == 0)
    assert len(pairs) == 6
    table[chosen].to_csv(few / "train-metadata.csv", index=False)
    keep = ("--keep", ROOT / "splits/isic2020.csv", "--folds", 5)
    assert call("--source", few, "--output", "made", *keep)[0] == 0
    made = table_of(tmp_path / "made")
    canonical = pd.read_csv(ROOT / "splits/isic2020.csv", index_col="isic_id").loc[made.index]
    pd.testing.assert_frame_equal(made[["split", "fold"]], canonical[["split", "fold"]], check_dtype=False)
