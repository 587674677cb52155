"""Metrics of a binary classifier, benign (0) or malignant (1), each with its 95 % interval over patients.

An image is called malignant where probability >= threshold. The point estimates are scikit-learn's where it has the
metric; the resamples of the bootstrap come from one vectorised pass over the sorted scores (`weighted_metrics`).
"""

from collections.abc import Sequence

import numpy as np

from Modules.evaluation.intervals import Statistic, bootstrap, interval, patient_codes

PREVALENCE = 0.0176  # of melanoma among the images of the ISIC 2020 training set (584 of 33,126)
ECE_BINS = 10
CONSISTENT = 1000  # samples of a model that is perfectly calibrated
CELLS = 2_000_000  # of them held at once
MINIMUM_TPR = 0.8  # ISIC 2024: only the part of the ROC curve above it counts
SLACK = 1e-9  # so that 0.9 times a count of 10 is reached by 9


def evaluate(
    target: np.ndarray,
    probability: np.ndarray,
    threshold: float = 0.5,
    patients: Sequence | None = None,
    prevalence: float = PREVALENCE,
    resamples: int = 2000,
    seed: int = 0,
) -> dict:
    """Every metric of one set of predictions, as plain Python values for JSON.

    target: int [N], 0 or 1. probability: float [N] in 0..1. patients: [N] or None (each image is a patient of its own).
    prevalence: the share of malignant images at which `ppv` and `npv` are stated (by Bayes' rule).

    Each metric `name` has `name_ci95`, [low, high] by bootstrap over patients. What is undefined (one class only, no
    images, nothing called malignant) is None, its reason in `undefined[name]`.

    * `pauc_above_80_tpr`: area between the ROC curve and the line of 80 % sensitivity, 0 .. 0.2, as ISIC 2024 scored.
    * `sensitivity_at_90_specificity`, `specificity_at_90_sensitivity`: the best operating point that really occurs, no
      interpolation.
    * `ece`: expected calibration error (Naeini et al., AAAI 2015) over 10 bins of equal mass (Nixon et al., CVPR
      workshops 2019): at 2 % prevalence bins of equal width would put nearly every image into one. Its plug-in estimate
      is biased upwards in small samples (Roelofs et al., AISTATS 2022): see `ece_interval`.

    Raises ValueError for shapes that differ, probabilities that are not in 0..1 (NaN among them), targets but 0 and 1.
    """
    from sklearn.metrics import confusion_matrix  # slow to import, and not needed to score a picture

    target, probability = _checked(target, probability)
    codes = patient_codes(patients, len(target))
    matrix = confusion_matrix(target, probability >= threshold, labels=[0, 1]) if len(target) else np.zeros((2, 2), int)
    values = _proportions(*matrix.ravel().astype(np.float64), prevalence) | _scores(target, probability)
    result = {
        "n": len(target),
        "n_malignant": int(target.sum()),
        "n_patients": len(np.unique(codes)),
        "threshold": float(threshold),
        "prevalence": float(prevalence),
        "confusion_matrix": matrix.tolist(),
    }
    undefined = {}
    resampled = {}
    if len(target):
        resampled = bootstrap(weighted_metrics(target, probability, threshold, prevalence), codes, resamples, seed)
    for name, value in values.items():
        if np.isfinite(value):
            result[name] = float(value)
            bounds, reason = interval(resampled[name], result["n_patients"])
            if name == "ece":
                bounds = ece_interval(value, bounds, calibrated_ece(probability, seed=seed))
            result[f"{name}_ci95"] = bounds
            if reason:
                undefined[f"{name}_ci95"] = reason
        else:
            result[name] = result[f"{name}_ci95"] = None
            undefined[name] = undefined[f"{name}_ci95"] = _reason(name, matrix)
    return result | {"undefined": undefined}


