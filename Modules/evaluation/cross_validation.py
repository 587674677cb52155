"""Every image is tested once, by a model that saw none of its patient's: the folds' scores in one table."""

from pathlib import Path

import numpy as np
import pandas as pd

from Modules.cli import UserError
from Modules.evaluation.gallery import nearest_known
from Modules.evaluation.intervals import bootstrap, interval, patient_codes
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


def pool(folders: list[Path], prevalence: float) -> dict:
    """`test` (the folds' 50/50 sets) and `test_full` (every image) of each scorer on the folds' scores together.

    `ppv` and `npv` are those at `prevalence`. Also `difference`: see `differences`.

    Raises:
        UserError: a fold's scores are missing.
    """
    tables = []
    for folder in folders:
        try:
            tables.append(pd.read_csv(folder / SCORES))
        except (OSError, ValueError) as error:
            raise UserError(f"no scores of a fold in {folder / SCORES} ({error}): train it with --fold") from None
    table = pd.concat(tables, ignore_index=True)
    scorers = [name for name in SCORERS if name in table]

    def evaluated(rows: pd.DataFrame, name: str) -> dict:
        return evaluate(rows["target"].to_numpy(), _at_half(rows, name), 0.5, units(rows), prevalence)

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


def _at_half(rows: pd.DataFrame, name: str) -> np.ndarray:
    """Scores [N]; the classifier's are moved, in odds, so that each fold's threshold comes to lie at one half."""
    score = rows[name].to_numpy(float)
    if name != "probability":
        return score
    clipped, threshold = score.clip(1e-12, 1 - 1e-12), rows["threshold"].to_numpy(float).clip(1e-12, 1 - 1e-12)
    odds = clipped / (1 - clipped) * (1 - threshold) / threshold
    return np.where(threshold == 0.5, score, odds / (1 + odds))


def _difference(rows: pd.DataFrame, other: str) -> dict:
    target = rows["target"].to_numpy()
    ours, theirs = (weighted_metrics(target, _at_half(rows, name)) for name in ("probability", other))

    def statistic(weights: np.ndarray) -> dict[str, np.ndarray]:
        one, two = ours(weights), theirs(weights)
        return {name: one[name] - two[name] for name in COMPARED}

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
    lines = [
        f"All folds together, {pooled['images']} images, each tested once",
        f"  {'':<38}{'ROC AUC':>20}{'accuracy':>20}",
    ]
    for name, result in pooled["test_full"].items():
        cells = (_with_interval(result[metric], result[f"{metric}_ci95"]) for metric in COMPARED)
        lines.append(f"  {SCORERS[name]:<38}" + "".join(f"{cell:>20}" for cell in cells))
    for name, result in pooled["difference"]["test_full"].items():
        gain = result["roc_auc"]
        verdict = "beats" if gain["estimate"] > 0 else "loses to"
        between = f" [{gain['ci95'][0]:+.3f}, {gain['ci95'][1]:+.3f}]" if gain["ci95"] else ""
        lines.append(f"The classifier {verdict} {SCORERS[name]}")
        lines.append(f"  by {gain['estimate']:+.3f}{between} in ROC AUC")
    return "\n".join(lines)


def _with_interval(value: float | None, bounds: list[float] | None) -> str:
    if value is None:
        return "undefined"
    return f"{value:.3f}" + (f" [{bounds[0]:.2f}, {bounds[1]:.2f}]" if bounds else "")
