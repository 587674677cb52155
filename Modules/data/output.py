"""Write a data set's folder, whole or not at all: everything goes into a sibling that takes its place at the end."""

import fcntl
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from hashlib import sha256
from pathlib import Path

import pandas as pd
from tqdm import tqdm

from Modules.cli import UserError
from Modules.data.images import ImageError, encode_jpeg, read_image
from Modules.data.manifest import LABELS, is_data_set


def check_output(output: Path, sources: Sequence[Path]) -> None:
    """Raise UserError for an output folder that holds anything but a former data set, or lies in a source."""
    if output.exists() and not is_data_set(output) and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} holds something else than a data set of this script: move it away or name another")
    for source in sources:
        here, there = output.resolve(), Path(source).resolve()
        if here == there or here in there.parents or there in here.parents:
            raise UserError(
                f"--output {output} and {source} lie in each other: name an output folder beside the source"
            )


@contextmanager
def replacing(output: Path) -> Iterator[Path]:
    """An empty folder that takes the place of `output` when the block ends well; otherwise `output` stays as it was.

    Raises:
        UserError: another process is writing `output`, or it can't be written.
    """
    new, former, lock = (output.with_name(f".{output.name}.{state}") for state in ("partial", "former", "lock"))
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with open(lock, "w") as held:
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"another run is writing {output}: wait for its end, or name another folder") from None
            if former.exists() and not output.exists():  # of a run that was killed between the two renames below
                former.rename(output)
            for rest in (new, former):
                shutil.rmtree(rest, ignore_errors=True)
            new.mkdir()
            try:
                yield new
                if output.exists():
                    output.rename(former)
                new.rename(output)
                shutil.rmtree(former, ignore_errors=True)
            finally:
                shutil.rmtree(new, ignore_errors=True)
                lock.unlink(missing_ok=True)
    except (OSError, ImageError) as error:  # a picture may vanish after it was scanned
        raise UserError(f"cannot write {output}: {error}") from None


def write_pictures(images: pd.DataFrame, folder: Path, output: Path, size: int) -> pd.DataFrame:
    """Write every used image into `folder`, which becomes `output`; `images` with `path` and `sha256` as there.

    The path of an excluded image leads to its file in the source, empty where there is none.
    """
    used = images["split"] != "excluded"
    places = images["split"] + "/" + images["target"].map(dict(enumerate(LABELS))) + "/" + images["isic_id"] + ".jpg"
    files = [_relative(file, output) if isinstance(file, Path) else "" for file in images["file"]]
    images = images.assign(path=places.where(used, pd.Series(files, images.index)))
    for place in sorted({os.path.dirname(path) for path in places[used]}):
        (folder / place).mkdir(parents=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        hashes = pool.map(partial(_write_picture, folder=folder, size=size), images[used].itertuples())
        progress = tqdm(hashes, "write", int(used.sum()), unit=" images", ncols=80, disable=None)
        images.loc[used, "sha256"] = list(progress)
    return images


def _relative(file: Path, output: Path) -> str:
    return Path(os.path.relpath(file.parent.resolve() / file.name, output)).as_posix()


def _write_picture(row, folder: Path, size: int) -> str:
    """Write one picture and return its sha256: a hard link where nothing changes, else resized, as JPEG."""
    place = folder / row.path
    if row.plain and row.width == row.height == size:
        try:
            os.link(row.file.resolve(), place)
        except OSError:  # another file system
            shutil.copyfile(row.file, place)
        return row.sha256
    data = encode_jpeg(read_image(row.file, size))
    place.write_bytes(data)
    return sha256(data).hexdigest()
