"""Malformed files of every kind through predict.py and train.py: a row or a line each, never a traceback.

generate_balanced_dataset.py meets the same corpora in test_generate_balanced_dataset.py, model files are hostile in
Modules/test_safe_model.py.
"""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import requests

from Modules.data.manifest import manifest_sha256
from tests.commands import ROOT, fails, run
from tests.Modules.data import malformed
from tests.Modules.hostile import Pickled

BROKEN, ODD = malformed.broken(), malformed.odd()
SMALL = {"one-pixel", "eight-pixels", "strip", "black", "white", "nearly-grey", "transparent"}  # readable all the same


def test_every_malformed_picture_gets_its_row(trained, tmp_path):
    folder = tmp_path / "inbox"
    folder.mkdir()
    special = malformed.write_special(folder)
    for name, (data, _) in {**BROKEN, **ODD}.items():
        (folder / f"{name}.jpg").write_bytes(data)
    files = sorted(folder.iterdir())
    assert len(BROKEN) + len(special) >= 50
    said = run("predict.py", *files, "--checkpoint", trained / "best_epoch.keras", cwd=tmp_path)
    table = pd.read_csv(tmp_path / "predictions.csv", dtype=str)
    table.index = table["path"].map(lambda path: path.split("/")[-1].removesuffix(".jpg"))
    assert set(table.index) == {file.stem for file in files} - {"a-folder"}  # a folder without a picture: no row
    unreadable = (BROKEN.keys() | special.keys()) - SMALL - {"a-folder"}
    assert set(table.index[table["error"].notna()]) == unreadable
    for name, (_, word) in BROKEN.items():
        if name in unreadable:
            assert word in table.loc[name, "error"], name
    scored = table[table["error"].isna()]
    assert scored["probability"].dropna().astype(float).between(0, 1).all()
    assert scored["prediction"].notna().all()
    assert f"{len(scored)} of {len(table)} pictures scored" in said
    assert max(map(len, said.splitlines())) <= 80


@pytest.fixture(scope="module")
def page(trained, tmp_path_factory):
    """The address of the page. It must end well and have nothing to say."""
    folder = tmp_path_factory.mktemp("page")
    command = [sys.executable, str(ROOT / "predict.py"), "--serve", "--port", "0"]
    command += ["--checkpoint", str(trained / "best_epoch.keras")]
    environment = os.environ | {"TMPDIR": str(folder)}
    with (
        open(folder / "said", "w") as said,
        subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=said, text=True) as server,
    ):
        yield server.stdout.readline().split()[0]
        server.terminate()
    assert server.returncode in (0, 143)
    assert "Traceback" not in (folder / "said").read_text()
    assert [path.name for path in folder.iterdir() if path.is_dir()] == []  # no upload is left


def test_every_malformed_picture_is_answered_by_the_page(page):
    for name, (data, word) in {**BROKEN, **ODD}.items():
        answer = requests.post(f"{page}/predict", files={"file": (f"{name}.jpg", data)}, timeout=60)
        readable = name in SMALL or name in ODD
        assert answer.status_code == (200 if readable else 422), name
        assert readable == (answer.json()["error"] is None), name
        assert readable or word in answer.json()["error"], name
        assert "\n" not in (answer.json()["error"] or "")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"data": {"file": "a text"}},
        {"files": {"picture": b"under another name"}},
        {"data": b"no form"},
        {"data": b"--x", "headers": {"Content-Type": "multipart/form-data; boundary=x"}},
        {"data": b"no form", "headers": {"Content-Type": "multipart/form-data"}},
        {"data": b"{", "headers": {"Content-Type": "application/json"}},
        {"files": {"file": ("../../../etc/passwd", b"no picture")}},
        {"files": {"file": ("a" * 5000, b"no picture")}},
        {"files": {"file": b"\0" * (21 * 2**20)}},
    ],
)
def test_a_malformed_request_is_answered(options, page):
    answer = requests.post(f"{page}/predict", **options, timeout=60)
    assert answer.status_code in (400, 413, 422)
    assert "Traceback" not in answer.text
    assert requests.get(f"{page}/healthz", timeout=60).json() == {"status": "ok"}


@pytest.mark.parametrize(
    "path",
    ["/file=/etc/passwd", "/gradio_api/file=/etc/passwd", "/..%2f..%2f..%2fetc/passwd", "/static/..%2f..%2fetc/passwd"],
)
def test_no_path_from_a_request_is_opened(path, page):
    answer = requests.get(page + path, timeout=60)
    assert answer.status_code >= 400
    assert "root:" not in answer.text


# --- What lies beside the model ---------------------------------------------------------------------------------------


def without(key):
    return lambda facts: {name: value for name, value in facts.items() if name != key}


