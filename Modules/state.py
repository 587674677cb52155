"""What an unfinished run leaves on disk, its files of state, written so that no crash loses them; its folder's lock.

`write` puts a file of state beside its predecessor, which stays until the next one is whole; `read` falls back on it
where the newest is torn. A lock is held by the process, not by a file: it ends with the process, however that ends.
"""

import fcntl
import json
import os
from pathlib import Path
from typing import IO
from zipfile import ZipFile

import numpy as np
from tqdm import tqdm

from Modules.cli import UserError

_held: dict[Path, int] = {}  # folder: the open file that carries its lock


def lock(folder: Path) -> None:
    """Keep other processes from running in `folder` for as long as this one lives.

    Raises:
        UserError: another one runs there.
        OSError: the folder can't be written.
    """
    folder = folder.resolve()
    if folder in _held:
        return
    handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise UserError(
            f"another run is working in {folder}: wait for its end, or choose another folder with --checkpoints"
        ) from None
    _held[folder] = handle


def unfinished(folder: Path) -> list[Path]:
    """The files of state in `folder`: there are none where no run was cut off."""
    return sorted(folder.glob("state-*.npz"))


def exists(file: Path) -> bool:
    return file.exists() or _former(file).exists()


def forget(file: Path) -> None:
    """Remove a file of state and what stands in for it."""
    for path in (_former(file), _partial(file), file):
        path.unlink(missing_ok=True)


def write(file: Path, facts: dict, arrays: dict[str, list[np.ndarray]]) -> None:
    """Make `file` hold `facts` (of JSON's kinds) and named lists of arrays; the file before it is kept.

    Raises:
        UserError: the disk is full or fails; what was there before still is.
    """
    partial = _partial(file)
    try:
        with open(partial, "wb") as stream:
            pack(stream, facts, arrays)
            stream.flush()
            os.fsync(stream.fileno())
        if file.exists():
            file.replace(_former(file))
        partial.replace(file)
        sync(file.parent)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UserError(
            f"can't write {file} ({error.strerror or error}); the one before it is whole: make room, then --resume"
        ) from None


def read(file: Path) -> tuple[dict, dict[str, list[np.ndarray]]]:
    """What `write` made of `file` last, or, where that can't be read, the time before.

    Raises:
        UserError: neither can be read.
    """
    problem = "there is no such file"
    for path in (file, _former(file)):
        if not path.exists():
            continue
        try:
            with open(path, "rb") as stream:
                facts, arrays = unpack(stream)
        except Exception as error:  # torn bytes can fail anywhere in zipfile, NumPy and json
            problem = str(error)
            continue
        if path != file:
            path.replace(file)  # else the next `write` would keep the torn one in its place
            tqdm.write(f"{file} is torn: going on from the one before it")
        return facts, arrays
    raise UserError(f"{file} can't be resumed ({problem}); remove it to start anew")


def pack(stream: IO[bytes], facts: dict, arrays: dict[str, list[np.ndarray]]) -> None:
    """Write the content of a file of state. A list that stands under several names is written once."""
    owners: dict[int, str] = {}
    counts = {part: (owners.setdefault(id(values), part), len(values)) for part, values in arrays.items()}
    named = {"facts": np.array(json.dumps(facts)), "counts": np.array(json.dumps(counts))}
    named |= {f"{part}-{i}": value for part in owners.values() for i, value in enumerate(arrays[part])}
    # As np.savez does, which leaves an open archive behind where the disk is full.
    with ZipFile(stream, "w") as archive:
        for name, array in named.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)


def unpack(stream: IO[bytes]) -> tuple[dict, dict[str, list[np.ndarray]]]:
    """What `pack` wrote; any of several errors where it is torn."""
    with np.load(stream, allow_pickle=False) as saved:
        facts, counts = (json.loads(str(saved[name])) for name in ("facts", "counts"))
        # Reading a member to its end checks its CRC.
        lists = {owner: [saved[f"{owner}-{i}"] for i in range(count)] for owner, count in dict(counts.values()).items()}
        return facts, {part: lists[owner] for part, (owner, _) in counts.items()}


def publish(new: Path, folder: Path) -> None:
    """Move the files in `new` into `folder`, over those of their names; a JSON comes last and so says that all came."""
    for file in new.iterdir():
        with open(file, "rb") as stream:
            os.fsync(stream.fileno())
    for file in sorted(new.iterdir(), key=lambda file: file.suffix == ".json"):
        file.replace(folder / file.name)
    new.rmdir()
    sync(folder)


def sync(folder: Path) -> None:
    """Have the folder's list of names on disk too, not only the files."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _former(file: Path) -> Path:
    return file.with_suffix(".former.npz")


def _partial(file: Path) -> Path:
    return file.with_suffix(".partial")
