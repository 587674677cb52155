"""Archives in shards: what predict.py says, each shard once, bad pictures as rows."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

pq = pytest.importorskip("pyarrow.parquet", exc_type=ImportError, reason="requirements-cluster.txt is not installed")

import fsspec  # noqa: E402
import pyarrow as pa  # noqa: E402

from Modules import archive, cli, inputs  # noqa: E402
from Modules.data.duplicates import _describe  # noqa: E402
from Modules.data.images import scan  # noqa: E402
from tests.commands import ROOT, run  # noqa: E402


@pytest.fixture(scope="module")
def pictures(balanced, tmp_path_factory):
    """Nine pictures and one that is none."""
    folder = tmp_path_factory.mktemp("pictures")
    for file in sorted((balanced / "test").rglob("*.jpg"))[:9]:
        shutil.copy(file, folder / file.name)
    (folder / "ISIC_broken.jpg").write_bytes(b"junk")
    return folder


def do(task, *arguments, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["archive.py", task, *map(str, arguments)])
    archive.main()


def rows(folder):
    return [row for file in sorted(folder.glob("part-*.parquet")) for row in pq.read_table(file).to_pylist()]


@pytest.fixture(scope="module")
def predicted(trained, pictures, tmp_path_factory):
    home = tmp_path_factory.mktemp("predicted")
    run("predict.py", pictures, "--checkpoint", trained / "best_epoch.keras", "--output", "p.jsonl", cwd=home)
    return [json.loads(line) for line in (home / "p.jsonl").read_text().splitlines()]


def assert_scores(scored, predicted):
    assert len(scored) == len(predicted) == 10
    for one, other in zip(scored, predicted, strict=True):
        for name, value in other.items():
            wanted = pytest.approx(value, abs=2e-6) if isinstance(value, float) else value
            if name not in ("neighbours", "malignant_share"):  # the last bits, which go with the batch, decide a tie
                assert one[name] == wanted, name
        similarities = [[near["similarity"] for near in row["neighbours"]] for row in (one, other)]
        np.testing.assert_allclose(*similarities, atol=1e-5)
    assert sum(row["error"] is not None for row in scored) == 1


def test_scores_are_those_of_predict(trained, pictures, predicted, tmp_path, monkeypatch):
    model = ("--checkpoint", trained / "best_epoch.keras", "--shard", 4)
    do("score", pictures, "--output", tmp_path / "out", *model, monkeypatch=monkeypatch)
    assert len(list((tmp_path / "out").glob("part-*"))) == 3
    assert_scores(rows(tmp_path / "out"), predicted)

    parts = {"path": [str(file) for file in sorted(pictures.iterdir())]}
    parts["image"] = [file.read_bytes() for file in sorted(pictures.iterdir())]
    pq.write_table(pa.table(parts), tmp_path / "in.parquet", row_group_size=3)
    do("score", tmp_path / "in.parquet", "--output", tmp_path / "bytes", *model, monkeypatch=monkeypatch)
    assert len(list((tmp_path / "bytes").glob("part-*"))) == 4  # one a row group, or a part of it
    assert_scores(rows(tmp_path / "bytes"), predicted)


def test_ray_gives_the_same_and_does_what_is_missing_alone(trained, pictures, predicted, tmp_path):
    pytest.importorskip("ray", reason="requirements-cluster.txt is not installed")
    command = [sys.executable, "-m", "Modules.archive", "score", pictures, "--output", tmp_path / "out"]
    command += ["--checkpoint", trained / "best_epoch.keras", "--shard", 4, "--address", "local", "--workers", 2]

    def launch():
        done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "0 of them done" in launch()
    assert_scores(rows(tmp_path / "out"), predicted)
    (tmp_path / "out" / "part-00001.parquet").unlink()
    before = {file: file.stat() for file in (tmp_path / "out").glob("part-*")}
    assert "3 shards, 2 of them done; 4 pictures to score" in launch()
    assert all(file.stat() == former for file, former in before.items())
    assert_scores(rows(tmp_path / "out"), predicted)


def test_a_part_is_whole_or_not_there_and_no_shard_is_done_twice(pictures, tmp_path, monkeypatch):
    class PowerFailure(Exception):
        pass

    pieces, former = [], archive.Worker.__call__

    def fails_at_the_third(self, shard):
        if len(pieces) == 2:
            raise PowerFailure
        pieces.append(shard["number"])
        return former(self, shard)

    arguments = (pictures, "--output", tmp_path / "out", "--shard", 2)
    monkeypatch.setattr(archive.Worker, "__call__", fails_at_the_third)
    with pytest.raises(PowerFailure):
        do("hash", *arguments, monkeypatch=monkeypatch)
    monkeypatch.setattr(
        archive.Worker, "__call__", lambda self, shard: pieces.append(shard["number"]) or former(self, shard)
    )
    do("hash", *arguments, monkeypatch=monkeypatch)
    assert pieces == [0, 1, 2, 3, 4]
    assert {file.name for file in (tmp_path / "out").iterdir()} == {f"part-0000{i}.parquet" for i in range(5)} | {
        "job.json"
    }


def test_hashes_and_embeddings_are_those_of_one_machine(trained, pictures, tmp_path, monkeypatch):
    do("hash", f"{pictures}/*.jpg", "--output", tmp_path / "hash", monkeypatch=monkeypatch)
    files = sorted(map(str, pictures.glob("*.jpg")))
    seen = scan(files, progress=False)
    for row, file, (_, wanted) in zip(rows(tmp_path / "hash"), files, seen.iterrows(), strict=True):
        assert row["path"] == file
        if row["error"] is None:
            assert [row["sha256"], row["width"]] == [wanted["sha256"], wanted["width"]]
            np.testing.assert_array_equal(row["phash"], _describe(file)[0])
        else:
            assert row["error"] in wanted["reason"]

    model = ("--checkpoint", trained / "best_epoch.keras")
    do("embed", pictures, "--output", tmp_path / "embed", *model, monkeypatch=monkeypatch)
    vectors = [row["embedding"] for row in rows(tmp_path / "embed") if row["error"] is None]
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def test_row_groups_are_cut_into_shards(pictures, tmp_path, monkeypatch):
    files = sorted(pictures.iterdir())
    table = pa.table({"image": [file.read_bytes() for file in files], "path": [file.name for file in files]})
    pq.write_table(table, tmp_path / "in.parquet", row_group_size=7)
    arguments = (tmp_path / "in.parquet", "--output", tmp_path / "out", "--shard", 3)
    do("hash", *arguments, monkeypatch=monkeypatch)
    parts = [pq.read_table(file)["path"].to_pylist() for file in sorted((tmp_path / "out").glob("part-*"))]
    names = [file.name for file in files]
    assert parts == [names[:3], names[3:6], names[6:7], names[7:]]
    do("hash", pictures, "--output", tmp_path / "files", monkeypatch=monkeypatch)
    assert [row["sha256"] for row in rows(tmp_path / "out")] == [row["sha256"] for row in rows(tmp_path / "files")]


@pytest.mark.parametrize("with_pictures", [True, False])
def test_a_row_without_a_path_has_an_error(with_pictures, pictures, tmp_path, monkeypatch):
    file = min(pictures.glob("*.jpg"))
    columns = {"path": [str(file), None]} | ({"image": [file.read_bytes()] * 2} if with_pictures else {})
    pq.write_table(pa.table(columns), tmp_path / "in.parquet")
    do("hash", tmp_path / "in.parquet", "--output", tmp_path / "out", monkeypatch=monkeypatch)
    assert [(row["path"], row["error"]) for row in rows(tmp_path / "out")] == [(str(file), None), ("", "no path")]


@pytest.fixture
def bucket(pictures):
    """The address of a folder in memory, which is as remote as a cloud's, with the pictures."""
    system = fsspec.filesystem("memory")
    system.put(str(pictures), "/bucket", recursive=True)
    yield "memory://bucket"
    system.rm("/bucket", recursive=True)


