"""What is pinned by version is pinned by hash too."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def pinned(*names: str) -> dict[str, str]:
    """Package (as pip compares names): version."""
    text = "\n".join((ROOT / name).read_text() for name in names)
    found = re.findall(r"^([\w.\-]+)(?:\[.*?\])?==([^\s\\]+)", text, re.MULTILINE)
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in found}


def test_the_lock_holds_every_pinned_version():
    lock = pinned("requirements.lock")
    wanted = pinned("requirements.txt", "requirements-dev.txt", "constraints.txt")
    assert {name: lock.get(name) for name in wanted} == wanted, "run make lock"


def test_every_package_of_the_lock_has_hashes():
    entries = re.split(r"\n(?=\S)", (ROOT / "requirements.lock").read_text().strip())
    assert len(entries) > 50
    for entry in entries:
        assert re.fullmatch(r"\S+==\S+(?: ;[^\\]+)? \\\n(?:\s+--hash=sha256:[0-9a-f]{64}(?: \\\n|$))+", entry), entry[
            :80
        ]