FACTS = {
    "empty": lambda facts: "",
    "blank": lambda facts: " \n",
    "text": lambda facts: "no JSON",
    "cut": lambda facts: json.dumps(facts)[:-20],
    "binary": lambda facts: "\udcff\udcfe",
    "a-list": lambda facts: [facts],
    "a-number": lambda facts: 3,
    "null": lambda facts: None,
    "deep": lambda facts: "[" * 10**6,
    **{f"no-{key}": without(key) for key in ("config", "threshold", "data", "fold", "manifest_sha256", "sha256")},
    "no-limit": lambda facts: facts | {"in_distribution": {}},
    "threshold-of-another-kind": lambda facts: facts | {"threshold": "high"},
    "unknown-field": lambda facts: facts | {"config": {"data": {"secret": 1}}},
    "config-of-another-kind": lambda facts: facts | {"config": {"data": [1, 2]}},
    "hash-of-another-kind": lambda facts: facts | {"sha256": [1]},
}


@pytest.fixture
def copy(trained, tmp_path):
    """The files of a training, one's own."""
    return shutil.copytree(trained, tmp_path / "checkpoints") / "best_epoch.keras"


@pytest.mark.parametrize("name", FACTS)
def test_a_malformed_json_beside_the_model_is_one_line(name, copy, monkeypatch, capsys):
    file = copy.with_suffix(".json")
    content = FACTS[name](json.loads(file.read_text()))
    file.write_text(content if isinstance(content, str) else json.dumps(content), errors="surrogateescape")
    line = fails("predict", "--checkpoint", copy, monkeypatch=monkeypatch, capsys=capsys)
    assert "best_epoch" in line
    assert len(line) < 600


def one_array(file):
    np.save(file.with_suffix(".npy"), np.zeros(3))
    file.with_suffix(".npy").replace(file)


def pickled(file):
    np.savez(file, embeddings=np.array([Pickled(file.with_name("canary"))], dtype=object))


GALLERIES = {
    "absent": lambda file: file.unlink(),
    "a-folder": lambda file: (file.unlink(), file.mkdir()),
    "empty": lambda file: file.write_bytes(b""),
    "text": lambda file: file.write_text("no arrays"),
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-50]),
    "other-arrays": lambda file: np.savez(file, something=np.zeros(3)),
    "pickled": pickled,
    "one-array": one_array,
}


@pytest.mark.parametrize("name", GALLERIES)
def test_a_malformed_gallery_is_one_line(name, copy, monkeypatch, capsys):
    file = copy.with_name("gallery.npz")
    GALLERIES[name](file)
    for trust in ([], ["--trust"]):
        line = fails("predict", "--checkpoint", copy, *trust, monkeypatch=monkeypatch, capsys=capsys)
        assert "gallery" in line
    assert not file.with_name("canary").exists()


# --- The data set that training starts from ---------------------------------------------------------------------------

MANIFESTS = {
    "empty": b"",
    "header-only": b"isic_id,source,path,patient_id,target,group,split,balanced,duplicate_of,reason,sha256,fold\n",
    "other-columns": b"isic_id,target\nA,1\n",
    "binary": bytes(range(256)),
    "a-picture": malformed.encoded(malformed.picture()),
    "quote-left-open": b'isic_id,"target\n',
    "latin-1": "isic_id,ä\nA,ö\n".encode("latin-1"),
    "nul-bytes": b"\0" * 500,
}


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("name", MANIFESTS)
def test_a_malformed_manifest_is_one_line(name, signed, balanced, tmp_path, monkeypatch, capsys):
    """`signed`: by someone who also knows about the hash."""
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "manifest.csv").write_bytes(MANIFESTS[name])
    facts = json.loads((balanced / "manifest.json").read_text())
    if signed:
        facts["sha256"] = manifest_sha256(folder)
    (folder / "manifest.json").write_text(json.dumps(facts))
    line = fails(
        "train", "--data", folder, "--checkpoints", tmp_path / "checkpoints", "--weights", "none",
        "--wandb", "disabled", monkeypatch=monkeypatch, capsys=capsys,
    )  # fmt: skip
    assert str(folder) in line or "expected 2 or more" in line


@pytest.mark.parametrize("content", ["", "[]", "{", '{"sha256": 3}', "\udcff", "[" * 10**6])
def test_a_malformed_json_of_the_data_set_is_one_line(content, balanced, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(balanced, tmp_path / "data")
    (folder / "manifest.json").write_text(content, errors="surrogateescape")
    line = fails(
        "train", "--data", folder, "--checkpoints", tmp_path / "checkpoints", "--weights", "none",
        "--wandb", "disabled", monkeypatch=monkeypatch, capsys=capsys,
    )  # fmt: skip
    assert str(folder) in line