def weighted_metrics(
    target: np.ndarray, probability: np.ndarray, threshold: float = 0.5, prevalence: float = PREVALENCE
) -> Statistic:
    """The same metrics as a function of image weights: float64 [R, N] → {name: float64 [R]}, NaN where undefined.

    The scores are sorted once; a row's ROC curve is then two cumulative sums, read at the end of each run of ties.
    """
    order = np.argsort(-probability, kind="stable")
    score, malignant = probability[order], target[order] == 1
    ends = np.flatnonzero(np.diff(score, append=-np.inf))  # U distinct scores, highest first
    called = int(np.searchsorted(-score[ends], -threshold, side="right"))
    squared = (probability - target) ** 2
    residuals = _binned_residuals(target, probability)  # [N, bins]
    from_zero = ((0, 0), (1, 0))

    def statistic(weights: np.ndarray) -> dict[str, np.ndarray]:
        ordered = weights[:, order]
        tp = np.pad(np.cumsum(ordered * malignant, axis=1)[:, ends], from_zero)  # [R, U + 1]
        fp = np.pad(np.cumsum(ordered * ~malignant, axis=1)[:, ends], from_zero)
        positives, negatives = tp[:, -1], fp[:, -1]
        hits, alarms = tp[:, called], fp[:, called]
        width, height = np.diff(fp), np.diff(tp)
        area = (width * (tp[:, 1:] + tp[:, :-1])).sum(axis=1) / 2
        precision = tp[:, 1:] / np.maximum(tp[:, 1:] + fp[:, 1:], 1)
        both = np.where((positives > 0) & (negatives > 0), 1.0, np.nan)
        total = positives + negatives
        return _proportions(negatives - alarms, alarms, positives - hits, hits, prevalence) | {
            "roc_auc": both * _divide(area, positives * negatives),
            "average_precision": both * _divide((height * precision).sum(axis=1), positives),
            "pauc_above_80_tpr": both * _divide(_area_above(width, tp, MINIMUM_TPR), positives * negatives),
            **{name: both * value for name, value in _operating_points(fp, tp).items()},
            "brier": _divide(weights @ squared, total),
            "ece": _divide(np.abs(weights @ residuals).sum(axis=1), total),
        }

    return statistic


def _checked(target, probability) -> tuple[np.ndarray, np.ndarray]:
    target, probability = np.asarray(target), np.asarray(probability, dtype=np.float64)
    if target.ndim != 1 or target.shape != probability.shape:
        raise ValueError(f"target and probability must both be [N], got {target.shape} and {probability.shape}")
    if not np.isin(target, (0, 1)).all():
        raise ValueError(f"target must be 0 (benign) or 1 (malignant), got {np.unique(target)[:5]}")
    wrong = ~((probability >= 0) & (probability <= 1))
    if wrong.any():
        raise ValueError(
            f"{wrong.sum()} of {len(wrong)} probabilities are not a number between 0 and 1, "
            f"the first is {probability[wrong][0]} at index {np.flatnonzero(wrong)[0]}"
        )
    return target.astype(np.int64), probability


def _divide(numerator, denominator):
    """NaN where the denominator is 0."""
    return np.where(denominator > 0, numerator / np.where(denominator > 0, denominator, 1), np.nan)


def _proportions(tn, fp, fn, tp, prevalence: float) -> dict:
    recall, specificity = _divide(tp, tp + fn), _divide(tn, tn + fp)
    true_alarm, false_alarm = recall * prevalence, (1 - specificity) * (1 - prevalence)
    true_clear, false_clear = specificity * (1 - prevalence), (1 - recall) * prevalence
    return {
        "accuracy": _divide(tp + tn, tn + fp + fn + tp),
        "balanced_accuracy": (recall + specificity) / 2,
        "precision": _divide(tp, tp + fp),
        "recall": recall,
        "specificity": specificity,
        "f1": _divide(2 * tp, 2 * tp + fp + fn),
        "ppv": _divide(true_alarm, true_alarm + false_alarm),
        "npv": _divide(true_clear, true_clear + false_clear),
    }


def _scores(target: np.ndarray, probability: np.ndarray) -> dict[str, float]:
    from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

    ranking = ["roc_auc", "average_precision", "pauc_above_80_tpr"]
    ranking += ["sensitivity_at_90_specificity", "specificity_at_90_sensitivity"]
    scores = dict.fromkeys([*ranking, "brier", "ece"], np.nan)
    if 0 < target.sum() < len(target):
        fpr, tpr, _ = roc_curve(target, probability, drop_intermediate=False)
        area_above = _area_above(np.diff(fpr)[None], tpr[None], MINIMUM_TPR)
        scores["roc_auc"] = roc_auc_score(target, probability)
        scores["average_precision"] = average_precision_score(target, probability)
        scores["pauc_above_80_tpr"] = area_above[0]
        scores |= {name: value[0] for name, value in _operating_points(fpr[None], tpr[None]).items()}
    if len(target):
        scores["brier"] = np.mean((probability - target) ** 2)
        scores["ece"] = np.abs(_binned_residuals(target, probability).sum(axis=0)).sum() / len(target)
    return scores


