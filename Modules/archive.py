"""Hash, embed or score an archive of any size, on this machine or a Ray cluster, in shards that are never done twice.

    python -m Modules.archive score pictures/ --output scores/
    python -m Modules.archive embed s3://bucket/lesions/ --output s3://bucket/embeddings/ --address ray://head:10001
    python -m Modules.archive hash list.parquet --output hashes/ --address local --workers 8

Pictures: folders, patterns and single files of any address that fsspec opens (a path, s3://, gs://), lists of them on
this machine (.txt, .csv as for predict.py), and Parquet with a column `path`, and with the pictures themselves where it
has a column `image` (binary). What is done with a picture is what predict.py does; one that can't be read is a row with
its `error`, but for those of a remote address that is out of reach for now: their shards stay missing.

--output gets `part-00000.parquet` and so on, each whole or not there: the same command again does the missing ones.
Without --address one process of this machine does it; `local` starts Ray on this machine; any other address is that of
a cluster (requirements-cluster.txt).
"""

from Modules import quiet  # noqa: F401, before TensorFlow

# isort: split
import argparse
import hashlib
import io
import json
import logging
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import IO, NamedTuple

import fsspec
import numpy as np
import tensorflow as tf
from fsspec.implementations.local import LocalFileSystem
from tqdm import tqdm

try:
    import pyarrow as pa
    import pyarrow.parquet as pq
except ImportError as error:  # absent, or one for NumPy 2, which some package brought along
    print(f"archive.py: {error}: install requirements-cluster.txt for Parquet", file=sys.stderr)
    sys.exit(2)

from Modules import cli
from Modules.cli import UserError
from Modules.data.duplicates import square
from Modules.data.hashing import decode_grey, phash
from Modules.data.images import BYTE_LIMIT, EXTENSIONS, SCANNED, ImageError, decode, examine, read_bytes, resize
from Modules.data.local_features import SIDE
from Modules.evaluation import evidence
from Modules.inputs import BATCH, LISTS, entries, read_batches
from Modules.predictions import row
from predict import load

ROOT = Path(__file__).parents[1]
EXCLUDED = [".git", ".venv*", "datasets", "checkpoints", "wandb", "tests", "benchmarks"]  # not sent to a cluster
TASKS = ("hash", "embed", "score")
SHARD = 1000  # pictures; a part takes a minute or so, and that is what a crash costs
NEIGHBOURS = 5  # known lesions to name, as predict.py does
MODEL, BESIDE = "best_epoch.keras", ("best_epoch.json", "gallery.npz")  # a checkpoint
Shard = dict  # number; paths, or parquet, group (of rows), first and rows: what a worker is sent

COLUMNS = {  # of Parquet, and what they may be
    "path": (pa.string(), pa.large_string(), pa.string_view()),
    "image": (pa.binary(), pa.large_binary(), pa.binary_view()),
}
TEXT, NUMBER = pa.string(), pa.float64()
NEIGHBOUR = pa.struct({"id": TEXT, "label": TEXT, "diagnosis": TEXT, "similarity": NUMBER})
SCHEMAS = {
    "hash": {"path": TEXT, "sha256": TEXT, "pixels": TEXT, "width": pa.int64(), "height": pa.int64()}
    | {"phash": pa.list_(pa.uint64()), "error": TEXT},
    "embed": {"path": TEXT, "embedding": pa.list_(pa.float32()), "error": TEXT},
    "score": {"path": TEXT, "probability": NUMBER, "probability_at_prevalence": NUMBER, "prediction": TEXT}
    | {"threshold": NUMBER, "in_distribution": pa.bool_(), "malignant_share": NUMBER}
    | {"neighbours": pa.list_(NEIGHBOUR), "error": TEXT},
}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(prog="archive.py", description=__doc__)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("pictures", nargs="+", metavar="ADDRESS", help="folders, patterns, pictures, lists, Parquet")
    parser.add_argument("--output", required=True, metavar="ADDRESS", help="a folder for the parts")
    parser.add_argument("--checkpoint", type=Path, default=Path("checkpoints/best_epoch.keras"))
    parser.add_argument("--address", help="local, or that of a Ray cluster (none: this process does it)")
    parser.add_argument("--workers", type=int, default=2, help="processes on Ray, a core each (2)")
    parser.add_argument("--shard", type=int, default=SHARD, help=f"pictures in a part ({SHARD})")
    options = parser.parse_args(arguments)
    if options.workers < 1 or options.shard < 1:
        raise UserError("--workers and --shard: expected 1 or more")
    return options


