"""Who the model fails: the same metrics for each sex, age band, site and diagnosis, and its worst errors."""

import numpy as np
import pandas as pd

from Modules.data.metadata import UNKNOWN, age_band
from Modules.evaluation.gallery import nearest_known
from Modules.evaluation.metrics import evaluate
from Modules.evaluation.scoring import units

ENOUGH = 20  # images of a class; below it an interval of a proportion spans 40 percentage points and more
NAMES = ("roc_auc", "recall", "specificity")
NEEDS = {"roc_auc": (0, 1), "recall": (1,), "specificity": (0,)}  # classes that a metric rests on
WORST = 6  # errors of each kind that are shown
NEIGHBOURS = 3


def subgroups(table: pd.DataFrame, probability: np.ndarray, threshold: float, strata: dict[str, pd.Series]) -> list:
    """One row for every value of every stratum, for instance of sex, most images first.

    `table` has `target`, `patient_id`, `group`; `strata` gives each of its rows a word. A row holds `stratum`, `value`,
    `n`, `n_malignant`, `n_patients`, and of NAMES the value, its `_ci95` and `undefined` reasons, as `metrics.evaluate`
    has them; `too_few` lists those that rest on fewer than ENOUGH images of a class.
    """
    rows = []
    target = table["target"].to_numpy()
    for stratum, words in strata.items():
        words = words.to_numpy(object)
        for value in pd.Series(words).value_counts().index:
            chosen = words == value
            result = evaluate(target[chosen], probability[chosen], threshold, units(table)[chosen])
            counts = result["n"] - result["n_malignant"], result["n_malignant"]
            kept = {key: result[key] for name in NAMES for key in (name, f"{name}_ci95")}
            rows.append(
                {"stratum": stratum, "value": value}
                | {name: result[name] for name in ("n", "n_malignant", "n_patients")}
                | kept
                | {"undefined": {key: reason for key, reason in result["undefined"].items() if key in kept}}
                | {"too_few": [name for name in NAMES if min(counts[label] for label in NEEDS[name]) < ENOUGH]}
            )
    return rows


def described(table: pd.DataFrame) -> dict[str, pd.Series]:
    """The strata of `subgroups` that the columns of `table` tell; one of unknowns alone is none."""
    strata = {
        "sex": table["sex"].fillna(UNKNOWN),
        "age": age_band(table["age_approx"]),
        "site": table["anatom_site_general_challenge"].fillna(UNKNOWN),
        "diagnosis": table["diagnosis"].fillna(UNKNOWN),
    }
    return {name: words for name, words in strata.items() if (words != UNKNOWN).any()}


def worst_errors(
    table: pd.DataFrame, probability: np.ndarray, embeddings: np.ndarray, gallery: dict, threshold: float
) -> list[dict]:
    """The WORST missed malignant images and false alarms, each with its NEIGHBOURS most similar known lesions.

    A row: `isic_id`, `target`, `probability`, `neighbours` (`isic_id`, `target`, `cosine`).
    """
    target = table["target"].to_numpy()
    wrong = (probability >= threshold) != (target == 1)
    rows = []
    for label in (1, 0):
        places = np.flatnonzero(wrong & (target == label))
        places = places[np.argsort(probability[places] if label else -probability[places], kind="stable")][:WORST]
        nearest, cosines = nearest_known(embeddings[places], gallery, NEIGHBOURS)
        for place, known, similar in zip(places, nearest, cosines, strict=True):
            neighbours = [
                {
                    "isic_id": str(gallery["ids"][i]),
                    "target": int(gallery["targets"][i]),
                    "cosine": float(cosine),
                }
                for i, cosine in zip(known, similar, strict=True)
            ]
            rows.append(
                {
                    "isic_id": str(table["isic_id"].iloc[place]),
                    "target": label,
                    "probability": float(probability[place]),
                    "neighbours": neighbours,
                }
            )
    return rows
