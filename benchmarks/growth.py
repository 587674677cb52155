"""Whether predict.py's time per image and memory stay the same from 1,000 to 100,000 images.

    .venv/bin/python benchmarks/growth.py

A list with that many references to 100 files, each read and scored as any other, by a small model (MobileNet at 64 x
64). Each size has a process of its own that scores the list again until it has done 10,000, after a warm-up; the best
time counts. Memory is the highest resident size after the warm-up (Linux only). Four minutes on 2 cores.
"""

import sys
import tempfile
from pathlib import Path

import common

SIZES = (1_000, 10_000, 100_000)


def score(checkpoint: str, listing: str) -> dict:
    from Modules import quiet  # noqa: F401, before TensorFlow

    # isort: split
    import predict
    from Modules.evaluation import evidence
    from Modules.predictions import written

    sys.argv = ["predict.py", listing, "--checkpoint", checkpoint, "--output", f"{listing}.csv"]
    options = predict.parse()
    opened = evidence.open_checkpoint(*predict.load(options.checkpoint, options.trust))

    def run(paths: Path) -> int:
        options.paths = [paths]
        with written(predict.score_files(options, opened, SIZES[-1]), options.output) as rows:
            return sum(1 for _ in rows)

    run(Path(listing).with_name(f"{SIZES[0]}.txt"))  # warm-up
    Path("/proc/self/clear_refs").write_text("5")  # the highest resident size begins anew
    images = int(Path(listing).stem)
    seconds = 1 / common.best({"all": lambda: run(Path(listing))}, max(1, SIZES[1] // images))["all"]
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return {"images": images, "seconds": seconds, "bytes": 1024 * int(peak.split()[1])}


def main() -> None:
    common.options(__doc__)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        paths = common.files(folder, 100, 64)
        checkpoint = common.checkpoint(folder, paths, "mobilenet", 64)
        for size in SIZES:
            listing = Path(folder) / f"{size}.txt"
            listing.write_text("".join(f"{paths[k % 100]}\n" for k in range(size)))
            results.append(common.child(sys.executable, "score", checkpoint, listing))
    print(f"{'images':>10}{'ms/image':>12}{'memory MB':>12}")
    for result in results:
        print(f"{result['images']:10,}{1e3 * result['seconds']:12.2f}{result['bytes'] / 1e6:12.0f}")
    figures = []
    for size, result in zip(SIZES[1:], results[1:], strict=True):
        name, first = f"at {size:,} / at {SIZES[0]:,}", results[0]
        time = result["seconds"] / first["seconds"]
        figures.append(common.figure("growth", f"time per image {name}", time, None, most=1.1))
        figures.append(common.figure("growth", f"memory {name}", result["bytes"] / first["bytes"], None, most=1.1))
    common.finish(figures)


if __name__ == "__main__":
    common.start(main, {"score": score})
