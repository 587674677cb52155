"""Calibration on validation, correction for the prevalence, and the choice of a threshold.

Every correction is a line in the logit: `scale * logit + offset`. It keeps the ranking and is a fixed dense layer of
the saved model. (Isotonic regression would do neither, and needs many hundreds of images.)
"""

import numpy as np
from scipy.special import expit, logit

from Modules.cli import UserError, nearest
from Modules.evaluation.intervals import bootstrap, interval
from Modules.evaluation.metrics import calibrated_ece, ece_interval, weighted_metrics

METHODS = ("platt", "temperature")
SCALES = (0.01, 100.0)  # never 0 or negative: calibration must not undo the ranking
MANY = 200  # images of the rarer class from which on an offset is more than noise: platt instead of temperature
TRAINING_PREVALENCE = 0.5  # training batches show both classes alike, whatever the shares in the data
RULES = ("half", "youden", "sensitivity=0.9", "f1", "cost=RATIO")
SLACK = 1e-9  # so that 0.9 times a count of 10 is reached by 9


def fit(
    logits: np.ndarray, target: np.ndarray, method: str = "platt", weights: np.ndarray | None = None
) -> tuple[float, float]:
    """(scale, offset) with which `scale * logit + offset` is calibrated on logits float [N] and target int [N].

    `weights` float [N] say how much each image counts, by default all alike.

    `platt` fits both (Platt, Advances in Large Margin Classifiers 1999), `temperature` the scale alone (Guo et al.,
    ICML 2017). Both aim at Platt's smoothed targets, (N₊ + 1) / (N₊ + 2) and 1 / (N₋ + 2), so that few or separable
    images give a finite scale. With one class only nothing can be fitted: (1, 0), the logits as they are.

    Raises UserError for an unknown method, ValueError for other shapes and for logits that are not finite.
    """
    logits, target = np.asarray(logits, dtype=np.float64), np.asarray(target)
    if method not in METHODS:
        raise UserError(f"unknown calibration {method}: {nearest(method, METHODS)}")
    if logits.ndim != 1 or logits.shape != target.shape or not np.isfinite(logits).all():
        raise ValueError(f"logits and target must both be [N] and finite, got {logits.shape} and {target.shape}")
    positives = int(np.sum(target == 1))
    negatives = len(target) - positives
    if not positives or not negatives:
        return 1.0, 0.0
    smoothed = np.where(target == 1, (positives + 1) / (positives + 2), 1 / (negatives + 2))
    share = np.full(len(target), 1 / len(target)) if weights is None else weights / np.sum(weights)

    def loss(line: np.ndarray) -> tuple[float, np.ndarray]:
        """Mean cross-entropy, convex in the line, and its gradient."""
        z = line[0] * logits + line[1]
        residual = share * (expit(z) - smoothed)
        return share @ (np.logaddexp(0, z) - smoothed * z), np.array([residual @ logits, np.sum(residual)])

    offsets = (None, None) if method == "platt" else (0.0, 0.0)
    from scipy.optimize import minimize  # slow to import, and not needed to score a picture

    found = minimize(loss, (1.0, 0.0), jac=True, method="L-BFGS-B", bounds=[SCALES, offsets], options={"ftol": 1e-14})
    return float(found.x[0]), float(found.x[1])


def calibrate(logits: np.ndarray, target: np.ndarray, codes: np.ndarray) -> dict:
    """What `best_epoch.json` keeps of a calibration on validation: logits float [N], target int [N], patients int [N].

    `method`: `platt` where there are at least MANY images of each class, else `temperature`. Both classes weigh alike,
    as in the batches of training, so that the calibrated probability assumes `training_prevalence`, one half, also
    where validation has another share. `scale`, `offset`: the line; `validation`: `before` and `after` it, as
    `errors_at` gives them.
    """
    method = "platt" if np.bincount(target, minlength=2).min() >= MANY else "temperature"
    scale, offset = fit(logits, target, method, mix_weights(target, TRAINING_PREVALENCE))
    lines = {"before": logits, "after": scale * logits + offset}
    return {
        "method": method,
        "scale": scale,
        "offset": offset,
        "training_prevalence": TRAINING_PREVALENCE,
        "validation": {
            name: errors_at(target, expit(line), TRAINING_PREVALENCE, codes) for name, line in lines.items()
        },
    }


def calibrated(calibration: dict, logits: np.ndarray) -> np.ndarray:
    """Probabilities [N] of logits [N] by what `calibrate` returned."""
    return expit(calibration["scale"] * logits + calibration["offset"])


def uncalibrated(calibration: dict, probability: np.ndarray) -> np.ndarray:
    """What the model would say without its calibration instead of the probabilities [N] that it says."""
    probability = np.clip(np.asarray(probability, np.float64), 1e-7, 1 - 1e-7)  # float32 saturates
    return expit((logit(probability) - calibration["offset"]) / calibration["scale"])


def mix_weights(target: np.ndarray, prevalence: float) -> np.ndarray:
    """Weights [N], of mean 1, with which the share of malignant images is `prevalence`; ones if a class is missing."""
    share = np.mean(target)
    if not 0 < share < 1:
        return np.ones(len(target))
    return np.where(target == 1, prevalence / share, (1 - prevalence) / (1 - share))