def test_lists_may_name_addresses(bucket, pictures, tmp_path, monkeypatch):
    file = min(pictures.glob("*.jpg"))
    (tmp_path / "here.jpg").write_bytes(file.read_bytes())
    listing = [f"{bucket}/{file.name}", "here.jpg", (tmp_path / "here.jpg").as_uri(), f"{bucket}/gone.jpg"]
    (tmp_path / "list.txt").write_text("\n".join(listing))
    do("hash", tmp_path / "list.txt", "--output", tmp_path / "out", monkeypatch=monkeypatch)
    found = rows(tmp_path / "out")
    assert [row["path"] for row in found] == [listing[0], str(tmp_path / "here.jpg"), *listing[2:]]
    assert [row["error"] is None for row in found] == [True, True, True, False]
    assert len({row["sha256"] for row in found[:3]}) == 1


class CloudError(Exception):
    """Of no kind that others know, as botocore's and gcsfs's."""


@pytest.mark.parametrize("error", [CloudError("no credentials"), ConnectionError("reset"), PermissionError("expired")])
def test_what_is_out_of_reach_is_done_by_the_next_call(error, bucket, pictures, tmp_path, monkeypatch, capsys):
    system, gone = type(fsspec.filesystem("memory")), min(pictures.iterdir()).name

    def cat_file(self, path, *rest, **options):
        if path.endswith(gone):
            raise error
        return former(self, path, *rest, **options)

    former = system.cat_file
    arguments = (bucket, "--output", tmp_path / "out", "--shard", 4)
    with monkeypatch.context() as patch:
        patch.setattr(system, "cat_file", cat_file)
        with pytest.raises(cli.UserError, match=f"1 of 3 shards not done .*{gone}: {error}"):
            do("hash", *arguments, monkeypatch=monkeypatch)
    assert {file.name for file in (tmp_path / "out").glob("*.parquet")} == {"part-00001.parquet", "part-00002.parquet"}
    capsys.readouterr()
    do("hash", *arguments, monkeypatch=monkeypatch)
    assert "3 shards, 2 of them done; 4 pictures to hash" in capsys.readouterr().out
    assert [row["error"] is None for row in rows(tmp_path / "out")] == [True] * 9 + [False]


