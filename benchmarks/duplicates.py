"""Finding duplicates: hashing and search on pictures against imagededup's, and the search alone up to a million hashes.

    .venv/bin/python benchmarks/duplicates.py                          ours alone, on drawn pictures
    .venv/bin/python benchmarks/duplicates.py --peer-python PEER       and imagededup's
    .venv/bin/python benchmarks/duplicates.py --images DIR             on the JPEGs of a folder

imagededup needs torch, which the product does not, so it has an environment of its own (PEER below is
/tmp/peer/bin/python):

    python3.11 -m venv /tmp/peer && /tmp/peer/bin/pip install -r benchmarks/requirements.txt

Hashing and search: from the files to all pairs of pHashes within 7 bits, on all cores, the median of three runs, in
turns with the peer; starting the processes does not count. Ours hashes each picture in its 8 mirrored and turned views,
imagededup as it is. The search: random 64-bit hashes with 1,000 planted neighbours at distances 0 to 7. Each
measurement has a process of its own; memory is its highest resident size, libraries included (Linux only).

Two minutes on 2 cores. The exit code is 1 if a measured figure misses its limit.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

SIZES = (10_000, 100_000, 1_000_000)
SECONDS, GIGABYTES = 60, 2  # what a million hashes may take
RADIUS = 7
TURNS = 3
DRAWN = 250  # pictures, each written in its 8 views


# --- In the measured process ------------------------------------------------------------------------------------------


def ours(folder: str) -> dict:
    """Seconds of hashing and of searching, and how many hashes and pairs came of it."""
    from Modules.data.hashing import close_pairs, phash, read_grey

    paths = sorted(Path(folder).glob("*.jpg"))
    start = time.perf_counter()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        hashes = np.array(list(pool.map(lambda path: phash(read_grey(path, 32)), paths)))
    middle = time.perf_counter()
    pairs = close_pairs(hashes[:, 0], radius=RADIUS)
    end = time.perf_counter()
    return {"images": len(hashes), "pairs": len(pairs), "hash": middle - start, "search": end - middle}


def imagededup(folder: str) -> dict:
    from imagededup.methods import PHash

    method = PHash(verbose=False)
    start = time.perf_counter()
    hashes = method.encode_images(image_dir=folder)
    middle = time.perf_counter()
    found = method.find_duplicates(encoding_map=hashes, max_distance_threshold=RADIUS)
    end = time.perf_counter()
    pairs = sum(map(len, found.values())) // 2
    return {"images": len(hashes), "pairs": pairs, "hash": middle - start, "search": end - middle}


def search(size: str) -> dict:
    """Seconds and bytes of the search among `size` random hashes, and the share of the planted neighbours found."""
    from Modules.data.hashing import close_pairs

    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**64, int(size), np.uint64)
    distance = np.arange(1_000) % (RADIUS + 1)
    bits = np.argsort(rng.random((1_000, 64)), axis=1).astype(np.uint64)
    masks = np.where(np.arange(64) < distance[:, None], np.uint64(1) << bits, np.uint64(0))
    hashes[-1_000:] = hashes[:1_000] ^ np.bitwise_or.reduce(masks, axis=1)
    start = time.perf_counter()
    pairs = close_pairs(hashes, radius=RADIUS)
    seconds = time.perf_counter() - start
    planted = np.column_stack([np.arange(1_000), int(size) - 1_000 + np.arange(1_000), distance])
    found = len(set(map(tuple, planted.tolist())) & set(map(tuple, pairs.tolist())))
    # Linux gives kilobytes
    return {
        "seconds": seconds,
        "found": found / 1_000,
        "bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }


# --- In the process that asks -----------------------------------------------------------------------------------------


def measure(python: str, what: str, argument: str) -> dict:
    command = [python, __file__, "--measure", what, argument]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    if child.returncode:
        raise RuntimeError(f"{what}: {(child.stderr.strip().splitlines() or ['killed'])[-1]}")
    return json.loads(child.stdout.splitlines()[-1])


def draw_pictures(folder: Path) -> None:
    from tqdm import tqdm

    from Modules.data.hashing import VIEWS, view
    from Modules.data.images import encode_jpeg
    from Modules.data.synthetic import draw

    rng = np.random.default_rng(0)
    for k in tqdm(range(DRAWN), "draw pictures", ncols=80, leave=False, disable=None):
        picture, _ = draw(rng, malignant=k % 2 == 0)
        for turned in range(VIEWS):
            (folder / f"{k}-{turned}.jpg").write_bytes(encode_jpeg(view(picture, turned)))


def compare(folder: str, pythons: dict[str, str]) -> dict[str, dict]:
    """The run of median speed of each."""
    runs = {who: [] for who in pythons}
    for _ in range(TURNS):
        for who, python in pythons.items():
            runs[who].append(measure(python, who, folder))
    return {who: sorted(each, key=lambda run: run["hash"] + run["search"])[TURNS // 2] for who, each in runs.items()}


def figures(speeds: dict[str, float], searches: dict[int, dict]) -> list[dict]:
    """What is promised; `holds` is null where a measurement is missing."""
    peer, largest = speeds.get("imagededup"), searches[SIZES[-1]]
    ratio = speeds["ours"] / peer if peer else None
    record = {"benchmark": "duplicates", "figure": "images/s, hashing and search", "value": round(speeds["ours"])}
    records = [record | {"peer": peer and round(peer), "limit": peer and round(2 * peer), "must": "≥ 2 times the peer"}]
    records[0]["holds"] = None if ratio is None else ratio >= 2
    rows = [(f"seconds of search, {size:,} hashes", run["seconds"], None, None) for size, run in searches.items()]
    rows[-1] = (*rows[-1][:2], SECONDS, f"≤ {SECONDS}")
    rows.append((f"GB of memory, {SIZES[-1]:,} hashes", largest["bytes"] / 1e9, GIGABYTES, f"≤ {GIGABYTES}"))
    for figure, value, limit, must in rows:
        record = {"benchmark": "duplicates", "figure": figure, "value": round(value, 2), "peer": None, "limit": limit}
        records.append(record | {"must": must, "holds": None if limit is None else value <= limit})
    for size, run in searches.items():
        record = {
            "benchmark": "duplicates",
            "figure": f"planted neighbours found, {size:,} hashes",
            "value": run["found"],
        }
        records.append(record | {"peer": None, "limit": 1, "must": "= 1", "holds": run["found"] == 1})
    return records


def main():
    from Modules.cli import Parser, UserError

    parser = Parser(description=__doc__)
    parser.add_argument("--peer-python", help="python of an environment that has imagededup")
    parser.add_argument("--images", type=Path, help="a folder of JPEGs (default: drawn pictures)")
    arguments = parser.parse_args()
    if arguments.images and not any(arguments.images.glob("*.jpg")):
        raise UserError(f"--images {arguments.images}: no .jpg file in it")
    pythons = {"ours": sys.executable}
    if arguments.peer_python:
        pythons["imagededup"] = arguments.peer_python
    with tempfile.TemporaryDirectory() as folder:
        if not arguments.images:
            draw_pictures(Path(folder))
        runs = compare(str(arguments.images or folder), pythons)
    speeds = {who: run["images"] / (run["hash"] + run["search"]) for who, run in runs.items()}
    print(f"{'':12}{'images':>8}{'hash s':>10}{'search s':>10}{'images/s':>10}{'pairs':>9}")
    for who, run in runs.items():
        print(f"{who:12}{run['images']:8}{run['hash']:10.2f}{run['search']:10.2f}{speeds[who]:10.0f}{run['pairs']:9}")
    searches = {size: measure(sys.executable, "search", str(size)) for size in SIZES}
    print(f"\n{'hashes':>12}{'search s':>10}{'memory MB':>11}{'planted found':>15}")
    for size, run in searches.items():
        print(f"{size:12,}{run['seconds']:10.2f}{run['bytes'] / 1e6:11.0f}{run['found']:15.1%}")
    if not arguments.peer_python:
        print("not measured: imagededup: make its environment (--help shows how), then give --peer-python")
    records = figures(speeds, searches)
    for record in records:
        print(json.dumps(record, ensure_ascii=False))
    if any(record["holds"] is False for record in records):
        sys.exit(1)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:  # in the peer's environment there is nothing of ours but this file
        print(json.dumps({"ours": ours, "imagededup": imagededup, "search": search}[sys.argv[2]](sys.argv[3])))
    else:
        from Modules.cli import run

        run(main)
