"""Whether predict.py's time per image and memory stay the same from 1,000 to 100,000 images.

    .venv/bin/python benchmarks/growth.py

A list with that many references to 100 files, each read and scored as any other, by a small model (MobileNet at 64 x
64). Each size has a process of its own. Time per image is that from the 500th on, when everything is warm; memory is
the highest resident size (Linux only). Eight minutes on 2 cores.
"""

import resource
import sys
import tempfile
import time
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
    done, times = 0, []
    with written(predict.score_files(options, opened, SIZES[-1]), options.output) as rows:
        for done, _ in enumerate(rows, start=1):
            if done % 500 == 0:
                times.append(time.perf_counter())
    seconds = (times[-1] - times[0]) / (500 * (len(times) - 1))
    return {"images": done, "seconds": seconds, "bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}


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
    first, last = results[0], results[-1]
    name = f"at {SIZES[-1]:,} / at {SIZES[0]:,}"
    common.finish(
        [
            common.figure("growth", f"time per image {name}", last["seconds"] / first["seconds"], None, most=1.1),
            common.figure("growth", f"memory {name}", last["bytes"] / first["bytes"], None, most=1.1),
        ]
    )


if __name__ == "__main__":
    common.start(main, {"score": score})