# == What there is to do ===============================================================================================


def find_shards(addresses: Iterable[str], size: int) -> Iterator[Shard]:
    """The shards of all pictures, in an order that is always the same: at most `size` of them, of one row group each
    where they lie in Parquet.

    Raises:
        UserError: an address that can't be opened, or where there is no picture.
    """
    number, waiting = 0, []
    for found in _find(addresses):
        if isinstance(found, str):
            waiting.append(found)
        if waiting and (len(waiting) == size or not isinstance(found, str)):
            yield {"number": number, "paths": waiting}
            number, waiting = number + 1, []
        if not isinstance(found, str):
            for first in range(0, found["rows"], size):
                yield found | {"number": number, "first": first, "rows": min(size, found["rows"] - first)}
                number += 1
    if waiting:
        yield {"number": number, "paths": waiting}


def _find(addresses: Iterable[str]) -> Iterator[str | Shard]:
    for address in addresses:
        try:
            yield from _find_in(address)
        except UserError:
            raise
        except Exception as error:  # a cloud's own errors have no base in common
            raise UserError(f"can't use {address} ({_first_line(error)}): expected pictures, see --help") from None


def _find_in(address: str) -> Iterator[str | Shard]:
    system, path = fsspec.core.url_to_fs(address)
    suffix = os.path.splitext(path)[1].lower()
    local = isinstance(system, LocalFileSystem)
    if suffix in LISTS:
        if not local:
            raise UserError(f"{address}: a list must be a file of this machine; copy it here, or use Parquet")
        yield from (name if "://" in name else str(Path(path).parent / name) for name in entries(Path(path)))
    elif suffix == ".parquet":
        with system.open(path) as stream:
            table = pq.ParquetFile(stream)
            _check_columns(table.schema_arrow)
            for group in range(table.num_row_groups):
                if "image" in table.schema_arrow.names:
                    yield {"parquet": address, "group": group, "rows": table.metadata.row_group(group).num_rows}
                else:
                    yield from (path or "" for path in table.read_row_group(group, ["path"])["path"].to_pylist())
    else:
        found = sorted(system.glob(path)) if any(sign in path for sign in "*?[") else None
        found = found or (sorted(system.find(path)) if system.isdir(path) else [path] if system.exists(path) else [])
        pictures = [one for one in found if one.lower().endswith(EXTENSIONS)] if found != [path] else found
        if not pictures:
            raise FileNotFoundError("no picture there")
        yield from pictures if local else map(system.unstrip_protocol, pictures)


def _check_columns(schema: pa.Schema) -> None:
    if "path" not in schema.names:
        raise ValueError("no column `path`")
    for name in COLUMNS.keys() & set(schema.names):
        if (kind := schema.field(name).type) not in COLUMNS[name]:
            raise ValueError(f"its column `{name}` is {kind}, not {COLUMNS[name][0]}")


def part(shard: Shard) -> str:
    return f"part-{shard['number']:05}.parquet"


# == What a worker does ================================================================================================


