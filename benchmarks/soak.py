"""The page under good and hostile load for a quarter of an hour: no crash, memory flat, nothing left behind.

    .venv/bin/python benchmarks/soak.py                            15 minutes, or 100,000 requests
    .venv/bin/python benchmarks/soak.py --minutes 1 --requests 500

Starts `predict.py --serve` on a free port of 127.0.0.1 and asks it, a few at a time: pictures, as the page does it too,
malformed pictures, requests that are no forms, bodies over the limit, paths out of the folder, foreign host names,
uploads that nobody asks about, and clients that leave in the middle of a request or hold it open. The exit code is 1 if
an answer was unexpected, the server died or wrote a traceback, its memory (resident, median of the last fifth against
the second fifth of the time) grew by more than 5 % and 50 MB, or an upload is left in its folder: of a picture that was
answered or an upload that was broken off at once, of any other once its time is over. The times that the server gives
are short here, and it still runs then. Linux only.
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
AGE = 30  # seconds after which the server deletes an upload that nobody asked about
SERVE = f"""
import sys
from Modules import quiet, web
import predict
web.PATIENCE, web.BODY_WITHIN = {AGE}, 20
predict.cli.run(predict.main)
"""
UNASKED, BROKEN = b"nobody asks about this picture", b"this picture does not come to its end"
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

    def upload(data: bytes) -> list[str]:
        """As the page does it: where the file lies on the server."""
        named = {"files": (f"{rng.getrandbits(64)}.jpg", data)}
        return requests.post(f"{address}/gradio_api/upload", files=named, timeout=PATIENCE).json()

    def drop(data: bytes) -> int:
        """Upload, ask, and wait for the answer; 200 if there is one."""
        file = {"path": upload(data)[0], "meta": {"_type": "gradio.FileData"}}
        session = str(rng.getrandbits(64))
        event = {"data": [[file]], "fn_index": 0, "session_hash": session}
        requests.post(f"{address}/gradio_api/queue/join", json=event, timeout=PATIENCE).raise_for_status()
        answers = f"{address}/gradio_api/queue/data?session_hash={session}"
        with requests.get(answers, stream=True, timeout=PATIENCE) as stream:
            for line in stream.iter_lines():
                if b'"process_completed"' in line:
                    return 200 if b'"success":true' in line else 500
        return 0

    def held(beginning: bytes) -> int:
        """Say no more until the server hangs up."""
        with socket.create_connection((host, port), timeout=PATIENCE) as client:
            client.sendall(beginning)
            while client.recv(2**16):
                pass
        return 0

    head = b"POST /predict HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: multipart/form-data; boundary=x\r\n"
    form = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.jpg"\r\n\r\n'
    to_page = head.replace(b"/predict", b"/gradio_api/upload"), form.replace(b'"file"', b'"files"') + BROKEN
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
        "dropped on the page": (lambda: drop(rng.choice(good)), {200}),
        "malformed, dropped": (lambda: drop(rng.choice(bad)), {200}),
        "nobody asks": (lambda: len(upload(UNASKED)), {1}),
        "leaves within the upload": (lambda: leave(to_page[0] + length + to_page[1]), {0}),
        "holds headers open": (lambda: held(head), {0}),
        "holds a form open": (lambda: held(head + length + form), {0}),
        "holds an upload open": (lambda: held(to_page[0] + length + to_page[1]), {0}),
        "no HTTP": (lambda: leave(rng.randbytes(200) + b"\r\n\r\n"), {0}),
    }


def left_behind(folder: Path) -> Counter:
    """What kinds of files lie in the folder of the page's uploads."""
    found = Counter()
    for file in folder.rglob("*"):
        if file.is_file() and "autograph" not in file.name:
            data = file.read_bytes()
            kind = "unasked" if data == UNASKED else "broken off" if data.startswith(BROKEN) else "answered"
            found["emptied" if not data else kind] += 1
    return found


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
            except OSError as error:  # those of requests, too
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
        command = [sys.executable, "-c", SERVE, "--serve", "--port", "0", "--checkpoint", options.checkpoint.resolve()]
        with (
            open(said, "w") as errors,
            subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                cwd=ROOT,
                env=os.environ | {"TMPDIR": str(uploads)},
            ) as server,
        ):
            ready = server.stdout.readline().split()
            if not ready:
                raise UserError(f"the page did not start: {said.read_text().strip()[-300:]}")
            begun = time.monotonic()
            seen, memory = load(ready[0], server, options.minutes, options.requests, options.workers)
            seconds = time.monotonic() - begun
            at_once = left_behind(uploads)
            time.sleep(2 * AGE + PAUSE)
            at_last = left_behind(uploads)
            alive = server.poll() is None
            server.send_signal(signal.SIGTERM)
        words = said.read_text()

    print(f"{sum(seen.values()):,} requests in {seconds / 60:.1f} minutes, {options.workers} at once")
    for (kind, status, right), count in sorted(seen.items(), key=str):
        print(f"  {kind:<26}{status!s:>12}{count:>9,}{'' if right else '   unexpected'}")
    fifth = max(1, len(memory) // 5)
    before, after = (statistics.median(part) for part in (memory[fifth : 2 * fifth] or memory, memory[-fifth:]))
    print(f"memory {before / 2**20:.0f} MB -> {after / 2**20:.0f} MB, at most {max(memory) / 2**20:.0f} MB")
    print(f"uploads left at once: {dict(at_once)}, after {2 * AGE + PAUSE} seconds: {dict(at_last)}")
    problems = {
        "the server died": not alive,
        "unexpected answers": any(not right for _, _, right in seen),
        "a traceback": "Traceback" in words,
        "memory grew": after > before * GROWTH and after > before + SLACK,
        "pictures left behind": bool(at_once["answered"] or at_once["broken off"] or at_last),
        "no upload was seen": not at_once["unasked"] and seen["nobody asks", 1, True],
    }
    failed = [problem for problem, holds in problems.items() if holds]
    print("; ".join(failed) or "no crash, memory flat, nothing left behind")
    if "a traceback" in failed:
        print(words[-3000:], file=sys.stderr)
    sys.exit(bool(failed))


if __name__ == "__main__":
    run(main)
