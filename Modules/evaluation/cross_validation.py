"""Every image is tested once, by a model that saw none of its patient's: the folds' scores in one table."""

from pathlib import Path

import numpy as np
import pandas as pd

from Modules.cli import UserError
from Modules.evaluation.gallery import nearest_known
from Modules.evaluation.intervals import Statistic, bootstrap, interval, patient_codes
from Modules.evaluation.metrics import evaluate, weighted_metrics
from Modules.evaluation.scoring import units
from Modules.metric_learning.quality import K, vote_weights

SCORES = "test_scores.csv"
SCORERS = {
    "probability": "the classifier",
    "knn": "the bare embedding, its neighbours",
    "logistic": "frozen features + logistic regression",
    "finetune": "the same backbone by cross-entropy",
}
COMPARED = ("roc_auc", "accuracy")


def score_table(test: pd.DataFrame, scores: dict[str, np.ndarray]) -> pd.DataFrame:
    """What `test_scores.csv` holds: one row an image of the test split, `scores` [N] by name as further columns."""
    columns = ["isic_id", "patient_id", "group", "target", "balanced"]
    return test[columns].reset_index(drop=True).assign(**scores)


def knn_share(embeddings: np.ndarray, gallery: dict) -> np.ndarray:
    """The malignant share of the votes of the K known lesions nearest to each embedding: [N] in 0..1."""
    positions, cosines = nearest_known(embeddings, gallery, K)
    return np.average(gallery["targets"][positions], axis=1, weights=vote_weights(2 - 2 * cosines))


def read_scores(folders: list[Path]) -> pd.DataFrame:
    """The score tables of all folds as one.

    Raises:
        UserError: a fold's scores are missing.
    """
    tables = []
    for folder in folders:
        try:
            tables.append(pd.read_csv(folder / SCORES, dtype=dict.fromkeys(("isic_id", "patient_id", "group"), str)))
        except (OSError, ValueError) as error:
            raise UserError(f"no scores of a fold in {folder / SCORES} ({error}): train it with --fold") from None
    return pd.concat(tables, ignore_index=True)


def pool(folders: list[Path], prevalence: float) -> dict:
    """`test` (the folds' 50/50 sets) and `test_full` (every image) of each scorer on the folds' scores together.

    `ppv` and `npv` are those at `prevalence`. Also `difference`: see `differences`.

    Raises:
        UserError: a fold's scores are missing.
    """
    table = read_scores(folders)
    scorers = [name for name in SCORERS if name in table]

    def evaluated(rows: pd.DataFrame, name: str) -> dict:
        return evaluate(rows["target"].to_numpy(), at_half(rows, name), 0.5, units(rows), prevalence)

    return {
        "images": len(table),
        **{view: {name: evaluated(rows, name) for name in scorers} for view, rows in _views(table).items()},
        "difference": differences(table),
    }


def differences(table: pd.DataFrame) -> dict[str, dict]:
    """By how much the classifier beats each other scorer in `table` (see `score_table`), on the same images.

    `difference[view][scorer][metric]`: `estimate` and `ci95`, paired, over patients; both None where undefined.
    """
    others = [name for name in SCORERS if name in table and name != "probability"]
    return {view: {name: _difference(rows, name) for name in others} for view, rows in _views(table).items()}


def _views(table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    return {"test": table[table["balanced"]], "test_full": table}


def at_half(rows: pd.DataFrame, name: str) -> np.ndarray:
    """Scores [N]; the classifier's are moved, in odds, so that each fold's threshold comes to lie at one half."""
    score = rows[name].to_numpy(float)
    if name != "probability":
        return score
    clipped, threshold = score.clip(1e-12, 1 - 1e-12), rows["threshold"].to_numpy(float).clip(1e-12, 1 - 1e-12)
    odds = clipped / (1 - clipped) * (1 - threshold) / threshold
    return np.where(threshold == 0.5, score, odds / (1 + odds))


def _difference(rows: pd.DataFrame, other: str) -> dict:
    target = rows["target"].to_numpy()
    ours, theirs = (weighted_metrics(target, at_half(rows, name)) for name in ("probability", other))
    return paired(ours, theirs, rows)


def paired(ours: Statistic, theirs: Statistic, rows: pd.DataFrame) -> dict[str, dict]:
    """By how much one statistic of the N `rows`, weights [R, N] -> {metric: [R]}, exceeds another: see `estimated`."""

    def statistic(weights: np.ndarray) -> dict[str, np.ndarray]:
        one, two = ours(weights), theirs(weights)
        return {name: one[name] - two[name] for name in COMPARED}

    return estimated(statistic, rows)


def estimated(statistic: Statistic, rows: pd.DataFrame) -> dict[str, dict]:
    """`estimate` and `ci95`, by bootstrap over the patients of the N `rows`, of each metric in COMPARED.

    statistic: weights float64 [R, N] -> {metric: float64 [R]}. Both are None where undefined.
    """

    def finite(value: np.float64) -> float | None:
        return float(value) if np.isfinite(value) else None

    codes = patient_codes(units(rows), len(rows))
    estimate = statistic(np.ones((1, len(rows))))
    resampled = bootstrap(statistic, codes)
    return {
        name: {"estimate": finite(estimate[name][0]), "ci95": interval(resampled[name], codes.max() + 1)[0]}
        for name in COMPARED
    }


def summary(pooled: dict) -> str:
    """The pooled scores of every image and the differences, in 80 columns."""
    lines = [f"All folds together, {pooled['images']} images, each tested once", row("", ["ROC AUC", "accuracy"])]
    for name, result in pooled["test_full"].items():
        lines.append(row(SCORERS[name], [_cell(result[metric], result[f"{metric}_ci95"]) for metric in COMPARED]))
    lines += [verdict(name, result) for name, result in pooled["difference"]["test_full"].items()]
    return "\n".join(lines)


def row(title: str, columns: list[str]) -> str:
    """A line of the table of scorers."""
    return f"{title:<37}" + "".join(f"{column:>21}" for column in columns)


def cells(figures: dict[str, dict]) -> list[str]:
    """What `estimated` gives, as it is printed in a row."""
    return [_cell(figures[metric]["estimate"], figures[metric]["ci95"]) for metric in COMPARED]


def verdict(name: str, gain: dict[str, dict]) -> str:
    """By how much the classifier beats the scorer `name`, in two lines; `gain` as `estimated` gives it."""
    better = gain["roc_auc"]["estimate"] or 0
    auc, accuracy = (_cell(gain[metric]["estimate"], gain[metric]["ci95"], "+") for metric in COMPARED)
    return (
        f"The classifier {'beats' if better > 0 else 'loses to'} {SCORERS[name]}\n"
        f"  by {auc} in ROC AUC, {accuracy} in accuracy"
    )


def _cell(value: float | None, bounds: list[float] | None, sign: str = "") -> str:
    if value is None:
        return "undefined"
    return f"{value:{sign}.3f}" + (f" [{bounds[0]:{sign}.3f}, {bounds[1]:{sign}.3f}]" if bounds else "")
