"""Time and memory of the semi-hard triplet loss, forward and backward: ours against the libraries'.

    .venv/bin/python benchmarks/loss.py                            ours and TensorFlow Addons'
    .venv/bin/python benchmarks/loss.py --peer-python PEER         and pytorch-metric-learning's

pytorch-metric-learning needs torch, which the product does not, so it has an environment of its own (PEER below is
/tmp/peer/bin/python):

    python3.11 -m venv /tmp/peer && /tmp/peer/bin/pip install -r benchmarks/requirements.txt

Unit vectors of dimension 128 in two random classes, margin 0.4. Each measurement has its own process, which may not
take more memory than is free. Time: the median step after a discarded one. Memory: the highest resident size of the
process less what it held before (Linux only). pytorch-metric-learning takes every semi-hard negative inside the margin,
the other two the nearest one.

A few minutes on 2 cores. At B = 1024 the libraries need 20 and 15 GB: what does not fit is named and left out.
The exit code is 1 if a measured figure misses its limit.
"""

import json
import math
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from Modules.cli import Parser, run  # noqa: E402

SIZES = {"ours": (128, 512, 1024, 2048), "tfa": (128, 512, 1024), "pml": (128, 512, 1024)}
NAMES = {"ours": "ours", "tfa": "TensorFlow Addons", "pml": "pytorch-metric-learning"}
MARGIN = 0.4
SPARE = 2**30  # bytes left to the rest of the machine
BUDGET = 3.0  # seconds of repetitions a measurement


# --- In the measured process ------------------------------------------------------------------------------------------


def tensorflow_step(loss):
    import tensorflow as tf

    @tf.function(input_signature=[tf.TensorSpec([None], tf.int32), tf.TensorSpec([None, 128], tf.float32)])
    def step(labels, embeddings):
        with tf.GradientTape() as tape:
            tape.watch(embeddings)
            value = loss(labels, embeddings)
        return value, tape.gradient(value, embeddings)

    return lambda labels, embeddings: step(tf.constant(labels), tf.constant(embeddings))[1].numpy()


def ours():
    from Modules.metric_learning.losses import make_loss

    return tensorflow_step(make_loss("semi-hard", MARGIN))


def tfa():
    import warnings

    warnings.simplefilter("ignore")
    import tensorflow_addons

    return tensorflow_step(tensorflow_addons.losses.TripletSemiHardLoss(MARGIN))


def pml():
    import torch
    from pytorch_metric_learning.losses import TripletMarginLoss
    from pytorch_metric_learning.miners import TripletMarginMiner

    loss, miner = TripletMarginLoss(MARGIN), TripletMarginMiner(MARGIN, type_of_triplets="semihard")

    def step(labels, embeddings):
        labels, embeddings = torch.from_numpy(labels), torch.from_numpy(embeddings).requires_grad_()
        loss(embeddings, labels, miner(embeddings, labels)).backward()
        return embeddings.grad.numpy()

    return step


def batch(size: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(size)
    embeddings = generator.normal(size=(size, 128)).astype(np.float32)
    labels = generator.permutation(np.arange(size, dtype=np.int32) % 2)
    return labels, embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)


def status(path: str, key: str) -> int:
    """A size that the kernel gives in kB, in bytes."""
    line = next(line for line in Path(path).read_text().splitlines() if line.startswith(f"{key}:"))
    return 1024 * int(line.split()[1])


