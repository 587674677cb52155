"""Archives in shards: what predict.py says, each shard once, bad pictures as rows."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

pq = pytest.importorskip("pyarrow.parquet", exc_type=ImportError, reason="requirements-cluster.txt is not installed")

import pyarrow as pa  # noqa: E402

from Modules import archive, cli  # noqa: E402
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
    assert len(list((tmp_path / "bytes").glob("part-*"))) == 4  # one a row group
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


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["hash", "nowhere"], "can't use nowhere"),
        (["hash", "none/*.jpg"], "can't use none"),
        (["hash", "s4://bucket/x"], "can't use s4://bucket/x"),
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
    places = {"PICTURES": pictures, "FILE": tmp_path / "file", "OTHER": tmp_path / "other"}
    arguments = [str(places.get(argument, argument)) for argument in arguments]
    if "--output" not in arguments:
        arguments += ["--output", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["archive.py", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.run(archive.main)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert named in line
