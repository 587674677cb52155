"""The same cross-validation with several seeds: one seed may have been lucky.

    python train.py --fold all --seed 0 --checkpoints seed-0
    python train.py --fold all --seed 1 --checkpoints seed-1
    python -m Modules.evaluation.seeds seed-0 seed-1

prints the mean over the runs of each figure, its interval over patients, and
the figure of each run. Every run tests the same images, each once.
"""

from Modules import quiet  # noqa: F401, before TensorFlow

# isort: split
import json
from pathlib import Path

import numpy as np
import pandas as pd

from Modules import cli
from Modules.evaluation.cross_validation import (
    COMPARED,
    SCORERS,
    at_half,
    cells,
    estimated,
    paired,
    read_scores,
    row,
    verdict,
)
from Modules.evaluation.intervals import Statistic
from Modules.evaluation.metrics import weighted_metrics


def read_run(folder: Path) -> pd.DataFrame:
    """The scores of a run on all folds, one row an image; `fold` is the name of the folder they lie in.

    Raises:
        UserError: it is not finished, or the folds there are not those it pooled.
    """
    file = folder / "cross_validation.json"
    if not file.is_file():
        raise cli.UserError(f"no finished cross-validation in {folder}: run train.py --fold all --checkpoints {folder}")
    folds = sorted(folder.glob("fold-*"))
    scores = pd.concat([read_scores([fold]).assign(fold=fold.name) for fold in folds] or [pd.DataFrame()])
    try:
        pooled = json.loads(file.read_text())
        models = [json.loads((fold / "best_epoch.json").read_text())["sha256"] for fold in folds if "models" in pooled]
        same = len(scores) == pooled["images"] and models == pooled.get("models", [])
    except (OSError, ValueError, KeyError, TypeError):
        same = False
    if not same:
        raise cli.UserError(f"the folds in {folder} are not those of its {file.name}: finish it with train.py --resume")
    return scores.reset_index(drop=True)


def read_runs(folders: list[Path]) -> dict[str, pd.DataFrame]:
    """The scores of each run by its folder: the same images in the same order.

    Raises:
        UserError: see `read_run`; or a run tested other images than the first, or in other folds.
    """
    runs = {str(folder): read_run(folder) for folder in folders}
    same = ["isic_id", "group", "target", "fold"]
    first, *others = runs
    place = {name: k for k, name in enumerate(runs[first]["isic_id"])}
    for folder in others:
        runs[folder] = runs[folder].sort_values("isic_id", key=lambda names: names.map(place), ignore_index=True)
        if not runs[folder][same].equals(runs[first][same]):
            raise cli.UserError(f"{folder} has other images or folds than {first}: give runs on the same data set")
    return runs


def mean(runs: list[pd.DataFrame], scorer: str) -> Statistic:
    """The mean over the runs, of N images each, of each metric in COMPARED: weights [R, N] -> {metric: [R]}."""
    parts = [weighted_metrics(run["target"].to_numpy(), at_half(run, scorer)) for run in runs]

    def statistic(weights: np.ndarray) -> dict[str, np.ndarray]:
        values = [part(weights) for part in parts]
        return {name: np.mean([value[name] for value in values], axis=0) for name in COMPARED}

    return statistic


def summary(runs: dict[str, pd.DataFrame]) -> str:
    """The means, each run's figures, and the mean differences, in 80 columns."""
    tables = list(runs.values())
    images = tables[0]
    lines = [f"Runs: {len(runs)}, of {len(images)} images, each tested once", row("", ["ROC AUC", "accuracy"])]
    everywhere = [name for name in SCORERS if all(name in run for run in tables)]
    for name in everywhere:
        lines.append(row(SCORERS[name], cells(estimated(mean(tables, name), images))))
        for folder, run in runs.items():
            alone = mean([run], name)(np.ones((1, len(run))))
            lines.append(row(f"  {folder[-35:]}", [f"{alone[metric][0]:.3f}" for metric in COMPARED]))
    for name in SCORERS:
        if name in everywhere[1:]:
            lines.append(verdict(name, paired(mean(tables, "probability"), mean(tables, name), images)))
        elif any(name in run for run in tables) and name not in everywhere:
            lines.append(f"Left out, since not every run has it: {SCORERS[name]}")
    return "\n".join(lines)


def main() -> None:
    parser = cli.Parser(prog="seeds.py", description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a finished train.py --fold all")
    print(summary(read_runs(parser.parse_args().runs)))


if __name__ == "__main__":
    cli.run(main)