def measure(who: str, size: int, limit: int) -> dict:
    """Seconds a step and bytes above the process at rest."""
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    step = {"ours": ours, "tfa": tfa, "pml": pml}[who]()
    step(*batch(8))  # libraries loaded, graph traced
    before = status("/proc/self/status", "VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    seconds, labels_and_embeddings = [], batch(size)
    while len(seconds) < 2 or (sum(seconds[1:]) < BUDGET and len(seconds) < 50):
        start = time.perf_counter()
        step(*labels_and_embeddings)
        seconds.append(time.perf_counter() - start)
    return {"seconds": statistics.median(seconds[1:]), "bytes": status("/proc/self/status", "VmHWM") - before}


# --- In the process that asks -----------------------------------------------------------------------------------------


def measure_all(pythons: dict[str, str]) -> tuple[dict, list[str]]:
    """Results by (who, size), and a line for each measurement that was left out."""
    from tqdm import tqdm

    results, left_out = {}, []
    jobs = [(who, size) for who in pythons for size in SIZES[who]]
    for who, size in tqdm(jobs, ncols=80, leave=False):
        limit = status("/proc/meminfo", "MemAvailable") - SPARE
        known = [s for s in SIZES[who] if (who, s) in results]
        need = results[who, known[-1]]["bytes"] * (size / known[-1]) ** 3 if known else 0  # B³ is the libraries' growth
        if who != "ours" and need > limit:
            left_out.append(f"{NAMES[who]} at {size}: needs about {need / 1e9:.0f} GB, {limit / 1e9:.0f} GB are free")
            continue
        command = [pythons[who], __file__, "--measure", who, "--size", str(size), "--memory", str(limit)]
        child = subprocess.run(command, capture_output=True, text=True, check=False)
        if child.returncode:
            reason = (child.stderr.strip().splitlines() or ["killed"])[-1][:100]
            left_out.append(f"{NAMES[who]} at {size}: failed within {limit / 1e9:.0f} GB: {reason}")
        else:
            results[who, size] = json.loads(child.stdout.splitlines()[-1])
    return results, left_out


def table(results: dict) -> str:
    lines = [f"{'B':>6}" + "".join(f"{NAMES[who]:>24}" for who in SIZES)]
    for size in SIZES["ours"]:
        cells = [results.get((who, size)) for who in SIZES]
        texts = [f"{1e3 * c['seconds']:.1f} ms {c['bytes'] / 1e6:7.0f} MB" if c else "-" for c in cells]
        lines.append(f"{size:>6}" + "".join(f"{text:>24}" for text in texts))
    return "\n".join(lines)


def figures(results: dict) -> list[dict]:
    """What is promised of the loss; `holds` is null where a measurement is missing."""

    def ratio(who, size, key):
        both = results.get((who, size)), results.get(("ours", size))
        return both[0][key] / both[1][key] if all(both) else None

    def exponent(first, last):
        both = results.get(("ours", first)), results.get(("ours", last))
        return math.log(both[1]["seconds"] / both[0]["seconds"], last / first) if all(both) else None

    rows = [  # figure, value, peer, least, most
        ("times as fast at 128", ratio("tfa", 128, "seconds"), "tfa", 1, None),
        ("times as fast at 1024", ratio("tfa", 1024, "seconds"), "tfa", 50, None),
        ("times less memory at 1024", ratio("tfa", 1024, "bytes"), "tfa", 50, None),
        ("times as fast at 1024", ratio("pml", 1024, "seconds"), "pml", None, None),
        ("times less memory at 1024", ratio("pml", 1024, "bytes"), "pml", None, None),
        ("exponent of B in time, 512 to 2048", exponent(512, 2048), None, None, 2.5),  # 2 + the sorting's logarithm
    ]
    records = []
    for figure, value, peer, least, most in rows:
        limit = most if least is None else least
        must = None if limit is None else f"{'≥' if most is None else '≤'} {limit}"
        holds = None if None in (limit, value) else value >= limit if most is None else value <= limit
        value = None if value is None else round(value, 2)
        record = {"benchmark": "loss", "figure": figure, "value": value, "peer": NAMES.get(peer)}
        records.append(record | {"limit": limit, "must": must, "holds": holds})
    return records


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("--peer-python", help="python of an environment that has pytorch-metric-learning")
    for name, kind in (("--measure", str), ("--size", int), ("--memory", int)):
        parser.add_argument(name, type=kind, help="used between the processes of this script")
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, arguments.size, arguments.memory)))
        return
    pythons = {"ours": sys.executable, "tfa": sys.executable}
    if arguments.peer_python:
        pythons["pml"] = arguments.peer_python
    results, left_out = measure_all(pythons)
    print(table(results))
    if not arguments.peer_python:
        left_out.append("pytorch-metric-learning: make its environment (--help shows how), then give --peer-python")
    for line in left_out:
        print(f"not measured: {line}")
    records = figures(results)
    for record in records:
        print(json.dumps(record, ensure_ascii=False))
    if any(record["holds"] is False for record in records):
        sys.exit(1)


if __name__ == "__main__":
    run(main)
