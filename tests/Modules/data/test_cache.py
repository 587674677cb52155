"""Decoded pictures, in memory or in a file: always those of the files, whatever happened to the cache."""

import errno
import fcntl
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from dataset import load_manifest, select, training_batches
from Modules.config import Data, Recipe
from Modules.data import cache, records
from Modules.data.images import ImageError, read_image

SIZE = 32


@pytest.fixture
def table(tmp_path, balanced):
    """The training images of a data set of its own."""
    shutil.copytree(balanced, tmp_path / "data")
    return select(load_manifest(tmp_path / "data"), "train")


@pytest.fixture
def no_memory(monkeypatch):
    monkeypatch.setattr(cache, "free_memory", lambda: 0)


def pictures(table):
    read = cache.reader(table, SIZE)
    return [read(position) for position in range(len(table))]


def stored(table) -> list[Path]:
    return sorted(Path(table["home"][0]).glob("cache/*"))


def counted(monkeypatch) -> list[str]:
    """The files that are decoded from now on."""
    seen = []
    monkeypatch.setattr(cache, "read_image", lambda file, size: (seen.append(file), read_image(file, size))[1])
    return seen


def check(table):
    np.testing.assert_array_equal(pictures(table), [read_image(file, SIZE) for file in table["file"]])


@pytest.mark.parametrize("fits", [True, False])
def test_pictures_are_those_of_the_files_and_decoded_once(table, monkeypatch, fits):
    monkeypatch.setattr(cache, "free_memory", lambda: 2**40 if fits else 0)
    seen = counted(monkeypatch)
    check(table)
    check(table)
    assert sorted(seen) == sorted(table["file"])
    assert len(stored(table)) == (not fits)


def test_memory_is_shared_out_once(table, monkeypatch):
    """Half of what is free holds the first half of the pictures, so there is none for the second."""
    half, rest = table.iloc[: len(table) // 2], table.iloc[len(table) // 2 :].reset_index(drop=True)
    monkeypatch.setattr(cache, "free_memory", lambda: 2 * len(half) * 3 * SIZE**2)
    cache.reader(half, SIZE)
    assert stored(table) == []
    cache.reader(rest, SIZE)
    assert len(stored(table)) == 1


def test_what_was_set_aside_is_not_asked_for_twice(table, monkeypatch):
    free = iter([2**40, 0])
    monkeypatch.setattr(cache, "free_memory", lambda: next(free))
    cache.reader(table, SIZE)
    check(table)
    assert stored(table) == []


@pytest.mark.parametrize(
    ("limit", "usage", "files"),
    [("memory.max", "memory.current", "inactive_file"),
     ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")],
)  # fmt: skip
def test_a_containers_limit_counts(tmp_path, monkeypatch, limit, usage, files):
    monkeypatch.setattr(cache, "CGROUPS", ((tmp_path / limit, usage, files),))
    whole = cache.free_memory()
    (tmp_path / usage).write_text("5000\n")
    (tmp_path / "memory.stat").write_text(f"anon 7\n{files} 3000\n")
    (tmp_path / limit).write_text("9000\n")
    assert cache.free_memory() == 9000 - (5000 - 3000)
    for none in ("max", str(2**63 - 4096)):
        (tmp_path / limit).write_text(f"{none}\n")
        assert cache.free_memory() == pytest.approx(whole, rel=0.5)


@pytest.mark.usefixtures("no_memory")
def test_where_the_system_takes_no_place_by_itself_the_file_is_not_one_to_append_to(table, monkeypatch):
    """The C library then writes into each block, which it refuses for files that are opened to append."""

    def by_writing(descriptor, start, length):
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_APPEND:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    monkeypatch.setattr(os, "posix_fallocate", by_writing)
    check(table)
    (file,) = stored(table)
    assert file.stat().st_size > 0


@pytest.mark.usefixtures("no_memory")
def test_training_sees_the_same_batches_from_memory_and_from_a_file(table, monkeypatch):
    recipe = Recipe("test", Data(image_size=SIZE, batch_size=16))
    from_file = next(training_batches(table, recipe, 0)[0].as_numpy_iterator())
    assert len(stored(table)) == 1
    monkeypatch.setattr(cache, "free_memory", lambda: 2**40)
    for ours, other in zip(from_file, next(training_batches(table, recipe, 0)[0].as_numpy_iterator()), strict=True):
        np.testing.assert_array_equal(ours, other)


@pytest.mark.usefixtures("no_memory")
@pytest.mark.parametrize("length", [0, 1, 5000])
def test_a_file_that_was_cut_off_is_written_anew(table, length):
    check(table)
    (file,) = stored(table)
    whole = file.read_bytes()
    file.write_bytes(whole[:length])
    check(table)
    assert file.read_bytes() == whole


@pytest.mark.usefixtures("no_memory")
def test_a_damaged_picture_in_the_file_is_decoded_anew(table, monkeypatch):
    check(table)
    (file,) = stored(table)
    data = bytearray(file.read_bytes())
    data[table["row"][0] * (3 * SIZE**2 + cache.CHECK) + 100] ^= 1
    file.write_bytes(data)
    seen = counted(monkeypatch)
    check(table)
    assert seen == [table["file"][0]]


@pytest.mark.usefixtures("no_memory")
def test_all_splits_of_a_data_set_share_a_file_and_another_manifest_has_its_own(table, monkeypatch):
    check(table)
    home = Path(table["home"][0])
    seen = counted(monkeypatch)
    check(table.iloc[::-1].reset_index(drop=True))
    assert seen == []
    check(select(load_manifest(home), "test"))
    check(table)
    assert len(stored(table)) == 1
    with open(home / "manifest.csv", "a") as stream:
        stream.write("\n")
    check(table)
    assert len(stored(table)) == 2


@pytest.mark.usefixtures("no_memory")
def test_pictures_of_record_files_are_kept_as_well(table, monkeypatch):
    records.write_table(home := Path(table["home"][0]), table.assign(split="train"))
    table = table.assign(file=records.located(home, table["path"]))
    seen = counted(monkeypatch)
    check(table)
    check(table)
    assert sorted(seen) == sorted(table["file"])
    assert all("tfrecord" in file for file in seen)


@pytest.mark.parametrize("fits", [True, False])
def test_a_broken_picture_is_named_when_it_is_asked_for(table, monkeypatch, fits):
    monkeypatch.setattr(cache, "free_memory", lambda: 2**40 if fits else 0)
    Path(table["file"][3]).write_text("no picture")
    read = cache.reader(table, SIZE)
    np.testing.assert_array_equal(read(2), read_image(table["file"][2], SIZE))
    with pytest.raises(ImageError, match=table["file"][3]):
        read(3)


@pytest.mark.usefixtures("no_memory")
def test_without_a_place_for_the_file_pictures_are_decoded_every_time(table, monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache.os, "posix_fallocate", full)
    check(table)
    assert "each is decoded every time" in capsys.readouterr().out


@pytest.mark.usefixtures("no_memory")
def test_a_table_that_is_no_manifest_needs_no_file(table):
    check(table[["file", "target"]])
    assert stored(table) == []
