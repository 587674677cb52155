"""What the benchmarks share: pictures to work on, a checkpoint of random weights, turns with the peer, the figures.

Ours and a peer in the same process take turns, a peer with an environment of its own comes right after, and the best
turn of each counts: other work on the machine can only slow down.
"""

import json
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SIZE = 256  # pixels a side
KNOWN = 23_000  # lesions in a gallery: as many as train the recipe on the full data set


def files(folder: str, count: int, size: int = SIZE, drawn: int = 64) -> list[Path]:
    """`count` JPEGs of drawn lesions in `folder`, `drawn` different ones; each second is malignant, as in `table`."""
    import numpy as np

    from Modules.data.images import encode_jpeg, resize
    from Modules.data.synthetic import draw

    rng, found = np.random.default_rng(0), []
    pictures = [encode_jpeg(resize(draw(rng, malignant=k % 2 == 1)[0], size)) for k in range(min(count, drawn))]
    for k in range(count):
        found.append(Path(folder) / f"{k:06}.jpg")
        found[-1].write_bytes(pictures[k % drawn])
    return found


def table(paths: list[Path]):
    """The rows that a manifest would have for `paths`, classes in turn."""
    import pandas as pd

    names, places = [path.stem for path in paths], range(len(paths))
    rows = {"file": map(str, paths), "isic_id": names, "group": places, "target": [k % 2 for k in places]}
    return pd.DataFrame(rows).assign(patient_id="", diagnosis="", split="train")


def checkpoint(folder: str, paths: list[Path], backbone: str, size: int = SIZE) -> Path:
    """A complete checkpoint of random weights that knows every picture like `paths`, and KNOWN random lesions."""
    import numpy as np

    import modules
    from dataset import image_batches
    from Modules import safe_model
    from Modules.config import Classifier, Data, Embedding
    from Modules.evaluation import evidence
    from Modules.evaluation.metrics import PREVALENCE

    file, rows = Path(folder) / "best_epoch.keras", table(paths[:32])
    network = modules.build_embedding(Embedding(backbone=backbone), size)
    modules.save(modules.join(network, modules.build_classifier(Classifier(), 128)), file)
    batches = image_batches(rows, Data(image_size=size, batch_size=32))
    pair = rows, batches
    evidence.write_gallery(file.with_name("gallery.npz"), file, modules.load(file), pair, pair, True)
    with np.load(file.with_name("gallery.npz")) as saved:
        known, rng = dict(saved), np.random.default_rng(0)
    vectors = rng.standard_normal((KNOWN, known["embeddings"].shape[1]))
    strangers = {
        "embeddings": (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16),
        "hashes": rng.integers(0, 2**64, KNOWN, np.uint64),
        "targets": np.arange(KNOWN, dtype=np.int8) % 2,
        "thumbnail_ends": np.full(KNOWN, known["thumbnail_ends"][-1]),
        **{name: np.arange(KNOWN).astype(str) for name in ("ids", "patients", "groups")},
        "diagnoses": np.full(KNOWN, ""),
    }
    known |= {name: np.concatenate([known[name], more]) for name, more in strangers.items()}
    np.savez(file.with_name("gallery.npz"), **known)
    facts = dict.fromkeys(evidence.NEEDED) | {"config": {"data": {}}, "threshold": 0.5, "prevalence": PREVALENCE}
    facts |= {"in_distribution": {"limit": 1e9}, "sha256": safe_model.hashes(file)}
    file.with_suffix(".json").write_text(json.dumps(facts))
    return file


def precisions() -> list[str]:
    """float32, and what `--precision auto` takes here if that is another: a machine without it only imitates it."""
    from Modules.runtime import fastest_precision

    return list(dict.fromkeys(("float32", fastest_precision())))


def child(python: str, *arguments: object) -> dict:
    """What `python SCRIPT --measure ARGUMENTS` of the running script prints, in a process of its own."""
    command = [python, sys.argv[0], "--measure", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{arguments}: {(done.stderr.strip().splitlines() or ['killed'])[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def best(runs: dict[str, Callable[[], int]], turns: int = 3) -> dict[str, float]:
    """Images a second of each run, which returns how many it did: the best of `turns`, each run in turn."""
    speeds = dict.fromkeys(runs, 0.0)
    for _ in range(turns):
        for name, run in runs.items():
            start = time.perf_counter()
            count = run()
            speeds[name] = max(speeds[name], count / (time.perf_counter() - start))
    return speeds


def figure(
    benchmark: str, name: str, value: float | None, peer: object, least: float | None = None, most: float | None = None
) -> dict:
    """One figure; `holds` is null where it could not be measured."""
    limit, sign = (most, "≤") if least is None else (least, "≥")
    holds = None if None in (value, limit) else bool(value >= limit if most is None else value <= limit)
    must = None if limit is None else f"{sign} {limit}"
    value = None if value is None else float(f"{value:.4g}")
    return {
        "benchmark": benchmark, "figure": name, "value": value, "peer": peer,
        "limit": limit, "must": must, "holds": holds,
    }  # fmt: skip


def finish(figures: list[dict]) -> None:
    """Print them, one JSON a line; the exit code is 1 if one misses its limit."""
    for each in figures:
        print(json.dumps(each, ensure_ascii=False))
    sys.exit(any(each["holds"] is False for each in figures))


def options(text: str, **more: dict) -> Namespace:
    """The command line of a benchmark: --peer-python and `more`."""
    from Modules.cli import Parser

    parser = Parser(description=text)
    parser.add_argument("--peer-python", help="python of an environment with benchmarks/requirements.txt")
    for name, settings in more.items():
        parser.add_argument(f"--{name}", **settings)
    return parser.parse_args()


def start(main: Callable[[], None], measured: dict[str, Callable[..., dict]]) -> None:
    """Run `main`, or, between the processes of a script, one of the functions that it measures."""
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measured[sys.argv[2]](*sys.argv[3:])))
        return
    from Modules import quiet  # noqa: F401, before TensorFlow
    from Modules.cli import run

    run(main)
