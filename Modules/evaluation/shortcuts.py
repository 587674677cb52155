"""Does the model read the lesion or the picture around it?

What a model says with the lesion covered, or of the rim of the picture alone, should be worth nothing (Bissoto et al.,
"(De)Constructing bias on skin lesion datasets", CVPR workshops 2019). Hair, rulers and skin tones are strata in which
it should rank equally well. All of it is found by classical image processing, at WORK x WORK pixels: good enough to
compare groups of pictures, not to trust on a single one.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pandas as pd
from tqdm import tqdm

from Modules.data.images import read_image, resize
from Modules.data.metadata import UNKNOWN
from Modules.evaluation.metrics import evaluate
from Modules.evaluation.scoring import units
from Modules.evaluation.subgroups import subgroups

WORK = 256  # pixels a side, as the published set has them
BATCH = 32
MOST = 500  # images of a class; more would only narrow intervals that are narrow enough
CENTRE = 0.7  # share of the picture that is covered to leave the rim alone, as in the paper's `bbox70`
MARGIN = 0.03  # picture widths around a lesion that are covered as well
SMALLEST, LARGEST = 0.005, 0.8  # share of the picture that a lesion may fill
HAIRY = 0.01  # share of the picture under hair from which on it counts as hairy
HAIR_WIDTH = 13  # pixels of WORK; what is darker than its surroundings and narrower may be a hair
CONTRAST = 12  # grey levels a hair or tick is darker than the skin beside it
# Individual typology angle in degrees, lower ends (Chardon et al., Int. J. Cosmetic Science 1991; Del Bino 2013).
TONES = {"very light": 55, "light": 41, "intermediate": 28, "tan": 10, "brown": -30, "dark": -91}


def lesion_mask(image: np.ndarray) -> tuple[np.ndarray, bool]:
    """Where the lesion lies in image uint8 [H, W, 3] RGB: bool [H, W], and whether one was found.

    Otsu's threshold on how much darker than the surrounding skin each pixel is in green and blue, without hair and
    inside the field of view; of the dark regions the one that is large and central, with its near parts and holes.
    Where none is plausible: an ellipse over the middle half of the picture.
    """
    height, width = image.shape[:2]
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    fallback = np.hypot(x, y) < 0.5
    field = field_of_view(image)
    if field.mean() < 0.2:
        return fallback, False
    light = cv2.GaussianBlur(without_hair(image)[..., 1:].mean(axis=2), (0, 0), 0.015 * width)
    darkness = np.clip(_skin_light(light, field, x, y) - light, 0, 255)
    levels = darkness[field].astype(np.uint8)
    threshold, _ = cv2.threshold(levels[None], 0, 255, cv2.THRESH_BINARY + cv2.THRESH_OTSU)
    if levels[levels > threshold].size == 0 or levels[levels > threshold].mean() < CONTRAST:
        return fallback, False
    dark = ((darkness > threshold) & field).astype(np.uint8)
    dark = cv2.morphologyEx(dark, cv2.MORPH_OPEN, _disc(0.02 * width))
    count, labels = cv2.connectedComponents(dark)
    if count < 2:
        return fallback, False
    # Central pixels count most: what is dark at the rim is a shadow, and nearly every picture has one lesion.
    scores = np.bincount(labels.ravel(), np.exp(-3 * (x**2 + y**2)).ravel(), count)
    scores[0] = 0
    best = int(scores.argmax())
    mask = labels == best
    near = cv2.dilate(mask.astype(np.uint8), _disc(0.05 * width)) > 0
    mask |= np.isin(labels, np.setdiff1d(labels[near], [0]))
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    filled = cv2.drawContours(np.zeros((height, width), np.uint8), contours, -1, 1, cv2.FILLED) > 0
    if not SMALLEST < filled.mean() < LARGEST:
        return fallback, False
    return filled, True


def _skin_light(light: np.ndarray, field: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The light that skin without lesion would show, float [H, W]: a quadratic surface through the brighter pixels,
    which follows the fall of light towards the rim; a plane where that would sink into a large lesion."""
    bowl = np.stack([np.ones_like(x), x, y, x * x, y * y, x * y], axis=-1)
    surface, coefficients = _brighter_surface(light, field, bowl)
    return surface if coefficients[3] + coefficients[4] <= 0 else _brighter_surface(light, field, bowl[..., :3])[0]


