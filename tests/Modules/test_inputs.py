"""Which pictures a command was given, and reading them."""

import threading

import numpy as np
import pytest

from Modules.cli import UserError
from Modules.data.images import ImageError, encode_jpeg
from Modules.inputs import BATCH, count_pictures, find_pictures, read_batches


@pytest.fixture
def folder(tmp_path):
    for name in ("b.jpg", "a.PNG", "deep/er/c.tif", "deep/d.jpeg", "notes.md", "[odd].jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def names(folder, *paths):
    return [path.relative_to(folder).as_posix() for path in find_pictures([folder / path for path in paths])]


def test_folders_are_searched_in_order_and_files_taken_as_they_are(folder):
    assert names(folder, "") == ["[odd].jpg", "a.PNG", "b.jpg", "deep/d.jpeg", "deep/er/c.tif"]
    assert names(folder, "deep", "notes.md", "gone.jpg") == ["deep/d.jpeg", "deep/er/c.tif", "notes.md", "gone.jpg"]


def test_patterns_are_matched_unless_a_file_is_called_so(folder):
    assert names(folder, "*.jpg") == ["[odd].jpg", "b.jpg"]
    assert names(folder, "**/*.jp*g") == ["[odd].jpg", "b.jpg", "deep/d.jpeg"]
    assert names(folder, "dee?") == ["deep/d.jpeg", "deep/er/c.tif"]
    assert names(folder, "[odd].jpg") == ["[odd].jpg"]
    for pattern in ("deep/**", "deep/**/*", "deep*"):  # they match folders and what lies in them
        assert names(folder, pattern) == ["deep/d.jpeg", "deep/er/c.tif"]
    with pytest.raises(UserError, match="nothing matches"):
        names(folder, "*.webp")


def test_a_name_longer_than_any_file_is_a_picture_that_is_not_there(folder):
    assert names(folder, "x" * 300) == ["x" * 300]
    assert isinstance(next(read_batches(find_pictures([folder / ("x" * 300)]), 8))[0][1], ImageError)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("list.txt", "b.jpg\n\n  deep/d.jpeg \r\ngone.jpg"),
        ("list.CSV", "isic_id,path\n1,b.jpg\n2,deep/d.jpeg\n3,\n4,gone.jpg\n"),
        ("list.csv", "\ufefffile,target\nb.jpg,0\ndeep/d.jpeg,1\ngone.jpg\n"),
        ("list.csv", "\n \npath\nb.jpg\n\ndeep/d.jpeg\ngone.jpg\n"),
    ],
)
def test_lists_name_pictures_from_their_own_folder(folder, file, text):
    (folder / file).write_text(text, encoding="utf-8", newline="")
    assert names(folder, file) == ["b.jpg", "deep/d.jpeg", "gone.jpg"]


def test_lists_that_cannot_be_read_are_the_users_to_mend(folder):
    (folder / "bytes.txt").write_bytes(b"\xff\xfe\xff")
    for file in ("bytes.txt", "missing.csv"):
        with pytest.raises(UserError, match=f"can't read the list .*{file}"):
            names(folder, file)
    (folder / "empty.csv").touch()
    with pytest.raises(UserError, match="no picture in"):
        count_pictures([folder / "empty.csv"])


def test_no_more_threads_read_than_are_given(tmp_path):
    names, turn = set(), threading.Barrier(2)

    def read(file, size):
        names.add(threading.current_thread().name)
        turn.wait(10)  # both are at work

    assert len(list(read_batches(iter([tmp_path] * 2 * BATCH), 8, read, 2))) == 2
    assert len(names) == 2


def test_pictures_are_read_in_order_and_only_a_few_batches_ahead(tmp_path):
    taken = 0

    def files():
        nonlocal taken
        for i in range(10 * BATCH + 1):
            taken += 1
            yield tmp_path / f"{i}.jpg"

    (tmp_path / "1.jpg").write_bytes(encode_jpeg(np.full((40, 50, 3), 7, np.uint8)))
    batches = read_batches(files(), 16)
    first = next(batches)
    assert taken <= 3 * BATCH
    assert [path.name for path, _ in first] == [f"{i}.jpg" for i in range(BATCH)]
    assert isinstance(first[0][1], ImageError)
    assert first[1][1].shape == (16, 16, 3)
    assert [len(batch) for batch in batches] == [BATCH] * 9 + [1]
