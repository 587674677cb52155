"""The same cross-validation with several seeds: one seed may have been lucky.

    python train.py --fold all --seed 0 --checkpoints seed-0
    python train.py --fold all --seed 1 --checkpoints seed-1
    python -m Modules.evaluation.seeds seed-0 seed-1

prints the mean over the runs of each figure, its interval over patients, and the figure of each run. Every run tests
the same images, each once.
"""

from Modules import quiet  # noqa: F401, before TensorFlow

# isort: split
from pathlib import Path

import numpy as np
import pandas as pd

from Modules import cli
from Modules.evaluation.cross_validation import (
    COMPARED,
    HEADING,
    SCORERS,
    at_half,
    difference,
    estimated,
    read_scores,
    verdict,
    with_interval,
)
from Modules.evaluation.intervals import Statistic
from Modules.evaluation.metrics import weighted_metrics


def read_runs(folders: list[Path]) -> list[pd.DataFrame]:
    """The scores of each run on all folds, the same images in the same order.

    Raises:
        UserError: a run is not finished, or tested other images than the first.
    """
    runs = []
    for folder in folders:
        if not (folder / "cross_validation.json").is_file():
            raise cli.UserError(
                f"no finished cross-validation in {folder}: run train.py --fold all --checkpoints {folder}"
            )
        runs.append(read_scores(sorted(folder.glob("fold-*"))).sort_values("isic_id", ignore_index=True))
        if not runs[-1][["isic_id", "group", "target"]].equals(runs[0][["isic_id", "group", "target"]]):
            raise cli.UserError(f"{folder} tested other images than {folders[0]}: give runs on the same data set")
    return runs


def mean(runs: list[pd.DataFrame], scorer: str) -> Statistic:
    """The mean over the runs of each metric in COMPARED."""
    parts = [weighted_metrics(run["target"].to_numpy(), at_half(run, scorer)) for run in runs]

    def statistic(weights: np.ndarray) -> dict[str, np.ndarray]:
        values = [part(weights) for part in parts]
        return {name: np.mean([value[name] for value in values], axis=0) for name in COMPARED}

    return statistic


def summary(runs: list[pd.DataFrame]) -> str:
    """The means, each run's figures, and the mean differences, in 80 columns."""
    lines = [f"Mean of {len(runs)} runs, {len(runs[0])} images, each tested once in each", HEADING]
    scorers = [name for name in SCORERS if all(name in run for run in runs)]
    for name in scorers:
        result = estimated(mean(runs, name), runs[0])
        cells = (with_interval(result[metric]["estimate"], result[metric]["ci95"]) for metric in COMPARED)
        lines.append(f"  {SCORERS[name]:<38}" + "".join(f"{cell:>20}" for cell in cells))
        for number, run in enumerate(runs):
            alone = mean([run], name)(np.ones((1, len(run))))
            cells = (with_interval(float(alone[metric][0]), None) for metric in COMPARED)
            lines.append(f"    run {number + 1:<32}" + "".join(f"{cell:>20}" for cell in cells))
    ours = mean(runs, "probability")
    lines += [verdict(name, difference(ours, mean(runs, name), runs[0])) for name in scorers if name != "probability"]
    return "\n".join(lines)


def main() -> None:
    parser = cli.Parser(prog="seeds.py", description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folders of finished train.py --fold all")
    print(summary(read_runs(parser.parse_args().runs)))


if __name__ == "__main__":
    cli.run(main)
