"""Decision curve: is acting on the model better than treating everybody or nobody?

Net benefit (Vickers & Elkin, Medical Decision Making 2006): true positives less false ones, a false one counting as
much as the odds of the threshold probability, all per image. Somebody who would excise up to 20 lesions for one
melanoma acts from a probability of 1 / 20 on, and reads the curve there.
"""

import numpy as np
from scipy.special import expit, logit

from Modules.evaluation.intervals import bootstrap, interval

POINTS = 41
SPAN = 2.5  # logits to either side of the prevalence: where treating all and treating none are both in question


def decision_curve(target: np.ndarray, probability: np.ndarray, prevalence: float, codes: np.ndarray) -> dict:
    """Net benefit per image at POINTS threshold probabilities around `prevalence`, with 95 % intervals over patients.

    target: int [N]. probability: float [N], as they are at `prevalence`. codes: int [N], each image's patient.
    Sensitivity and specificity are those of the images, their shares those of `prevalence`. Returns `thresholds`,
    `model`, `model_ci95` ([low, high] or None each), `treat_all` (lists of POINTS numbers); `treat_none` is 0
    everywhere. Where a class is missing: `undefined`, the reason, instead.
    """
    result = {"prevalence": float(prevalence), "n": len(target), "n_malignant": int(np.sum(target))}
    if not 0 < result["n_malignant"] < result["n"]:
        return result | {"undefined": "both classes are needed"}
    thresholds = expit(logit(prevalence) + np.linspace(-SPAN, SPAN, POINTS))
    odds = thresholds / (1 - thresholds)
    called = (probability[:, None] >= thresholds).astype(np.float64)  # [N, POINTS]
    malignant = (target == 1).astype(np.float64)

    def net_benefit(weights: np.ndarray) -> np.ndarray:
        """[R, POINTS], NaN where a resample lacks a class."""
        with np.errstate(invalid="ignore"):
            hits = weights @ (called * malignant[:, None]) / (weights @ malignant)[:, None]
            alarms = weights @ (called * (1 - malignant)[:, None]) / (weights @ (1 - malignant))[:, None]
        return prevalence * hits - (1 - prevalence) * odds * alarms

    def statistic(weights: np.ndarray) -> dict[int, np.ndarray]:
        return dict(enumerate(net_benefit(weights).T))

    resampled = bootstrap(statistic, codes)
    return result | {
        "thresholds": thresholds.tolist(),
        "model": net_benefit(np.ones((1, len(target))))[0].tolist(),
        "model_ci95": [interval(resampled[point], int(codes.max()) + 1)[0] for point in range(POINTS)],
        "treat_all": (prevalence - (1 - prevalence) * odds).tolist(),
    }