class Worker:
    """Does shards, one after another, each into its part; memory does not grow with their number."""

    def __init__(self, task: str, output: str, model: dict[str, bytes], cores: int = 0):
        """model: the files of a checkpoint by their names. cores: those that are its own, 0: all."""
        self.task, self.output = task, output
        self.readers = 2 * cores or None  # one waits while another decodes
        self.system, self.folder = fsspec.core.url_to_fs(output)
        if task != "hash":
            self.checkpoint = _open(model, cores)

    def __call__(self, shard: Shard) -> dict:
        """Write the part of a shard, unless it is there; returns its number, pictures and errors, and why there is no
        part if something remote is out of reach."""
        known = {"number": shard["number"], "pictures": 0, "errors": 0, "failed": ""}
        target = f"{self.folder}/{part(shard)}"
        if self.system.exists(target):
            return known
        schema = pa.schema(SCHEMAS[self.task])
        stream, pictures, errors = io.BytesIO(), 0, 0
        try:
            with pq.ParquetWriter(stream, schema) as writer:
                for rows in getattr(self, self.task)(shard):
                    writer.write_table(pa.Table.from_pylist(rows, schema=schema))
                    pictures, errors = pictures + len(rows), errors + sum(one["error"] is not None for one in rows)
        except OutOfReach as error:
            return known | {"failed": str(error)}
        partial = f"{self.folder}/.{part(shard)}.{os.getpid()}"
        self.system.pipe_file(partial, stream.getvalue())
        self.system.mv(partial, target)
        return known | {"pictures": pictures, "errors": errors}

    def score(self, shard: Shard) -> Iterator[list[dict]]:
        batches = read_batches(_sources(shard), self.checkpoint.size, _picture, self.readers)
        for batch in evidence.judge_batches(self.checkpoint, batches, NEIGHBOURS, at_once=1):
            yield [row(source.path, found, self.checkpoint.threshold) for source, _, found in batch]

    def embed(self, shard: Shard) -> Iterator[list[dict]]:
        for batch in read_batches(_sources(shard), self.checkpoint.size, _picture, self.readers):
            pictures = [picture for _, picture in batch if not isinstance(picture, ImageError)]
            vectors = iter(self.checkpoint.run(np.stack(pictures).astype(np.float32))[1].numpy() if pictures else ())
            yield [
                {"path": source.path, "embedding": None, "error": str(picture)}
                if isinstance(picture, ImageError)
                else {"path": source.path, "embedding": next(vectors), "error": None}
                for source, picture in batch
            ]

    def hash(self, shard: Shard) -> Iterator[list[dict]]:
        for batch in read_batches(_sources(shard), 0, _hashes, self.readers):
            yield [
                dict.fromkeys(SCHEMAS["hash"])
                | {"path": source.path}
                | ({"error": str(found)} if isinstance(found, ImageError) else found)
                for source, found in batch
            ]


class OutOfReach(Exception):
    """Something remote could not be read, which may be different the next time; its one line says why."""


class Source(NamedTuple):
    """A picture's address, and its bytes where they have come with it."""

    path: str
    data: bytes | None = None


def _sources(shard: Shard) -> Iterator[Source]:
    if "paths" in shard:
        yield from map(Source, shard["paths"])
        return
    try:
        with fsspec.open(shard["parquet"]) as stream:
            yield from islice(_in_group(stream, shard["group"]), shard["first"], shard["first"] + shard["rows"])
    except Exception as error:  # as in _find
        raise OutOfReach(f"{shard['parquet']}: {_first_line(error)}") from None


def _in_group(stream: IO[bytes], group: int) -> Iterator[Source]:
    for batch in pq.ParquetFile(stream).iter_batches(BATCH, row_groups=[group], columns=["path", "image"]):
        for path, data in zip(batch["path"].to_pylist(), batch["image"].to_pylist(), strict=True):
            yield Source(path or "", data or b"")


def _fetch(source: Source) -> bytes:
    """Raises ImageError where there is no such picture, OutOfReach where that can't be said."""
    if not source.path:
        raise ImageError("no path")
    if source.data is not None:
        return source.data
    if "://" not in source.path:
        return read_bytes(source.path)
    try:
        system, path = fsspec.core.url_to_fs(source.path)
        if isinstance(system, LocalFileSystem):
            return read_bytes(path)
        if (size := system.size(path)) is not None and size > BYTE_LIMIT:
            raise ImageError(f"{size:,} bytes (at most {BYTE_LIMIT:,})")
        return system.cat_file(path)
    except ImageError:
        raise
    except (FileNotFoundError, ValueError) as error:  # no such picture, or no address
        raise ImageError(_first_line(error)) from None
    except Exception as error:  # as in _find
        raise OutOfReach(f"{source.path}: {_first_line(error)}") from None


def _picture(source: Source, size: int) -> np.ndarray:
    return resize(decode(_fetch(source)), size)


def _hashes(source: Source, _: int) -> dict:
    """Of a picture that the scan of a data set would take; raises ImageError with its reason for another."""
    data = _fetch(source)
    seen = dict(zip(SCANNED, examine(data, os.path.splitext(source.path)[1].lower()), strict=True))
    if seen["reason"]:
        raise ImageError(seen["reason"].removeprefix("unreadable: "))
    names = ("sha256", "pixels", "width", "height")
    return {name: seen[name] for name in names} | {"phash": phash(square(decode_grey(data, SIDE)))}


