"""Which pictures a command was given, and their pixels, read ahead: nothing here grows with the number of files but
names."""

import csv
import glob
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np

from Modules.cli import UserError
from Modules.data.images import EXTENSIONS, ImageError, read_image

LISTS = (".txt", ".csv")
BATCH = 32  # images
AHEAD = 2  # batches being read while the last are scored


def find_pictures(paths: Sequence[Path]) -> Iterator[Path]:
    """Each of `paths` in turn: a picture as it is; the pictures (by suffix) in and below a folder, sorted; the matches
    of a pattern (`*`, `?`, `[...]`, `**`); the entries of a list (see `listed`).

    Raises:
        UserError: a list that can't be read, a pattern that nothing matches.
    """
    for path in paths:
        if os.path.isdir(path):  # no error where a name is longer than any file's
            yield from _in_folder(path)
        elif path.suffix.lower() in LISTS:
            yield from listed(path)
        elif glob.has_magic(str(path)) and not os.path.exists(path):
            found = sorted(glob.glob(str(path), recursive=True))
            if not found:
                raise UserError(f"nothing matches {path}: expected pictures, folders, patterns or a list of them")
            given = set()  # `**` matches a folder and what lies in it
            for match in map(Path, found):
                for picture in _in_folder(match) if match.is_dir() else (match,):
                    if picture not in given:
                        given.add(picture)
                        yield picture
        else:
            yield path


def _in_folder(folder: Path) -> Iterator[Path]:
    for place, folders, files in os.walk(folder):
        folders.sort()
        yield from (Path(place, name) for name in sorted(files) if os.path.splitext(name)[1].lower() in EXTENSIONS)


def listed(file: Path) -> Iterator[Path]:
    """The paths in a list (see `entries`); relative ones start from the list's own folder."""
    return (file.parent / name for name in entries(file))


def entries(file: Path) -> Iterator[str]:
    """The lines of a `.txt` file, or the column `path` (else the first) of a `.csv` file with a header.

    Raises:
        UserError: a list that can't be read.
    """
    try:
        with open(file, newline="", encoding="utf-8-sig") as stream:
            if file.suffix.lower() == ".txt":
                names = (line.strip() for line in stream)
            else:
                table = csv.DictReader(line for line in stream if line.strip())
                column = "path" if "path" in (table.fieldnames or ()) else (table.fieldnames or [""])[0]
                names = ((row[column] or "").strip() for row in table)
            yield from filter(None, names)
    except (OSError, UnicodeError, csv.Error) as error:
        raise UserError(f"can't read the list {file} ({error}): expected one path a line, or a column path") from None


def count_pictures(paths: Sequence[Path]) -> int:
    """How many `find_pictures` will find.

    Raises:
        UserError: none.
    """
    count = sum(1 for _ in find_pictures(paths))
    if not count:
        raise UserError(f"no picture in {', '.join(map(str, paths))}: expected {', '.join(EXTENSIONS)}")
    return count


def read_batches(
    files: Iterator[Path], size: int, read: Callable = read_image, threads: int | None = None
) -> Iterator[list[tuple[Path, np.ndarray | ImageError]]]:
    """Batches of files with their pictures, uint8 [S, S, 3], or what is wrong with them; read ahead by `threads`
    (one a core). Of another kind of source `read(source, size)` makes the pictures.
    """

    def try_to_read(file: Path) -> tuple[Path, np.ndarray | ImageError]:
        try:
            return file, read(file, size)
        except ImageError as error:
            return file, error

    with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
        read_ahead = in_order(pool, try_to_read, files, AHEAD * BATCH)
        while batch := list(islice(read_ahead, BATCH)):
            yield batch


def in_order(pool: Executor, work: Callable, items: Iterable, ahead: int) -> Iterator:
    """`work` of each of `items` in turn, by a pool that has at most `ahead` of them in hand."""
    items, started = iter(items), deque()
    while True:
        started.extend(pool.submit(work, item) for item in islice(items, ahead - len(started)))
        if not started:
            return
        yield started.popleft().result()
