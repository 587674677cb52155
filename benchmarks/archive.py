"""Modules.archive on Ray beside predict.py: speed, scores, what a killed job does again, and a worker's memory.

    .venv/bin/python benchmarks/archive.py [--count 20000]      (requirements-cluster.txt must be installed in .venv)

A list with that many references to 100 files of 64 x 64, scored by a small model (MobileNet) in 20 parts. Ray has two
workers of this machine; it and predict.py take two turns, from the start of the command to its end; the best counts.
Then a job is killed (SIGKILL to its process group) as soon as it has three parts, and started again: a part that was
there is done twice if its file has another time then. Memory is the highest resident size of any worker so far, at the
end beside that after a third of the parts. With far fewer pictures Ray's start is most of the time. Linux only.

Four minutes on 2 cores.
"""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import common

PARTS, WORKERS, TURNS = 20, 2, 2
KILLED_AT = 3  # parts
PATIENCE = 60  # seconds for a killed job to be gone


def parts(output: Path) -> list[Path]:
    return sorted(output.glob("part-*.parquet"))


def living() -> dict[int, int]:
    """The processes of this machine, each with its parent."""
    found = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, parent = file.read_text().rpartition(")")[2].split()[:2]
            if state != "Z":
                found[int(file.parent.name)] = int(parent)
    return found


def family(process: int) -> list[int]:
    """The process and all that descend from it."""
    parents, found = living(), [process]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found


def peak(process: int) -> int:
    """The highest resident size, in bytes, of the Ray workers below the process; 0 where there is none."""
    highest = 0
    for one in family(process):
        with suppress(OSError, StopIteration):
            if Path(f"/proc/{one}/cmdline").read_bytes().startswith(b"ray::MapWorker"):
                lines = Path(f"/proc/{one}/status").read_text().splitlines()
                highest = max(highest, 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1]))
    return highest


def start(command: list, output: Path) -> subprocess.Popen:
    command = [*map(str, command), "--output", str(output)]
    return subprocess.Popen(command, cwd=common.ROOT, stdout=subprocess.DEVNULL, start_new_session=True)


def finish(process: subprocess.Popen, output: Path) -> list[tuple[int, int]]:
    """Wait for a job; how many parts there were and a worker's peak in bytes, twice a second."""
    seen = []
    while True:
        try:
            if process.wait(0.5):
                raise RuntimeError(f"{output}: exit code {process.returncode}")
            return seen
        except subprocess.TimeoutExpired:
            seen.append((len(parts(output)), peak(process.pid)))


def kill(process: subprocess.Popen, output: Path) -> None:
    """End a job by force when it has KILLED_AT parts; returns when nothing of it is left."""
    while len(parts(output)) < KILLED_AT:
        if process.poll() is not None:
            raise RuntimeError(f"{output}: it ended before it could be killed")
        time.sleep(0.05)
    members = set(family(process.pid))
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    end = time.monotonic() + PATIENCE
    while members & living().keys():
        if time.monotonic() > end:
            raise RuntimeError(f"{output}: the job outlives its end")
        time.sleep(0.1)


def difference(output: Path, rows: Path) -> float:
    """The largest difference of two probabilities of the same picture: of the parts, and of predict.py's rows."""
    import pyarrow.parquet as pq

    ours = [row for part in parts(output) for row in pq.read_table(part, columns=["path", "probability"]).to_pylist()]
    with open(rows) as stream:
        theirs = [json.loads(line) for line in stream]
    if [row["path"] for row in ours] != [row["path"] for row in theirs]:
        raise RuntimeError(f"{output} and {rows} have other pictures")
    return max(abs(one["probability"] - other["probability"]) for one, other in zip(ours, theirs, strict=True))


def main() -> None:
    options = common.options(__doc__, count={"type": int, "default": 20_000, "help": "pictures (20000)"})
    if importlib.util.find_spec("ray") is None:
        print("archive: Ray is not installed (requirements-cluster.txt)")
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = common.files(name, 100, 64)
        checkpoint = common.checkpoint(name, paths, "mobilenet", 64)
        listing, rows, killed = folder / "list.txt", folder / "rows.jsonl", folder / "killed"
        listing.write_text("".join(f"{paths[k % 100]}\n" for k in range(options.count)))
        job = [sys.executable, "-m", "Modules.archive", "score", listing, "--checkpoint", checkpoint]
        job += ["--address", "local", "--workers", WORKERS, "--shard", -(-options.count // PARTS)]
        outputs, memory = [], []

        def archive() -> int:
            outputs.append(folder / f"scores{len(outputs)}")
            memory[:] = finish(start(job, outputs[-1]), outputs[-1])
            return options.count

        def predict() -> int:
            finish(start([sys.executable, "predict.py", listing, "--checkpoint", checkpoint], rows), folder)
            return options.count

        speeds = common.best({"archive": archive, "predict": predict}, TURNS)
        differs = difference(outputs[-1], rows)
        kill(start(job, killed), killed)
        before = {file: file.stat().st_mtime_ns for file in parts(killed)}
        finish(start(job, killed), killed)
        twice = sum(file.stat().st_mtime_ns != stamp for file, stamp in before.items())
        differs = max(differs, difference(killed, rows))
    third = next((peak for count, peak in memory if count >= PARTS / 3), None)
    end = max(peak for _, peak in memory)
    print(f"images/s: archive {speeds['archive']:.1f}, predict.py {speeds['predict']:.1f}")
    print(f"killed with {len(before)} of {PARTS} parts; a worker's peak: {(third or 0) / 1e6:.0f}, {end / 1e6:.0f} MB")
    name = "archive on Ray / predict.py, images a second"
    common.finish(
        [
            common.figure("archive", name, speeds["archive"] / speeds["predict"], "predict.py", least=0.9),
            common.figure("archive", "largest difference of a probability", differs, "predict.py", most=2e-6),
            common.figure("archive", "parts done twice after a kill", twice, None, most=0),
            common.figure(
                "archive", "memory at the end / after a third", end / third if third else None, None, most=1.1
            ),
        ]
    )


if __name__ == "__main__":
    common.start(main, {})
