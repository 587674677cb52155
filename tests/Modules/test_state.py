"""Files of state survive crashes and full disks; a lock ends with its process."""

import os
import resource
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from Modules import runtime, state
from Modules.cli import UserError
from tests.commands import ROOT

FIRST = {"epoch": 1}, {"model": [np.arange(50.0), np.float32([[1, 2]])], "empty": []}
SECOND = {"epoch": 2}, {"model": [np.arange(50.0) * 2, np.float32([[3, 4]])], "empty": []}


@pytest.fixture
def file(tmp_path):
    """Written twice."""
    for facts, arrays in (FIRST, SECOND):
        state.write(tmp_path / "state-it.npz", facts, arrays)
    return tmp_path / "state-it.npz"


def assert_read(file, expected):
    facts, arrays = state.read(file)
    assert facts == expected[0]
    assert arrays.keys() == expected[1].keys()
    for name, values in expected[1].items():
        for value, wanted in zip(arrays[name], values, strict=True):
            np.testing.assert_array_equal(value, wanted)
            assert value.dtype == wanted.dtype


def test_what_was_written_last_is_read(file):
    assert_read(file, SECOND)


def test_a_list_under_several_names_is_written_once(tmp_path):
    weights, other = [np.arange(1e4), np.ones(3)], [np.arange(5.0)]
    arrays = {"model": weights, "optimizer": other, "best": weights, "sums": []}
    state.write(tmp_path / "state-it.npz", {}, arrays)
    assert_read(tmp_path / "state-it.npz", ({}, arrays))
    assert (tmp_path / "state-it.npz").stat().st_size < 1.5 * weights[0].nbytes


@given(place=st.integers(0, 10**6), keep=st.booleans())
@settings(max_examples=60, deadline=None)
def test_where_the_newest_is_torn_anywhere_the_one_before_takes_its_place(tmp_path_factory, place, keep):
    """Cut, or one byte changed. (A byte that no reader looks at may change.)"""
    file = tmp_path_factory.mktemp("torn") / "state-it.npz"
    for facts, arrays in (FIRST, SECOND):
        state.write(file, facts, arrays)
    data = bytearray(file.read_bytes())
    place %= len(data)
    data[place] ^= 0xFF
    file.write_bytes(data if keep else data[:place])
    facts, _ = state.read(file)
    assert_read(file, SECOND if facts == SECOND[0] else FIRST)
    assert keep or facts == FIRST[0]


def test_a_changed_number_is_noticed(file, capsys):
    data = file.read_bytes()
    place = data.index(SECOND[1]["model"][0][20:25].tobytes())
    file.write_bytes(data[:place] + b"\1" + data[place + 1 :])
    assert_read(file, FIRST)
    assert "torn" in capsys.readouterr().out


def test_a_crash_between_the_two_renames_loses_nothing(file):
    file.rename(state._former(file))
    assert state.exists(file)
    assert state.unfinished(file.parent) == [state._former(file)]
    assert_read(file, SECOND)


def test_where_both_are_torn_one_line_says_so(file):
    for path in (file, state._former(file)):
        path.write_bytes(b"torn")
    with pytest.raises(UserError, match=r"state-it\.npz can't be resumed .*remove it to start anew"):
        state.read(file)


def test_nothing_is_left_of_what_is_forgotten(file):
    state._partial(file).write_bytes(b"half")
    state.forget(file)
    assert list(file.parent.iterdir()) == []
    assert not state.exists(file)


@pytest.mark.parametrize("room", [0, 100, 700, 1500])
def test_a_full_disk_leaves_what_was_there(room, file):
    """The kernel refuses every byte beyond `room`, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        with pytest.raises(UserError, match=r"can't write .*state-it\.npz \(File too large\).*--resume"):
            state.write(file, {"epoch": 3}, FIRST[1])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert_read(file, SECOND)
    assert not state._partial(file).exists()


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_any_step_of_a_write_may_fail(name, file, monkeypatch):
    def fail(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(*(("os.fsync", fail) if name == "fsync" else (type(file), "replace", fail)))
    with pytest.raises(UserError, match="Input/output error"):
        state.write(file, {"epoch": 3}, FIRST[1])
    monkeypatch.undo()
    assert_read(file, SECOND)


def test_after_a_torn_state_a_write_that_fails_costs_nothing_either(file, monkeypatch):
    file.write_bytes(file.read_bytes()[:50])
    assert_read(file, FIRST)

    replace = type(file).replace

    def fail(self, target):
        if self == state._partial(file):
            raise OSError(5, "Input/output error")
        return replace(self, target)

    monkeypatch.setattr(type(file), "replace", fail)
    with pytest.raises(UserError, match="Input/output error"):
        state.write(file, {"epoch": 3}, FIRST[1])
    monkeypatch.undo()
    assert_read(file, FIRST)


def test_any_changed_byte_is_noticed_or_changes_nothing(file):
    whole = file.read_bytes()
    for place in range(0, len(whole), 3):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        former = state._former(file).read_bytes()
        facts, _ = state.read(file)
        assert facts in (FIRST[0], SECOND[0])
        state._former(file).write_bytes(former)


# --- The lock ---------------------------------------------------------------------------------------------------------


def test_a_living_process_keeps_others_out_and_a_dead_one_does_not(tmp_path):
    code = (
        "import sys, pathlib; from Modules import state; state.lock(pathlib.Path(sys.argv[1]));"
        "print('locked', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, tmp_path], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout.readline() == b"locked\n"
        with pytest.raises(UserError, match=r"another run is working in .*--checkpoints"):
            runtime.claim(tmp_path, resume=True)
        other.kill()
    runtime.claim(tmp_path, resume=False)
    runtime.claim(tmp_path, resume=False)  # its own lock keeps no process out


def test_a_folder_without_permission_is_one_line(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(UserError, match=r"can't write to .*Permission denied.*--checkpoints"):
        runtime.claim(tmp_path, resume=False)
