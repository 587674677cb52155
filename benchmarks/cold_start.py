"""Seconds from nothing to the probability of one picture, beside TensorFlow's own start.

    .venv/bin/python benchmarks/cold_start.py

`predict.py one.jpg` against a process that imports TensorFlow and loads the same model as fast as we can, in turns, and
against one that loads it with Keras; InceptionV3 at 256 x 256. Two minutes on 2 cores.
"""

import subprocess
import sys
import tempfile

import common

BARE = f"import sys; sys.path.insert(0, {str(common.ROOT)!r}); import tensorflow; from Modules import safe_model; "
BARE += "from pathlib import Path; safe_model.load(Path('best_epoch.keras'))"
KERAS = "import tensorflow; tensorflow.keras.models.load_model('best_epoch.keras', compile=False)"


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
                "TensorFlow and our loader": lambda: run("-c", BARE),
                "TensorFlow and Keras's": lambda: run("-c", KERAS),
                "predict.py one.jpg": lambda: run(common.ROOT / "predict.py", picture, "--checkpoint", checkpoint),
            },
            turns=3,
        )
    for name, speed in speeds.items():
        print(f"{name:28}{1 / speed:8.2f} s")
    bare, keras, ours = speeds.values()
    name = "predict.py one.jpg / import tensorflow and load the model"
    figures = [common.figure("cold_start", name, bare / ours, f"our loader, {1 / bare:.2f} s", most=1.8)]
    figures.append(common.figure("cold_start", name, keras / ours, f"Keras's, {1 / keras:.2f} s"))
    common.finish(figures)


if __name__ == "__main__":
    common.start(main, {})
