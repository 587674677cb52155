"""Seconds from nothing to the probability of one picture, beside TensorFlow's own start.

    .venv/bin/python benchmarks/cold_start.py

`predict.py one.jpg` against a process that imports TensorFlow and loads the same model with Keras, in turns;
InceptionV3 at 256 x 256. A minute on 2 cores.
"""

import subprocess
import sys
import tempfile

import common

BARE = "import tensorflow; tensorflow.keras.models.load_model('best_epoch.keras', compile=False)"


def main() -> None:
    common.options(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        picture = common.files(folder, 32)[0]
        checkpoint = common.checkpoint(folder, [picture] * 32, "inception_v3")

        def run(*arguments: object) -> int:
            subprocess.run([sys.executable, *map(str, arguments)], cwd=folder, check=True, capture_output=True)
            return 1

        speeds = common.best(
            {
                "TensorFlow and the model": lambda: run("-c", BARE),
                "predict.py one.jpg": lambda: run(common.ROOT / "predict.py", picture, "--checkpoint", checkpoint),
            },
            turns=4,
        )
    for name, speed in speeds.items():
        print(f"{name:28}{1 / speed:8.2f} s")
    bare, ours = speeds.values()
    name = "predict.py one.jpg / import tensorflow and load_model"
    common.finish([common.figure("cold_start", name, bare / ours, f"{1 / bare:.2f} s", most=1.8)])


if __name__ == "__main__":
    common.start(main, {})