def _open(model: dict[str, bytes], cores: int) -> evidence.Checkpoint:
    """The checkpoint that consists of these files."""
    if cores:
        tf.config.threading.set_intra_op_parallelism_threads(cores)
        tf.config.threading.set_inter_op_parallelism_threads(cores)
    with tempfile.TemporaryDirectory() as folder:
        for name, data in model.items():
            Path(folder, name).write_bytes(data)
        return evidence.open_checkpoint(*load(Path(folder, MODEL), trust=False))


# == All shards, by this process or by Ray =============================================================================


def claim(options: argparse.Namespace, shards: list[Shard], model: dict[str, bytes]) -> set[str]:
    """The parts that are done already; makes the folder and writes what its job is.

    Raises:
        UserError: the folder can't be written, or it holds the parts of another job.
    """
    facts = {
        "task": options.task,
        "shards": len(shards),
        "pictures": hashlib.sha256(json.dumps(shards).encode()).hexdigest(),
        "model": {name: hashlib.sha256(data).hexdigest() for name, data in model.items()},
    }
    try:
        system, folder = fsspec.core.url_to_fs(options.output)
        system.makedirs(folder, exist_ok=True)
        job = f"{folder}/job.json"
        if system.exists(job) and (former := json.loads(system.cat_file(job))) != facts:
            other = ", ".join(name for name, value in facts.items() if former.get(name) != value)
            raise UserError(f"{options.output} is of a job with other {other}: name another --output, or empty it")
        system.pipe_file(job, json.dumps(facts, indent=2).encode())
        return {os.path.basename(file) for file in system.glob(f"{folder}/part-*.parquet")}
    except UserError:
        raise
    except Exception as error:  # as in _find
        raise UserError(f"can't use --output {options.output} ({_first_line(error)}): expected a folder") from None


def work(options: argparse.Namespace, shards: list[Shard], model: dict[str, bytes]) -> Iterator[dict]:
    """What `Worker` says of each shard, in the order they are done."""
    if options.address is None:
        yield from map(Worker(options.task, options.output, model), shards)
        return
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # it warns of what a restart of the job mends
    try:
        import ray.data
    except ImportError:
        raise UserError("--address needs Ray: pip install -r requirements-cluster.txt") from None

    away = options.address != "local"
    runtime = {"working_dir": str(ROOT), "excludes": EXCLUDED} if away else {"env_vars": {"PYTHONPATH": str(ROOT)}}
    try:
        ray.init(
            options.address,
            runtime_env=runtime,
            num_cpus=None if away else options.workers,
            include_dashboard=None if away else False,
            log_to_driver=False,
            logging_level="ERROR",
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        reason = _first_line(error)
        raise UserError(f"no Ray at --address {options.address} ({reason}): expected local, or host:port") from None
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    done = ray.data.from_items(shards, override_num_blocks=len(shards)).map(
        Worker,
        fn_constructor_args=(options.task, options.output, model, 1),
        concurrency=min(options.workers, len(shards)),
        num_cpus=1,
    )
    yield from done.iter_rows()
    ray.shutdown()


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def main() -> None:
    options = parse()
    model = {}
    if options.task != "hash":
        load(options.checkpoint, trust=False)  # what is wrong with it is said before anything else is done
        files = (options.checkpoint, *map(options.checkpoint.with_name, BESIDE))
        model = {name: file.read_bytes() for name, file in zip((MODEL, *BESIDE), files, strict=True)}
    options.output = options.output if "://" in options.output else os.path.abspath(options.output)
    shards = list(find_shards(options.pictures, options.shard))
    done = claim(options, shards, model)
    missing = [shard for shard in shards if part(shard) not in done]
    total = sum(shard.get("rows") or len(shard["paths"]) for shard in missing)
    print(f"{len(shards)} shards, {len(shards) - len(missing)} of them done; {total} pictures to {options.task}")
    pictures, errors, failed = 0, 0, []
    if missing:
        with tqdm(total=total, desc=options.task, unit="image", leave=False, ncols=80, disable=None) as bar:
            for one in work(options, missing, model):
                pictures, errors = pictures + one["pictures"], errors + one["errors"]
                failed += [one["failed"]] if one["failed"] else []
                bar.update(one["pictures"])
    print(f"{pictures} pictures done, {errors} could not be read; see {options.output}")
    if failed:
        raise UserError(f"{len(failed)} of {len(missing)} shards not done ({failed[0]}): the same command does them")


if __name__ == "__main__":
    cli.run(main)
