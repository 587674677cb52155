"""The page under good and hostile load for a quarter of an hour: no crash, memory flat, nothing left behind.

    .venv/bin/python benchmarks/soak.py                            15 minutes, or 100,000 requests
    .venv/bin/python benchmarks/soak.py --minutes 1 --requests 500

Starts `predict.py --serve` on a free port of 127.0.0.1 and asks it, a few at a time: pictures, malformed pictures,
requests that are no forms, bodies over the limit, paths out of the folder, foreign host names, and clients that leave
in the middle of a request. The exit code is 1 if an answer was unexpected, the server died or wrote a traceback, its
memory (resident, median of the last fifth against the second fifth of the time) grew by more than 5 % and 50 MB, or an
upload is left in its temporary folder. Linux only.
"""

import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import requests

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from Modules.cli import Parser, UserError, run  # noqa: E402
from Modules.data.images import encode_jpeg  # noqa: E402
from Modules.data.synthetic import draw  # noqa: E402
from tests.Modules.data import malformed  # noqa: E402

GROWTH, SLACK = 1.05, 50 * 2**20  # of the resident memory, bytes
PAUSE = 5  # seconds between two looks at the memory
PATIENCE = 120  # seconds for one answer
PATHS = ["/file=/etc/passwd", "/gradio_api/file=/etc/passwd", "/..%2f..%2fetc%2fpasswd", "/static/..%2f..%2fetc/passwd"]


def kinds(address: str) -> dict:
    """By name: a function that sends one request and returns its status, and the statuses that are right."""
    rng = random.Random(0)
    good = [encode_jpeg(draw(np.random.default_rng(seed), bool(seed % 2), 256)[0]) for seed in range(8)]
    bad = [data for data, word in malformed.broken().values() if word not in ("tiny", "blank")]
    large = bytes(25 * 2**20)
    host, port = urlsplit(address).hostname, urlsplit(address).port

    def post(data: bytes, name: str = "lesion.jpg", **options) -> int:
        return requests.post(
            f"{address}/predict", files={"file": (name, data)}, timeout=PATIENCE, **options
        ).status_code

    def leave(beginning: bytes) -> int:
        with socket.create_connection((host, port), timeout=PATIENCE) as client:
            client.sendall(beginning)
        return 0

    head = b"POST /predict HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: multipart/form-data; boundary=x\r\n"
    form = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.jpg"\r\n\r\n'
    length = b"Content-Length: 1000000\r\n\r\n"
    return {
        "a picture": (lambda: post(rng.choice(good)), {200}),
        "a malformed picture": (lambda: post(rng.choice(bad)), {422}),
        "over the limit": (lambda: post(large), {413}),
        "a long name": (lambda: post(rng.choice(bad), "a" * 4000), {422}),
        "no form": (lambda: requests.post(f"{address}/predict", data=b"x", timeout=PATIENCE).status_code, {422}),
        "the page": (lambda: requests.get(address, timeout=PATIENCE).status_code, {200}),
        "health": (lambda: requests.get(f"{address}/healthz", timeout=PATIENCE).status_code, {200}),
        "a path": (
            lambda: requests.get(address + rng.choice(PATHS), timeout=PATIENCE).status_code,
            {400, 403, 404, 405, 422},
        ),
        "another host": (lambda: post(rng.choice(good), headers={"Host": "example.org"}), {400}),
        "leaves before the body": (lambda: leave(head + length), {0}),
        "leaves within the file": (lambda: leave(head + length + form + good[0][:500]), {0}),
        "no HTTP": (lambda: leave(rng.randbytes(200) + b"\r\n\r\n"), {0}),
    }


def resident(process: int) -> int:
    """Bytes of memory that a process holds."""
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def load(address: str, server: subprocess.Popen, minutes: float, limit: int, workers: int) -> tuple[Counter, list[int]]:
    """Statuses by kind, as (kind, status, whether that was right), and the memory over time."""
    senders, seen, memory = kinds(address), Counter(), []
    end, lock, left = time.monotonic() + 60 * minutes, threading.Lock(), iter(range(limit))

    def work(seed: int) -> None:
        rng = random.Random(seed)
        while time.monotonic() < end and server.poll() is None:
            with lock:
                if next(left, None) is None:
                    return
            kind = rng.choice(list(senders))
            send, right = senders[kind]
            try:
                status = send()
            except (requests.ConnectionError, ConnectionError):  # a server may hang up on what is over the limit
                status = 413 if kind == "over the limit" else "no answer"
            except requests.RequestException as error:
                status = type(error).__name__
            with lock:
                seen[kind, status, status in right] += 1

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(workers)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads) and server.poll() is None:
        memory.append(resident(server.pid))
        threads[0].join(PAUSE)
    for thread in threads:
        thread.join()
    return seen, memory


def main() -> None:
    parser = Parser(prog="soak.py", description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "checkpoints/best_epoch.keras")
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--requests", type=int, default=100_000, help="at most (100000)")
    parser.add_argument("--workers", type=int, default=4, help="requests at once (4)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        uploads, said = Path(home, "uploads"), Path(home, "said")
        uploads.mkdir()
        command = [sys.executable, ROOT / "predict.py", "--serve", "--port", "0", "--checkpoint", options.checkpoint]
        with (
            open(said, "w") as errors,
            subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=errors, text=True, env=os.environ | {"TMPDIR": str(uploads)}
            ) as server,
        ):
            ready = server.stdout.readline().split()
            if not ready:
                raise UserError(f"the page did not start: {said.read_text().strip()[-300:]}")
            begun = time.monotonic()
            seen, memory = load(ready[0], server, options.minutes, options.requests, options.workers)
            seconds = time.monotonic() - begun
            alive = server.poll() is None
            server.send_signal(signal.SIGTERM)
        left = sorted(path.name for path in uploads.rglob("*") if path.is_file() and "autograph" not in path.name)
        words = said.read_text()

    print(f"{sum(seen.values()):,} requests in {seconds / 60:.1f} minutes, {options.workers} at once")
    for (kind, status, right), count in sorted(seen.items(), key=str):
        print(f"  {kind:<26}{status!s:>12}{count:>9,}{'' if right else '   unexpected'}")
    fifth = max(1, len(memory) // 5)
    before, after = (statistics.median(part) for part in (memory[fifth : 2 * fifth] or memory, memory[-fifth:]))
    print(f"memory {before / 2**20:.0f} MB -> {after / 2**20:.0f} MB, at most {max(memory) / 2**20:.0f} MB")
    problems = {
        "the server died": not alive,
        "unexpected answers": any(not right for _, _, right in seen),
        "a traceback": "Traceback" in words,
        "memory grew": after > before * GROWTH and after > before + SLACK,
        f"left behind: {', '.join(left[:5])}": bool(left),
    }
    failed = [problem for problem, holds in problems.items() if holds]
    print("; ".join(failed) or "no crash, memory flat, nothing left behind")
    if "a traceback" in failed:
        print(words[-3000:], file=sys.stderr)
    sys.exit(bool(failed))


if __name__ == "__main__":
    run(main)
