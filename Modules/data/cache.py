"""Pictures decoded once: training looks at each dozens of times, and decoding is half the work of a view.

They are kept in memory where half of what is free holds them, else in a file of the data set,
`cache/<size>-<key>.pictures`: for each picture its pixels and their CRC-32, in the table's order. The key is a hash of
the table's paths and of the files' own hashes in the manifest, so that another table or picture is another file. The
folder `cache` may be removed at any time.
"""

import hashlib
import os
import shutil
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from Modules.data.images import ImageError, read_image

SHARE = 0.5  # of the free memory
CHECK = 4  # bytes of the CRC-32 after each picture

_memory: dict[tuple[str, int], np.ndarray] = {}  # (file, size): where its pixels go
_decoded: dict[tuple[str, int], np.ndarray] = {}  # the same, read-only, once they are there


def reader(table: pd.DataFrame, size: int) -> Callable[[int], np.ndarray]:
    """A function from a position in `table` to its picture, uint8 [size, size, 3] RGB, read-only; for any thread.

    table: `file`; `path` and `sha256` as in a manifest, without which there is no file for what memory can't hold.
    The function raises ImageError as `read_image` does.
    """
    files = table["file"].tolist()
    if _reserve([(file, size) for file in files]):
        return lambda position: _remembered(files[position], size)
    rows = _stored(table, size) if {"path", "sha256"} <= set(table.columns) else None
    if rows is None:
        return lambda position: read_image(files[position], size)

    whole = np.zeros(len(files), bool)  # once is enough: the check takes as long as a fifth of a view

    def picture(position: int) -> np.ndarray:
        pixels = rows[position, :-CHECK]
        if not whole[position] and _check(pixels) != bytes(rows[position, -CHECK:]):
            return read_image(files[position], size)
        whole[position] = True
        return pixels.reshape(size, size, 3)

    return picture


def free_memory() -> int:
    """Bytes that can be had without harm to other processes, within the container's limit where there is one."""
    free, info = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2, Path("/proc/meminfo")
    if info.exists():
        line = next(line for line in info.read_text().splitlines() if line.startswith("MemAvailable:"))
        free = 1024 * int(line.split()[1])
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and (most := limit.read_text().strip()) != "max":
        free = min(free, int(most) - int(limit.with_name("memory.current").read_text()))
    return free


def _reserve(keys: list[tuple[str, int]]) -> bool:
    """Set memory aside for pictures of one size, where there is enough beside what was set aside before.

    In one block, whose pages are larger: a new small page costs as much as decoding what fits on it.
    """
    new = [key for key in dict.fromkeys(keys) if key not in _memory]
    waiting = [*new, *(key for key in _memory if key not in _decoded)]
    if sum(3 * size**2 for _, size in waiting) > SHARE * free_memory():
        return False
    size = keys[0][1]
    _memory.update(zip(new, np.empty((len(new), size, size, 3), np.uint8), strict=True))
    return True


def _remembered(file: str, size: int) -> np.ndarray:
    pixels = _decoded.get((file, size))
    if pixels is None:
        place = _memory[file, size]
        place[...] = read_image(file, size)
        pixels = place.view()
        pixels.flags.writeable = False
        _decoded[file, size] = pixels
    return pixels


def _check(pixels: np.ndarray) -> bytes:
    return zlib.crc32(pixels).to_bytes(CHECK, "little")


def _stored(table: pd.DataFrame, size: int) -> np.ndarray | None:
    """The file's rows, uint8 [N, 3 * size**2 + CHECK]; it is written where it is not there or not whole.

    None, and a line that says so, where it can't be.
    """
    first = table.iloc[0]
    folder = Path(first["file"].removesuffix(first["path"])) / "cache"
    key = hashlib.sha256("\n".join(table["path"] + " " + table["sha256"].fillna("")).encode()).hexdigest()[:16]
    file, shape = folder / f"{size}-{key}.pictures", (len(table), 3 * size**2 + CHECK)
    try:
        if not file.exists() or file.stat().st_size != np.prod(shape):
            folder.mkdir(exist_ok=True)
            if shutil.disk_usage(folder).free < np.prod(shape):
                raise OSError(0, f"{np.prod(shape) / 1e9:.0f} GB are not free")
            _write(file, table["file"].tolist(), size)
        return np.memmap(file, np.uint8, "r", shape=shape)
    except OSError as error:
        tqdm.write(f"Decoded pictures can't be kept in {folder} ({error.strerror}): each is decoded every time.")
        return None


def _write(file: Path, pictures: list[str], size: int) -> None:
    def row(picture: str) -> bytes:
        try:
            pixels = read_image(picture, size)
        except ImageError:  # to be raised when it is asked for: 0 is not the CRC of zeros
            return bytes(3 * size**2 + CHECK)
        return pixels.tobytes() + _check(pixels)

    partial = file.with_suffix(f".{os.getpid()}.partial")
    try:
        with open(partial, "wb") as stream, ThreadPoolExecutor(os.cpu_count()) as pool:
            # In portions: the pool would otherwise read all of them before the first is written.
            for start in tqdm(
                range(0, len(pictures), 256), "decode", unit_scale=256, ncols=80, leave=False, disable=None
            ):
                stream.writelines(pool.map(row, pictures[start : start + 256]))
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)