def errors_at(
    target: np.ndarray, probability: np.ndarray, prevalence: float, codes: np.ndarray, resamples: int = 2000
) -> dict:
    """`brier` and `ece` of probabilities [N] where the share of malignant images is `prevalence`, with their intervals.

    The images are weighted to that share, by class, which holds where a class looks alike everywhere (label shift).
    """
    weights = mix_weights(target, prevalence)
    statistic = weighted_metrics(target, probability)
    point = statistic(weights[None])
    resampled = bootstrap(lambda drawn: statistic(drawn * weights), codes, resamples)
    brier, ece = (float(point[name][0]) for name in ("brier", "ece"))
    intervals = {name: interval(resampled[name], int(codes.max()) + 1)[0] for name in ("brier", "ece")}
    share = np.mean(target)
    # Probabilities that hold at `prevalence` are others among the images as they are.
    drawn, mix = (correct_prior(probability, prevalence, share), prevalence) if 0 < share < 1 else (probability, None)
    intervals["ece"] = ece_interval(ece, intervals["ece"], calibrated_ece(probability, drawn, mix))
    return {
        "prevalence": prevalence, "n": len(target),
        "brier": brier, "brier_ci95": intervals["brier"],
        "ece": ece, "ece_ci95": intervals["ece"],
    }  # fmt: skip


def prior_offset(training_prevalence: float, prevalence: float) -> float:
    """What a change of prevalence adds to a logit (Elkan, IJCAI 2001; Saerens et al., Neural Computation 2002).

    Both lie strictly between 0 and 1, else UserError. `training_prevalence` is that of the images which the probability
    was fitted to: those of validation once it has been calibrated on them.
    """
    for value in (training_prevalence, prevalence):
        if not 0 < value < 1:
            raise UserError(f"a prevalence of {value:g} was given, expected a share strictly between 0 and 1")
    return float(logit(prevalence) - logit(training_prevalence))


def correct_prior(probability: np.ndarray, training_prevalence: float, prevalence: float) -> np.ndarray:
    """Probabilities [N] as they are where the share of malignant images is `prevalence` instead of the training's."""
    return expit(logit(np.asarray(probability, dtype=np.float64)) + prior_offset(training_prevalence, prevalence))


def parse_rule(rule: str) -> tuple[str, float | None]:
    """(name, number) of `half`, `youden`, `f1`, `sensitivity=S` (0 < S <= 1) or `cost=R` (R > 0), else UserError."""
    name, equals, number = rule.strip().lower().partition("=")
    if name not in ("half", "youden", "f1", "sensitivity", "cost"):
        raise UserError(f"unknown threshold rule {rule}: {nearest(rule, RULES)}")
    if name in ("half", "youden", "f1"):
        if equals:
            raise UserError(f"the threshold rule {name} takes no number, got {rule}")
        return name, None
    try:
        value = float(number)
    except ValueError:
        value = np.nan
    if not 0 < value <= (1 if name == "sensitivity" else np.finfo(float).max):
        expected = (
            "a share in (0, 1], as in sensitivity=0.9" if name == "sensitivity" else "a ratio above 0, as in cost=20"
        )
        raise UserError(f"threshold rule {rule}: expected {expected}")
    return name, value


def check(rule: str, prevalence: float) -> None:
    """Raise UserError for a rule or a prevalence that is none."""
    parse_rule(rule)
    prior_offset(TRAINING_PREVALENCE, prevalence)


def choose_threshold(
    target: np.ndarray, probability: np.ndarray, rule: str, prevalence: float = TRAINING_PREVALENCE
) -> float:
    """The threshold t (malignant where probability >= t) that `rule` picks on target int [N], probability float [N].

    `half`: 0.5, whatever the images: Bayes' rule for a calibrated probability where both errors cost the same, and free
    of the noise of a threshold chosen on a hundred images. `youden`: the largest sensitivity + specificity - 1.
    `sensitivity=S`: the highest threshold that reaches it. `f1`: the largest F1, at the shares of these images. Among
    equals the highest threshold. It lies halfway between two neighbouring scores, where another machine's rounding
    flips no image. `cost=R`, a missed malignant image counting R false alarms, again by Bayes' rule: from 1 / (1 + R)
    on at `prevalence` (Elkan, IJCAI 2001), whatever the images.
    Raises UserError for an unknown rule and where one class is missing.
    """
    name, value = parse_rule(rule)
    if name == "half":
        return 0.5
    if name == "cost":
        return float(correct_prior(1 / (1 + value), prevalence, TRAINING_PREVALENCE))
    target, probability = np.asarray(target), np.asarray(probability, dtype=np.float64)
    positives = int(np.sum(target == 1))
    negatives = len(target) - positives
    if not positives or not negatives:
        raise UserError(
            f"threshold rule {rule} needs images of both classes, here are {negatives} benign and {positives} malignant"
        )
    from sklearn.metrics import roc_curve  # as above

    fpr, tpr, scores = roc_curve(target, probability, drop_intermediate=False)  # from (0, 0), score = infinity
    false_alarms, hits = fpr * negatives, tpr * positives
    if name == "youden":
        gain = tpr - fpr
    elif name == "sensitivity":
        gain = np.where(tpr >= value - SLACK, 1.0, 0.0)
    else:
        gain = 2 * hits / (hits + false_alarms + positives)
    best = int(np.argmax(np.round(gain, 12)))
    if best == 0 and scores[1] >= 1:
        return float(np.nextafter(1, 2))  # nothing is called malignant, not even a probability of 1
    above = min(scores[best], 1.0)
    below = scores[best + 1] if best + 1 < len(scores) else 0.0
    middle = (above + below) / 2
    return float(middle if middle > below else above)
