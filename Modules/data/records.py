"""A data set's pictures in a few large TFRecord files instead of many small ones, where disk or network want that.

    python -m Modules.data.records datasets/balanced

writes `datasets/balanced/records/`: shards that tensorflow-datasets can read (`tfds.builder_from_directory`), and
`index.csv`, where in which shard the bytes of each picture lie. From then on every command takes the pictures from
there, each by itself, so that batches are what they were: their order is the seed's, not the shards'. The pictures' own
files may then be removed; or `records/`, to go back.
"""

import os
import re
import shutil
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path

import pandas as pd

from Modules import cli

FOLDER, INDEX = "records", "index.csv"
PART = re.compile(r"(.+\.tfrecord-\d+-of-\d+)#(\d+)\+(\d+)")  # a slice of a shard: where it begins, how long it is
HEADER = struct.Struct("<QI")  # length of the data, its checksum; the data's own checksum, 4 bytes, follows it


def located(folder: Path, paths: Iterable[str]) -> list[str]:
    """Where the bytes of each of a data set's pictures are: a file, or a part of one that `read_part` knows.

    A path that the index does not have is a file's.
    """
    home = Path(folder) / FOLDER
    parts = {}
    if (home / INDEX).is_file():
        index = pd.read_csv(home / INDEX, dtype="str")
        parts = dict(zip(index["path"], str(home) + os.sep + index["part"], strict=True))
    return [parts.get(path, str(Path(folder) / path)) for path in paths]


def read_part(address: str) -> bytes | None:
    """The bytes of a part; None where `address` is a file. Raises OSError, and EOFError where the shard is cut off."""
    found = PART.fullmatch(address)
    if not found:
        return None
    with open(found[1], "rb") as stream:
        stream.seek(int(found[2]))
        data = stream.read(int(found[3]))
    if len(data) < int(found[3]):
        raise EOFError(f"{found[1]} is cut off")
    return data


def exists(address: str) -> bool:
    found = PART.fullmatch(address)
    return os.path.isfile(found[1] if found else address)


def write(folder: Path) -> int:
    """Write the records of the data set in `folder` and their index; how many pictures they hold.

    Raises:
        UserError: no data set, or its pictures' own files are not there.
    """
    from Modules.data.manifest import read_manifest  # which looks here for pictures

    manifest = read_manifest(folder, verify=True)
    used = manifest[manifest["split"] != "excluded"]
    absent = sum(not (folder / path).is_file() for path in used["path"])
    if absent:
        raise cli.UserError(f"{absent} pictures of {folder} have no files of their own: their records are all there is")
    print(f"Writing {len(used)} pictures as TFRecord")
    return write_table(folder, used)


def write_table(folder: Path, used: pd.DataFrame) -> int:
    """Write the records of the pictures in `folder` that a table of `path`, `isic_id`, `patient_id`, `target` and
    `split` names, and their index; how many there are."""
    import tensorflow_datasets as tfds  # takes seconds

    home, former = folder / "records.partial", folder / FOLDER
    shutil.rmtree(home, ignore_errors=True)
    tfds.disable_progress_bar()
    builder = _builder(folder, used, home)
    builder.download_and_prepare()
    shutil.rmtree(home / "downloads")
    rows = []
    for split, table in used.groupby("split", sort=False):
        records = (record for shard in builder.info.splits[split].filepaths for record in _records(Path(shard)))
        for path, (shard, start, data) in zip(table["path"], records, strict=True):
            picture = (folder / path).read_bytes()
            place = start + data.index(picture)
            rows.append((path, f"{shard.relative_to(home)}#{place}+{len(picture)}"))
    pd.DataFrame(rows, columns=["path", "part"]).to_csv(home / INDEX, index=False)
    shutil.rmtree(former, ignore_errors=True)
    home.replace(former)
    return len(rows)


def _builder(folder: Path, table: pd.DataFrame, home: Path):
    """The tensorflow-datasets builder of a data set in the Kaggle layout, once it has its manifest."""
    import tensorflow_datasets as tfds

    class Lesions(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        """Dermoscopic pictures of skin lesions, by the split that keeps patients apart."""

        VERSION = tfds.core.Version("1.0.0")

        def _info(self) -> tfds.core.DatasetInfo:
            text = tfds.features.Text()
            features = {
                "image": tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg"),
                "isic_id": text,
                "patient_id": text,
                "target": tfds.features.ClassLabel(names=["benign", "malignant"]),
            }
            # In the manifest's order: the index is made by it, and training has an order of its own.
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
            )

        def _split_generators(self, dl_manager) -> dict:
            return {split: self._generate_examples(rows) for split, rows in table.groupby("split", sort=False)}

        def _generate_examples(self, rows: pd.DataFrame) -> Iterator[tuple[int, dict]]:
            for number, row in enumerate(rows.itertuples()):
                patient = "" if pd.isna(row.patient_id) else row.patient_id
                yield (
                    number,
                    {
                        "image": str(folder / row.path),
                        "isic_id": row.isic_id,
                        "patient_id": patient,
                        "target": row.target,
                    },
                )

    return Lesions(data_dir=str(home))


def _records(shard: Path) -> Iterator[tuple[Path, int, bytes]]:
    """The data of each record of a TFRecord file, and where in it they begin."""
    with open(shard, "rb") as stream:
        while header := stream.read(HEADER.size):
            start, data = stream.tell(), stream.read(HEADER.unpack(header)[0])
            stream.seek(4, os.SEEK_CUR)
            yield shard, start, data


def main() -> None:
    parser = cli.Parser(prog="records.py", description=__doc__)
    parser.add_argument("folder", type=Path, help="a data set, with its manifest.csv")
    folder = parser.parse_args().folder
    print(f"Wrote {folder / FOLDER}: {write(folder)} pictures.")


if __name__ == "__main__":
    cli.run(main)
