"""95 % intervals by bootstrap over patients.

Images of one patient resemble one another, so patients are drawn with replacement, never images (Field & Welsh,
"Bootstrapping clustered data", J. R. Stat. Soc. B 2007). A resample is a row of integer weights: how often each image's
patient was drawn. A statistic that takes weights [R, N] then costs a few matrix operations for R resamples at once.
"""

from collections.abc import Callable, Sequence

import numpy as np

from Modules.metric_learning.sampling import group_codes

LEVEL = 0.95
ENOUGH = 0.9  # an interval needs at least this share of the resamples to be defined
BLOCK = 1_000_000  # weights held at once: 8 MB a temporary array

Statistic = Callable[[np.ndarray], dict[str, np.ndarray]]


def patient_codes(patients: Sequence | None, n: int) -> np.ndarray:
    """int64 [n], 0 .. number of patients - 1. An image without a patient (None, NaN) is a patient of its own."""
    if patients is None:
        return np.arange(n)
    if len(patients) != n:
        raise ValueError(f"patients has {len(patients)} entries, expected one for each of the {n} images")
    return group_codes(patients)


def bootstrap(statistic: Statistic, codes: np.ndarray, resamples: int = 2000, seed: int = 0) -> dict[str, np.ndarray]:
    """Values of `statistic` in each resample of the patients.

    statistic: weights float64 [R, N] → {name: float64 [R]}, NaN where undefined. Two models on the same images are
        compared by a statistic that returns the difference of theirs.
    codes: int [N], as `patient_codes` gives them. Returns {name: float64 [resamples]}.
    """
    rng = np.random.default_rng(seed)
    patients = int(codes.max()) + 1
    rows = max(1, BLOCK // max(len(codes), patients))
    blocks = []
    for start in range(0, resamples, rows):
        size = min(rows, resamples - start)
        drawn = rng.integers(patients, size=(size, patients)) + patients * np.arange(size)[:, None]
        times = np.bincount(drawn.ravel(), minlength=size * patients).reshape(size, patients)  # [size, patients]
        blocks.append(statistic(times.astype(np.float64)[:, codes]))  # [size, N]
    return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}


def interval(values: np.ndarray, patients: int) -> tuple[list[float] | None, str]:
    """Interval [low, high] of resampled values float [R], and "", or None and the reason there is none.

    Percentiles, moved outwards for few patients, for whom plain ones are too narrow by √((n - 1) / n) and Student's t
    ("expanded percentile", Hesterberg, The American Statistician 2015).
    """
    from scipy.stats import norm  # slow to import, and not needed to score a picture
    from scipy.stats import t as student_t

    defined = values[np.isfinite(values)]
    if len(defined) < ENOUGH * len(values):
        return None, f"undefined in {1 - len(defined) / len(values):.0%} of the resamples"
    if np.ptp(defined) < 1e-12:
        return None, "every resample gives the same value, which says nothing about its spread"
    tail = norm.cdf(student_t.ppf((1 - LEVEL) / 2, patients - 1) * np.sqrt(patients / (patients - 1)))
    return np.percentile(defined, [100 * tail, 100 * (1 - tail)]).tolist(), ""
