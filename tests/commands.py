"""Run the commands as a user does."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from Modules import cli

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"


def run(script: str, *arguments, cwd: Path) -> str:
    """The output of `python script arguments` in `cwd`, which must succeed."""
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def fails(script: str, *arguments, monkeypatch, capsys) -> str:
    """The one line that a script says about wrong input, in this process; its exit code must be 2."""
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.run(importlib.import_module(script).main)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line