def _brighter_surface(light: np.ndarray, field: np.ndarray, terms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The combination of `terms` [H, W, T] that fits `light` where it is not darker than the fit, and its T factors."""
    coarse = (slice(None, None, 4),) * 2
    design, values, used = terms[coarse], light[coarse], field[coarse]
    for _ in range(6):
        factors = np.linalg.lstsq(design[used], values[used], rcond=None)[0]
        residual = values - design @ factors
        spread = max(np.median(np.abs(residual[used])), 1.0)
        kept = field[coarse] & (residual > -2 * spread)
        if kept.sum() < 0.1 * field[coarse].sum():
            break
        used = kept
    return terms @ factors, factors


def field_of_view(image: np.ndarray) -> np.ndarray:
    """bool [H, W]: not the black corners that a round dermatoscope leaves."""
    black = (image.max(axis=2) < 50).astype(np.uint8)
    _, labels = cv2.connectedComponents(black)
    corners = {labels[0, 0], labels[0, -1], labels[-1, 0], labels[-1, -1]} - {0}
    outside = np.isin(labels, list(corners)).astype(np.uint8)
    return cv2.dilate(outside, _disc(0.03 * image.shape[1])) == 0


def thin_dark(image: np.ndarray) -> np.ndarray:
    """bool [H, W]: what is dark and thin, as hairs and ticks are: DullRazor's closing (Lee et al., Computers in Biology
    and Medicine 1997)."""
    depth = _closed(image).mean(axis=2) - image.mean(axis=2)
    return depth > max(CONTRAST, 4 * np.median(depth))  # a rough skin has many shallow furrows


def without_hair(image: np.ndarray) -> np.ndarray:
    """`image` with what is dark and thin replaced by what is around it."""
    mask = cv2.dilate(thin_dark(image).astype(np.uint8), _disc(1)) > 0
    return np.where(mask[..., None], _closed(image), image)


def strokes(image: np.ndarray) -> pd.DataFrame:
    """The thin dark lines of an image, one row each: `x`, `y` (centre), `length`, `width` (in picture widths), `angle`
    (radians, 0 to pi)."""
    size = image.shape[1]
    count, labels, stats, centres = cv2.connectedComponentsWithStats(thin_dark(image).astype(np.uint8))
    rows = []
    for i in range(1, count):
        left, top, w, h, area = stats[i]
        if max(w, h) < 0.02 * size:
            continue
        y, x = np.nonzero(labels[top : top + h, left : left + w] == i)
        values, axes = np.linalg.eigh(np.cov(x, y) + np.eye(2) / 12)
        length = np.sqrt(12 * values[1])  # of a bar with this variance
        rows.append((*(centres[i] / size), length / size, area / length / size, np.arctan2(axes[1, 1], axes[0, 1])))
    table = pd.DataFrame(rows, columns=["x", "y", "length", "width", "angle"], dtype=float)
    return table.assign(angle=table["angle"] % np.pi)


def hair_share(lines: pd.DataFrame, lesion: np.ndarray) -> float:
    """The share of the picture under `strokes` that are long and thin and have their middle off the lesion."""
    hairs = lines[(lines["length"] > 0.1) & (lines["width"] < 0.04)]
    row, column = ((hairs[axis] * len(lesion)).astype(int).clip(0, len(lesion) - 1) for axis in ("y", "x"))
    hairs = hairs[~lesion[row, column]]
    return float((hairs["length"] * hairs["width"]).sum())


def has_ruler(lines: pd.DataFrame) -> bool:
    """Whether among `strokes` there are four short parallel ticks, evenly spaced in a row across their direction."""
    ticks = lines[lines["length"].between(0.02, 0.12) & (lines["length"] > 2 * lines["width"])]
    place, angle = ticks[["x", "y"]].to_numpy(), ticks["angle"].to_numpy()
    for i in range(len(ticks)):
        direction = np.array([np.cos(angle[i]), np.sin(angle[i])])
        shift = place - place[i]
        turned = np.abs((angle - angle[i] + np.pi / 2) % np.pi - np.pi / 2)
        row = (turned < 0.15) & (np.abs(shift @ direction) < 0.025)
        gaps = np.diff(np.sort((shift @ [-direction[1], direction[0]])[row]))
        if len(gaps) >= 3:
            even = np.abs(gaps - np.median(gaps)) < 0.15 * np.median(gaps)
            if even.sum() >= max(3, 0.7 * len(gaps)):
                return True
    return False


def typology_angle(image: np.ndarray, skin: np.ndarray) -> float:
    """Individual typology angle in degrees, arctan((L - 50) / b), of the median colour of `skin` bool [H, W]; dark is
    low. Photographs are not calibrated: light and camera shift it."""
    lab = cv2.cvtColor(np.float32(image[None, skin] / 255), cv2.COLOR_RGB2LAB)[0]
    lightness, _, b = np.median(lab, axis=0)
    return float(np.degrees(np.arctan2(lightness - 50, max(b, 1e-6))))


def covered(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """`image` with `mask` filled by the colours around it, ever smoother towards its middle: no outline is left."""
    filled, known = image.astype(np.float32), (~mask).astype(np.float32)
    filled *= known[..., None]
    result, weight = filled.copy(), known.copy()
    for sigma in (4, 8, 16, 32, 64):
        blur, share = (cv2.GaussianBlur(part, (0, 0), sigma / WORK * image.shape[1]) for part in (filled, known))
        missing = (weight == 0) & (share > 0.05)
        result[missing] = blur[missing] / share[missing, None]
        weight[missing] = 1
    result[weight == 0] = np.median(image[~mask], axis=0) if (~mask).any() else image.mean(axis=(0, 1))
    soft = cv2.GaussianBlur(result, (0, 0), 3 / WORK * image.shape[1])
    return np.where(mask[..., None], soft, image).round().clip(0, 255).astype(np.uint8)


def rim_alone(image: np.ndarray) -> np.ndarray:
    """`image` with the central CENTRE of its area black."""
    height, width = image.shape[:2]
    cut = (1 - np.sqrt(CENTRE)) / 2
    result = image.copy()
    result[round(cut * height) : round((1 - cut) * height), round(cut * width) : round((1 - cut) * width)] = 0
    return result


def shortcuts(
    table: pd.DataFrame, probability: np.ndarray, score: Callable[[np.ndarray], np.ndarray], size: int, threshold: float
) -> dict:
    """What the model makes of everything but the lesion, on up to MOST images of each class.

    table: rows with `file`, `target`, `patient_id`, `group`. probability: float [N], what the model says of them.
    score: images float32 [B, size, size, 3] in 0..255 -> probabilities [B]. Returns `n`, `lesion_found` (images),
    `views`, the ROC AUC with its interval of the `whole` picture, of `lesion_covered` and `rim_alone`; and `strata`,
    rows as `subgroups.subgroups` gives them, by hair, ruler and skin tone.
    """
    rows = _sample(table["target"].to_numpy())
    table, probability = table.iloc[rows].reset_index(drop=True), probability[rows]
    scores: dict[str, list] = {"lesion_covered": [], "rim_alone": []}
    seen = []
    with (
        ThreadPoolExecutor(os.cpu_count()) as pool,
        tqdm(total=len(table), desc="shortcuts", unit="image", leave=False, ncols=80, disable=None) as bar,
    ):
        for start in range(0, len(table), BATCH):
            looked = list(pool.map(look, table["file"].iloc[start : start + BATCH]))
            for name, views in scores.items():
                batch = np.stack([resize(each[name], size) for each in looked]).astype(np.float32)
                views.append(score(batch))
            seen += [{key: each[key] for key in ("lesion_found", "hair", "ruler", "skin tone")} for each in looked]
            bar.update(len(looked))
    seen = pd.DataFrame(seen)
    views = {"whole": probability} | {name: np.concatenate(parts) for name, parts in scores.items()}
    target, patients = table["target"].to_numpy(), units(table)
    result = {"n": len(table), "n_malignant": int(target.sum()), "lesion_found": int(seen["lesion_found"].sum())}
    result["views"] = {}
    for name, values in views.items():
        measured = evaluate(target, values, threshold, patients)
        reasons = {key: reason for key, reason in measured["undefined"].items() if key.startswith("roc_auc")}
        result["views"][name] = {key: measured[key] for key in ("roc_auc", "roc_auc_ci95")} | {"undefined": reasons}
    strata = {name: seen[name] for name in ("hair", "ruler", "skin tone")}
    return result | {"strata": subgroups(table, probability, threshold, strata)}


def look(file: str) -> dict:
    """All that is seen in the picture `file`, and its two views without a lesion, uint8 [WORK, WORK, 3]."""
    image = read_image(file, WORK)
    lesion, found = lesion_mask(image)
    lines = strokes(image)
    around = cv2.dilate(lesion.astype(np.uint8), _disc(MARGIN * WORK)) > 0
    skin = field_of_view(image) & ~around & ~thin_dark(image)
    angle = typology_angle(image, skin) if skin.mean() > 0.02 else np.nan
    return {
        "lesion_covered": covered(image, around),
        "rim_alone": rim_alone(image),
        "lesion_found": found,
        "hair": "hair" if hair_share(lines, lesion) > HAIRY else "little or none",
        "ruler": "ruler" if has_ruler(lines) else "none found",
        "skin tone": next((tone for tone, lowest in TONES.items() if angle > lowest), UNKNOWN),
    }


def _sample(target: np.ndarray) -> np.ndarray:
    """Places of at most MOST images of each class, in order; always the same."""
    rng = np.random.default_rng(0)
    places = [np.flatnonzero(target == label) for label in (0, 1)]
    return np.sort(np.concatenate([rng.permutation(each)[:MOST] for each in places]))


def _disc(radius: float) -> np.ndarray:
    size = 2 * max(1, round(radius)) + 1
    return cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (size, size))


def _closed(image: np.ndarray) -> np.ndarray:
    return cv2.morphologyEx(image, cv2.MORPH_CLOSE, _disc(HAIR_WIDTH / WORK * image.shape[1] / 2))
