"""Pictures decoded once: training looks at each dozens of times, and decoding is half the work of a view.

They are kept in memory where half of what is free holds them, else in a file of the data set,
`cache/<size>-<key>.pictures`, with the pixels of each picture and their CRC-32 at the place of its row in the manifest,
from when it is first asked for. The key is the manifest's hash, so that all splits and folds share the file. The folder
`cache` may be removed at any time.
"""

import os
import zlib
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
from tqdm import tqdm

from Modules.data.images import read_image
from Modules.data.manifest import manifest_sha256

SHARE = 0.5  # of the free memory
CHECK = 4  # bytes of the CRC-32 after each picture
# A container's limit of memory, what it uses, and the part of that which is files, by both versions of cgroups.
CGROUPS = (
    (Path("/sys/fs/cgroup/memory.max"), "memory.current", "inactive_file"),
    (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), "memory.usage_in_bytes", "total_inactive_file"),
)

_memory: dict[tuple[str, int], np.ndarray] = {}  # (file, size): where its pixels go
_decoded: dict[tuple[str, int], np.ndarray] = {}  # the same, read-only, once they are there


def reader(table: pd.DataFrame, size: int) -> Callable[[int], np.ndarray]:
    """A function from a position in `table` to its picture, uint8 [size, size, 3] RGB, read-only; for any thread.

    table: `file`; `home` (the data set's folder) and `row` (in its manifest), without which there is no file for what
    memory can't hold. The function raises ImageError as `read_image` does.
    """
    files = table["file"].tolist()
    if _reserve([(file, size) for file in files]):
        return lambda position: _remembered(files[position], size)
    kept = _stored(table, size) if {"home", "row"} <= set(table.columns) else None
    if kept is None:
        return lambda position: read_image(files[position], size)
    rows = table["row"].tolist()
    whole = np.zeros(len(files), bool)  # once is enough: the check takes as long as a fifth of a view

    def picture(position: int) -> np.ndarray:
        row = kept[rows[position]]
        pixels, check = row[:-CHECK], row[-CHECK:]
        if not whole[position] and _check(pixels) != bytes(check):
            pixels[...] = read_image(files[position], size).reshape(-1)
            check[...] = np.frombuffer(_check(pixels), np.uint8)
        whole[position] = True
        pixels.flags.writeable = False
        return pixels.reshape(size, size, 3)

    return picture


def free_memory() -> int:
    """Bytes that can be had without harm to other processes, within the container's limit where there is one."""
    free, info = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2, Path("/proc/meminfo")
    if info.exists():
        line = next(line for line in info.read_text().splitlines() if line.startswith("MemAvailable:"))
        free = 1024 * int(line.split()[1])
    for limit, usage, files in CGROUPS:
        if limit.exists() and (most := limit.read_text().strip()) != "max":
            used = int(limit.with_name(usage).read_text())
            counted = limit.with_name("memory.stat").read_text().split()
            used -= int(counted[counted.index(files) + 1])  # of files, given back when it is needed
            free = min(free, int(most) - used)
    return free


def _reserve(keys: list[tuple[str, int]]) -> bool:
    """Set memory aside for pictures of one size, where there is enough beside what was set aside before.

    In one block, whose pages are larger: a new small page costs as much as decoding what fits on it.
    """
    new = [key for key in dict.fromkeys(keys) if key not in _memory]
    waiting = [*new, *(key for key in _memory if key not in _decoded)]
    if new and sum(3 * size**2 for _, size in waiting) > SHARE * free_memory():
        return False
    size = keys[0][1]
    _memory.update(zip(new, np.empty((len(new), size, size, 3), np.uint8), strict=True))
    return True


def _remembered(file: str, size: int) -> np.ndarray:
    pixels = _decoded.get((file, size))
    if pixels is None:
        place = _memory[file, size]
        # By OpenCV: the copy that glibc makes for NumPy takes 15 times as long on some AMD processors, wherever source
        # and target begin a few bytes apart in their pages (sourceware.org, bug 30994).
        cv2.copyTo(read_image(file, size), None, place)
        pixels = place.view()
        pixels.flags.writeable = False
        _decoded[file, size] = pixels
    return pixels


def _check(pixels: np.ndarray) -> bytes:
    return zlib.crc32(pixels).to_bytes(CHECK, "little")


def _stored(table: pd.DataFrame, size: int) -> np.ndarray | None:
    """The file's rows, uint8 [N, 3 * size**2 + CHECK], N enough for the table; zeros where there is nothing yet, of
    which 0 is not the CRC.

    None, and a line that says so, where it can't be.
    """
    home = Path(table["home"].iloc[0])
    shape = int(table["row"].max()) + 1, 3 * size**2 + CHECK
    try:
        (home / "cache").mkdir(exist_ok=True)
        file = home / "cache" / f"{size}-{manifest_sha256(home)[:16]}.pictures"
        file.touch()
        with open(file, "r+b") as stream:  # not "ab": where the system has no way, posix_fallocate can't append
            # A write through the map to a full disk would end the process: take the place now, where there is a way.
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(stream.fileno(), 0, shape[0] * shape[1])
            stream.truncate(max(os.path.getsize(stream.name), shape[0] * shape[1]))
            return np.asarray(np.memmap(stream.name, np.uint8, "r+", shape=shape))
    except OSError as error:
        why = f"{error.strerror}; they take {shape[0] * shape[1] / 1e9:.1f} GB"
        tqdm.write(f"Decoded pictures can't be kept in {home / 'cache'} ({why}): each is decoded every time.")
        return None
