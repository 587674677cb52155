"""Pictures in TFRecord shards: the same batches as from files, readable by tensorflow-datasets, and checked."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from dataset import image_batches, load_manifest, select, training_batches
from Modules.cli import UserError
from Modules.config import RECIPES, Data, Recipe
from Modules.data import records
from Modules.data.images import ImageError, read_bytes, read_image

RECIPE = Recipe("test", Data(image_size=32, batch_size=16), RECIPES["lightweight"]().embedding)


@pytest.fixture(scope="module")
def both(balanced, tmp_path_factory):
    """A data set of files, and the same with records and without the files."""
    folder = tmp_path_factory.mktemp("records") / "data"
    shutil.copytree(balanced, folder)
    used = load_manifest(balanced)
    assert records.write(folder) == (used["split"] != "excluded").sum()
    for split in ("train", "validation", "test"):
        shutil.rmtree(folder / split)
    return balanced, folder


def test_the_batches_are_those_of_the_files_in_the_same_order(both):
    tables = [select(load_manifest(folder), "train") for folder in both]
    assert "tfrecord" in tables[1]["file"].iloc[0]
    for seed, start in ((0, 0), (7, 3)):
        streams = [training_batches(table, RECIPE, seed, start=start)[0].take(5) for table in tables]
        for one, other in zip(*(stream.as_numpy_iterator() for stream in streams), strict=True):
            for value, wanted in zip(one, other, strict=True):
                np.testing.assert_array_equal(value, wanted)
    for one, other in zip(*(image_batches(table, RECIPE.data).as_numpy_iterator() for table in tables), strict=True):
        np.testing.assert_array_equal(one[0], other[0])


def test_every_picture_is_checked_by_its_hash(both):
    load_manifest(both[1], verify=True)


def test_tensorflow_datasets_reads_them_too(both):
    files, folder = both
    builder = tfds.builder_from_directory(folder / "records" / "lesions" / "1.0.0")
    table = load_manifest(files)
    for split, rows in table[table["split"] != "excluded"].groupby("split"):
        read = list(tfds.as_numpy(builder.as_dataset(split=split)))
        assert [one["isic_id"].decode() for one in read] == rows["isic_id"].tolist()
        assert [one["target"] for one in read] == rows["target"].tolist()
        assert read[0]["image"].shape == read_image(rows["file"].iloc[0]).shape


def test_a_cut_or_changed_shard_is_one_line(both, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(both[1], folder)
    table = load_manifest(folder)
    last = table.loc[table["split"] == "train", "file"].iloc[-1]
    shard, _, part = last.partition("#")
    place = int(part.partition("+")[0])
    data = bytearray(Path(shard).read_bytes())
    with open(shard, "wb") as stream:
        stream.write(data[: place + 100])
    with pytest.raises(ImageError, match="is cut off"):
        read_bytes(last)
    data[place + 40] ^= 0xFF
    with open(shard, "wb") as stream:
        stream.write(data)
    with pytest.raises(UserError, match="another picture than was written"):
        load_manifest(folder, verify=True)
    shutil.rmtree(folder / "records")
    with pytest.raises(UserError, match="pictures are missing"):
        load_manifest(folder)


def test_records_are_not_made_of_records(both):
    with pytest.raises(UserError, match="no files of their own"):
        records.write(both[1])