def _operating_points(fp: np.ndarray, tp: np.ndarray) -> dict[str, np.ndarray]:
    """From rising counts (or rates) [R, U + 1] along the ROC curve; both are monotone, so counting finds the point."""
    positives, negatives = tp[:, -1:], fp[:, -1:]
    last = (fp <= (0.1 + SLACK) * negatives).sum(axis=1, keepdims=True) - 1
    first = (tp < (0.9 - SLACK) * positives).sum(axis=1, keepdims=True)
    return {
        "sensitivity_at_90_specificity": _divide(np.take_along_axis(tp, last, axis=1), positives)[:, 0],
        "specificity_at_90_sensitivity": 1 - _divide(np.take_along_axis(fp, first, axis=1), negatives)[:, 0],
    }


def _area_above(width: np.ndarray, tp: np.ndarray, minimum: float) -> np.ndarray:
    """Area [R] between the polygon through tp [R, U + 1], steps of `width` [R, U], and `minimum` of its last value.

    The mean of max(u, 0) for u running evenly from a to b is (max(b, 0)² - max(a, 0)²) / 2(b - a).
    """
    above = tp - minimum * tp[:, -1:]
    clipped = np.maximum(above, 0)
    rise = np.diff(tp)
    mean = np.where(rise > 0, np.diff(clipped**2) / (2 * np.where(rise > 0, rise, 1)), clipped[:, 1:])
    return (width * mean).sum(axis=1)


def calibration_bins(probability: np.ndarray) -> np.ndarray:
    """Each probability's bin of equal mass, int [N] in 0 .. ECE_BINS - 1, edges as `sklearn.calibration_curve`'s."""
    edges = np.percentile(probability, np.linspace(0, 100, ECE_BINS + 1))[1:-1]
    return np.searchsorted(edges, probability)


def calibrated_ece(
    probability: np.ndarray, drawn: np.ndarray | None = None, prevalence: float | None = None, seed: int = 0
) -> float:
    """The `ece` that probabilities float [N] exceed in 2.5 % of samples although they are perfectly calibrated.

    The classes are drawn from the probabilities themselves (consistency resampling: Bröcker & Smith, Weather and
    Forecasting 2007). Where the images are weighted to a `prevalence`, `drawn` float [N] are the probabilities that
    hold among them unweighted.
    """
    drawn = probability if drawn is None else drawn
    rng = np.random.default_rng(seed)
    rows = max(1, CELLS // len(probability))
    found = []
    for start in range(0, CONSISTENT, rows):
        target = rng.random((min(rows, CONSISTENT - start), len(probability))) < drawn  # [R, N]
        weights = np.ones(target.shape)
        if prevalence is not None:
            share = np.clip(target.mean(axis=1, keepdims=True), 1e-9, 1 - 1e-9)
            weights = np.where(target, prevalence / share, (1 - prevalence) / (1 - share))
        bins = calibration_bins(probability)[:, None] == np.arange(ECE_BINS)
        residuals = (weights * (target - probability)) @ bins.astype(float)  # [R, bins]
        found.append(np.abs(residuals).sum(axis=1) / weights.sum(axis=1))
    return float(np.quantile(np.concatenate(found), 0.975))


def ece_interval(value: float, percentiles: list[float] | None, by_chance: float) -> list[float] | None:
    """The interval of an `ece` from the `percentiles` of its resamples; 0 belongs to it unless `value` exceeds what
    `calibrated_ece` says chance makes of perfect calibration.

    Each resample adds the estimate's bias once more, so the upper percentile is on the safe side, and is mirrored at
    the estimate for the lower bound.
    """
    if percentiles is None:
        return None
    high = max(percentiles[1], value)
    return [max(2 * value - high, 0.0) if value > by_chance else 0.0, min(high, 1.0)]


def _binned_residuals(target: np.ndarray, probability: np.ndarray) -> np.ndarray:
    """target - probability, each image's in the column of its bin [N, bins]."""
    return (target - probability)[:, None] * (calibration_bins(probability)[:, None] == np.arange(ECE_BINS))


def _reason(name: str, matrix: np.ndarray) -> str:
    (tn, fp), (fn, tp) = matrix
    if not matrix.sum():
        return "no images"
    if name != "precision" and not fn + tp:
        return "no malignant image"
    if name != "precision" and not tn + fp:
        return "no benign image"
    return "no image called benign" if name == "npv" else "no image called malignant"