def test_local_files_that_cannot_be_read_are_rows(pictures, tmp_path, monkeypatch):
    def denied(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("Modules.data.images.read_part", denied)
    do("hash", pictures, "--output", tmp_path / "out", monkeypatch=monkeypatch)
    assert [row["error"] for row in rows(tmp_path / "out")] == ["Permission denied"] * 10


@pytest.mark.parametrize("method", ["exists", "find"])
def test_a_cloud_that_refuses_is_one_line(method, bucket, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise CloudError("no credentials\nat all")

    system = type(fsspec.filesystem("memory"))
    monkeypatch.setattr(system, method, refuse)
    address = f"{bucket}/a.jpg" if method == "exists" else bucket
    with pytest.raises(cli.UserError, match=rf"can't use {address} \(no credentials\)"):
        do("hash", address, "--output", tmp_path / "out", monkeypatch=monkeypatch)
    monkeypatch.setattr(system, "makedirs", refuse)
    with pytest.raises(cli.UserError, match=r"can't use --output .* \(no credentials\)"):
        archive.claim(archive.parse(["hash", "x", "--output", bucket]), [], {})


def test_a_worker_with_a_core_of_its_own_has_two_threads_to_read(pictures, tmp_path, monkeypatch):
    taken, pool = [], inputs.ThreadPoolExecutor
    monkeypatch.setattr(inputs.os, "cpu_count", lambda: 7)
    monkeypatch.setattr(inputs, "ThreadPoolExecutor", lambda threads: taken.append(threads) or pool(threads))
    (tmp_path / "out").mkdir()
    for number, cores in enumerate((1, 0)):
        archive.Worker("hash", str(tmp_path / "out"), {}, cores)({"number": number, "paths": []})
    assert taken == [2, 7]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["hash", "nowhere"], "can't use nowhere"),
        (["hash", "none/*.jpg"], "can't use none"),
        (["hash", "s4://bucket/x"], "can't use s4://bucket/x"),
        (["hash", "memory://bucket/list.csv"], "copy it here, or use Parquet"),
        (["hash", "STRUCT"], "its column `image` is struct<bytes: binary, path: string>, not binary"),
        (["hash", "NUMBERS"], "its column `path` is int64, not string"),
        (["hash", "PICTURES", "--shard", "0"], "1 or more"),
        (["hash", "PICTURES", "--output", "FILE"], "expected a folder"),
        (["hash", "PICTURES", "--output", "OTHER"], "another --output"),
        (["score", "PICTURES", "--checkpoint", "none.keras"], "none.keras"),
        (["guess", "PICTURES"], "guess"),
    ],
)
def test_wrong_input_is_one_line(arguments, named, pictures, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "job.json").write_text('{"task": "score"}')
    pictures_in_structs = pa.table({"path": ["a"], "image": [{"bytes": b"", "path": "a"}]})
    pq.write_table(pictures_in_structs, tmp_path / "struct.parquet")
    pq.write_table(pa.table({"path": [1]}), tmp_path / "numbers.parquet")
    places = {"STRUCT": tmp_path / "struct.parquet", "NUMBERS": tmp_path / "numbers.parquet"}
    places |= {"PICTURES": pictures, "FILE": tmp_path / "file", "OTHER": tmp_path / "other"}
    arguments = [str(places.get(argument, argument)) for argument in arguments]
    if "--output" not in arguments:
        arguments += ["--output", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["archive.py", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.run(archive.main)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert named in line
