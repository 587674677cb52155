"""Whether training in lower precision costs quality: the test ROC AUC of the same split and seed beside float32's.

    .venv/bin/python benchmarks/precision.py --data datasets/balanced --weights imagenet

train.py itself with MobileNet at 96 x 96, 6 epochs, in float32 and in what `--precision auto` takes here. No figure
where that is float32, too, nor without a data set and weights: of drawn lesions random ones learn nothing that could
be lost. Five minutes on 2 cores.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import common

OPTIONS = "--external ignore --backbone mobilenet --image-size 96 --batch-size 32 --loss semi-hard --epochs 6".split()


def main() -> None:
    options = common.options(
        __doc__, data={"type": Path, "help": "a folder with a manifest.csv"}, weights={"default": "none"}
    )
    precisions, tests = common.precisions(), {}
    name = f"test ROC AUC in {precisions[-1]}, at least the low end of float32's interval"
    if len(precisions) == 1 or not options.data or options.weights == "none":
        print("not measured: it takes --data, --weights and a machine with AMX or a GPU")
        common.finish([common.figure("precision", name, None, "float32")])
    with tempfile.TemporaryDirectory() as folder:
        given = ["--data", options.data.resolve(), "--weights", options.weights, "--wandb", "disabled", *OPTIONS]
        for precision in precisions:
            home = Path(folder) / precision
            outcome = ["--precision", precision, "--checkpoints", home]
            command = [sys.executable, common.ROOT / "train.py", *given, *outcome]
            subprocess.run(list(map(str, command)), cwd=folder, check=True, stdout=subprocess.DEVNULL)
            tests[precision] = json.loads((home / "best_epoch.json").read_text())["test"]
    for precision, test in tests.items():
        low, high = test["roc_auc_ci95"]
        print(f"{precision:12}ROC AUC {test['roc_auc']:.3f} [{low:.3f}, {high:.3f}], {test['n']} images")
    exact, fast = tests.values()
    peer = f"float32: {exact['roc_auc']:.4f}"
    common.finish([common.figure("precision", name, fast["roc_auc"], peer, round(exact["roc_auc_ci95"][0], 4))])


if __name__ == "__main__":
    common.start(main, {})
