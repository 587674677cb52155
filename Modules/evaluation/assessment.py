"""Everything that is measured of a finished model: what train.py puts into best_epoch.json and predict.py repeats.

Calibration and threshold come from validation (`decide`), before the test split is touched; `assess` then only reports
how they fall.
"""

import numpy as np
import pandas as pd
import tensorflow as tf

from dataset import image_batches
from Modules.config import Data
from Modules.data.manifest import LABELS
from Modules.evaluation import scoring
from Modules.evaluation.calibration import (
    TRAINING_PREVALENCE,
    calibrate,
    calibrated,
    choose_threshold,
    correct_prior,
    errors_at,
    prior_offset,
    uncalibrated,
)
from Modules.evaluation.decision_curve import decision_curve
from Modules.evaluation.external import picture_statistics
from Modules.evaluation.intervals import patient_codes
from Modules.evaluation.shortcuts import shortcuts
from Modules.evaluation.subgroups import described, subgroups, worst_errors
from Modules.inference import optimised


def decide(validation: pd.DataFrame, logits: np.ndarray, rule: str, prevalence: float) -> tuple[dict, float]:
    """The calibration fitted on the logits float [N, 1] of validation, and the threshold that `rule` chooses there.

    prevalence: that at which the rule `cost=R` weighs its errors.
    """
    target, logits = validation["target"].to_numpy(), np.asarray(logits, np.float64)[:, 0]
    calibration = calibrate(logits, target, patient_codes(scoring.units(validation), len(target)))
    return calibration, choose_threshold(target, calibrated(calibration, logits), rule, prevalence)


def describe_data(splits: dict[str, pd.DataFrame]) -> dict:
    """What was used of each split: `images`, `malignant`, `patients`; and the pictures of training (`reference`)."""
    counts = {
        name: {
            "images": len(table),
            "malignant": int(table["target"].sum()),
            "patients": int(scoring.units(table).nunique()),
        }
        for name, table in splits.items()
    }
    training = next(iter(splits.values()))
    reference = picture_statistics(training["file"]) | {"prevalence": float(training["target"].mean())}
    return {"splits": counts, "reference": reference}


def score_table(model: tf.keras.Model, table: pd.DataFrame, config: Data) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities [N] and embeddings [N, D] of the pictures in `table`."""
    return scoring.score(model, image_batches(table, config), len(table), "test")


def assess(
    model: tf.keras.Model, table: pd.DataFrame, gallery: dict, facts: dict, prevalence: float
) -> tuple[dict, np.ndarray, np.ndarray]:
    """Every result on the whole test split `table`, and its probabilities float [N] and embeddings float [N, D].

    facts: `config`, `threshold` and `calibration` of the run. The results: `prevalence`, `test` and `test_full`,
    `calibration` with its effect on test, `subgroups`, `decision_curves`, `errors` and `shortcuts`.
    """
    config, threshold, model = Data(**facts["config"]["data"]), facts["threshold"], optimised(model)
    probability, embeddings = score_table(model, table, config)
    results = scoring.evaluate_split(table, probability, embeddings, gallery, threshold, prevalence)
    score = scoring.compiled(model)
    return (
        {
            "prevalence": prevalence,
            **results,
            "calibration": calibration_on_test(table, probability, facts["calibration"], prevalence),
            "decision_curves": decision_curves(table, probability, prevalence),
            "subgroups": subgroups(table, probability, threshold, described(table)),
            "errors": worst_errors(table, probability, embeddings, gallery, threshold),
            "shortcuts": shortcuts(
                table, probability, lambda images: score(images)[0].numpy()[:, 0], config.image_size, threshold
            ),
        },
        probability,
        embeddings,
    )


def calibration_on_test(table: pd.DataFrame, probability: np.ndarray, calibration: dict, prevalence: float) -> dict:
    """`calibration` with what it does to the test split.

    `test`: the 50/50 set `before` and `after` the line. `at_prevalence`: the whole split weighted to `prevalence`,
    `before` and `after` the correction for it, which adds `prior_offset` to the logit.
    """
    target, patients = table["target"].to_numpy(), patient_codes(scoring.units(table), len(table))
    half = scoring.both_views(table)["test"]
    assumed = calibration["training_prevalence"]
    sides = {"before": uncalibrated(calibration, probability[half]), "after": probability[half]}
    codes = patient_codes(patients[half], int(half.sum()))
    corrected = {"before": probability, "after": correct_prior(probability, assumed, prevalence)}
    return calibration | {
        "prevalence": prevalence,
        "prior_offset": prior_offset(assumed, prevalence),
        "test": {name: errors_at(target[half], side, assumed, codes) for name, side in sides.items()},
        "at_prevalence": {name: errors_at(target, side, prevalence, patients) for name, side in corrected.items()},
    }


def decision_curves(table: pd.DataFrame, probability: np.ndarray, prevalence: float) -> dict[str, dict]:
    """Net benefit on the whole split at its `own` share of malignant images and at the `stated` prevalence."""
    target, codes = table["target"].to_numpy(), patient_codes(scoring.units(table), len(table))
    shares = {"own": float(target.mean()), "stated": prevalence}
    return {
        name: decision_curve(target, correct_prior(probability, TRAINING_PREVALENCE, share), share, codes)
        if 0 < share < 1
        else {"prevalence": share, "n": len(target), "undefined": f"every image is {LABELS[int(share)]}"}
        for name, share in shares.items()
    }
