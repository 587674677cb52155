"""Two models on the same images: is one better, or is it chance?

Differences are paired: both models see the same image, so what is hard for both cancels out.
"""

import numpy as np
from scipy.stats import binomtest, norm, rankdata

from Modules.evaluation.intervals import bootstrap, interval
from Modules.evaluation.metrics import PREVALENCE, evaluate, weighted_metrics


def compare(
    target: np.ndarray,
    first: np.ndarray,
    second: np.ndarray,
    thresholds: tuple[float, float],
    codes: np.ndarray,
    prevalence: float = PREVALENCE,
) -> dict:
    """Everything about how the probabilities `first` [N] differ from `second` [N] on target int [N].

    thresholds: those of the two models. codes: int [N], each image's patient. prevalence: that of `ppv` and `npv`.
    Returns `n`, `n_malignant`, `differences` (a row a metric: `first`, `second`, `difference` = first - second, its
    `ci95` by paired bootstrap over patients, or None and the `reason`), `delong` and `mcnemar`.
    """
    sides = [
        evaluate(target, side, threshold, codes, prevalence, resamples=2)
        for side, threshold in zip((first, second), thresholds, strict=True)
    ]
    statistics = [
        weighted_metrics(target, side, at, prevalence) for side, at in zip((first, second), thresholds, strict=True)
    ]

    def differences(weights: np.ndarray) -> dict[str, np.ndarray]:
        one, other = (statistic(weights) for statistic in statistics)
        return {name: one[name] - other[name] for name in one}

    rows = {}
    for name, resampled in bootstrap(differences, codes).items():
        one, other = (side[name] for side in sides)
        row = {"first": one, "second": other, "difference": None, "ci95": None, "reason": ""}
        if one is None or other is None:
            row["reason"] = next(side["undefined"][name] for side in sides if side[name] is None)
        else:
            row["difference"] = one - other
            row["ci95"], row["reason"] = interval(resampled, int(codes.max()) + 1)
        rows[name] = row
    right = [(side >= at) == (target == 1) for side, at in zip((first, second), thresholds, strict=True)]
    return {
        "n": len(target),
        "n_malignant": int(np.sum(target)),
        "differences": rows,
        "delong": delong(target, first, second),
        "mcnemar": mcnemar(*right),
    }


def delong(target: np.ndarray, first: np.ndarray, second: np.ndarray) -> dict:
    """Test of equal ROC AUC (DeLong, DeLong & Clarke-Pearson, Biometrics 1988; mid-ranks by Sun & Xu, IEEE SPL 2014).

    target int [N], scores [N]. Returns `difference` of the areas, its `standard_error`, `z` and two-sided `p`; where
    it has none, `p` is None and `reason` says why. Images count as independent: with several of a patient the test is
    too sure, and the bootstrap over patients is the one to believe.
    """
    malignant = target == 1
    m, n = int(malignant.sum()), int((~malignant).sum())
    result = {"difference": None, "standard_error": None, "z": None, "p": None, "reason": ""}
    if min(m, n) < 2:
        return result | {"reason": "two images of each class are needed"}
    parts = []
    for score in (first, second):
        ranks = rankdata(score)
        # Placements: the share of the other class that an image stands on the right side of.
        above = (ranks[malignant] - rankdata(score[malignant])) / n
        below = 1 - (ranks[~malignant] - rankdata(score[~malignant])) / m
        parts.append((above.mean(), above, below))
    (area_1, above_1, below_1), (area_2, above_2, below_2) = parts
    variance = np.var(above_1 - above_2, ddof=1) / m + np.var(below_1 - below_2, ddof=1) / n
    result["difference"] = float(area_1 - area_2)
    if variance < 1e-20:
        return result | {"reason": "both models rank the images alike"}
    error = float(np.sqrt(variance))
    z = result["difference"] / error
    return result | {"standard_error": error, "z": z, "p": float(2 * norm.sf(abs(z)))}


def mcnemar(first_right: np.ndarray, second_right: np.ndarray) -> dict:
    """Exact test of equal accuracy (McNemar, Psychometrika 1947) on which answers, bool [N], are right.

    Only images that one model gets right and the other wrong count: `only_first`, `only_second`, two-sided `p` (1 where
    there is none). Images count as independent, as in `delong`.
    """
    only_first = int(np.sum(first_right & ~second_right))
    only_second = int(np.sum(~first_right & second_right))
    total = only_first + only_second
    p = float(binomtest(only_first, total, 0.5).pvalue) if total else 1.0
    return {"only_first": only_first, "only_second": only_second, "p": p}
