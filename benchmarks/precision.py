"""Whether training in lower precision costs quality: the test ROC AUC of the same split and seed beside float32's.

    .venv/bin/python benchmarks/precision.py                                       drawn lesions, random weights
    .venv/bin/python benchmarks/precision.py --data datasets/balanced --weights imagenet

train.py itself with MobileNet at 96 x 96, 6 epochs, in float32 and in what `--precision auto` takes here; no figure
where that is float32, too, or where float32 learns nothing. Five minutes on 2 cores.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import common

OPTIONS = "--backbone mobilenet --image-size 96 --batch-size 32 --epochs 6 --wandb disabled".split()


def main() -> None:
    options = common.options(
        __doc__, data={"type": Path, "help": "a folder with a manifest.csv"}, weights={"default": "none"}
    )
    precisions, tests = common.precisions(), {}
    name = f"test ROC AUC in {precisions[-1]}, at least the low end of float32's interval"
    if len(precisions) == 1:
        common.finish([common.figure("precision", name, None, "float32")])
    with tempfile.TemporaryDirectory() as folder:
        given = ["--data", options.data.resolve()] if options.data else []
        given += ["--external", "ignore", "--loss", "semi-hard", "--weights", options.weights, *OPTIONS]
        for precision in precisions:
            home = Path(folder) / precision
            command = [
                sys.executable,
                common.ROOT / "train.py",
                *given,
                "--precision",
                precision,
                "--checkpoints",
                home,
            ]
            subprocess.run(list(map(str, command)), cwd=folder, check=True, stdout=subprocess.DEVNULL)
            tests[precision] = json.loads((home / "best_epoch.json").read_text())["test"]
    for precision, test in tests.items():
        interval = test["roc_auc_ci95"]  # none where all rank alike
        within = f"[{interval[0]:.3f}, {interval[1]:.3f}]" if interval else "no interval"
        print(f"{precision:12}ROC AUC {test['roc_auc']:.3f} {within}, {test['n']} images")
    exact, fast = tests.values()
    low = round(exact["roc_auc_ci95"][0], 4) if exact["roc_auc_ci95"] else 0
    learned = low > 0.5
    if not learned:
        print(f"float32 has learned nothing here that {precisions[-1]} could lose: give --data and --weights")
    peer = f"float32: {exact['roc_auc']:.4f}"
    common.finish(
        [common.figure("precision", name, fast["roc_auc"] if learned else None, peer, low if learned else None)]
    )


if __name__ == "__main__":
    common.start(main, {})
