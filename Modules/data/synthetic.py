"""A synthetic stand-in for the ISIC 2020 training set: what the project runs on when no real images are there.

No real data: no picture shows a person, and no number measured on it is ever a result. It exists so that every stage
runs from a fresh clone. Files, columns and vocabulary are those of the Kaggle set, so that both are read alike.

    write_dataset(Path("datasets/demo"))                          # 600 images, patients, duplicates, metadata
    image, mask = draw(np.random.default_rng(0), malignant=True)  # one picture and where its lesion lies

Melanin and blood absorb light, so a pixel is `exp(-density)` and the densities of pigments add up (Tsumura et al.,
"Independent-component analysis of skin color image", JOSA A 1999). Each lesion has a hidden atypia from 0 to 1, whose
distributions overlap between the classes; the traits of the ABCD rule (asymmetry, border, colours, diameter; Nachbar et
al., JAAD 1994) follow it, each with noise of its own. Skin, hair, ruler, bubbles and camera know nothing of the class.
"""

import tempfile
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
from tqdm import tqdm

from Modules.cli import UserError

# Density in red, green and blue of melanin, of blood, and of melanin so deep that the skin above scatters blue back.
PIGMENTS = np.float32([[0.42, 0.70, 1.10], [0.18, 0.90, 0.75], [1.20, 0.90, 0.55]])
VEIL = np.float32([0.72, 0.70, 0.78])
MALIGNANT_SHARE = 0.3
SITES = ["torso", "lower extremity", "upper extremity", "head/neck", "palms/soles", "oral/genital", None]
SITE_SHARES = [0.5, 0.25, 0.15, 0.06, 0.015, 0.005, 0.02]


def draw(
    rng: np.random.Generator, malignant: bool, size: int = 256, skin: tuple[float, float] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """One dermoscopy-like picture and the mask of its lesion.

    `skin` is the patient's, as `skin_tone` draws it, so that a patient's pictures can share it; by default a new one.
    Returns the image, uint8 RGB `[size, size, 3]`, and the mask, bool `[size, size]`, True on the lesion.
    """
    atypia = rng.beta(5, 2) if malignant else rng.beta(2, 5)
    asymmetry, border, colours, diameter = np.clip(atypia + rng.normal(0, 0.2, 4), 0, 1)
    distance = outline(rng, size, asymmetry, border, diameter)
    melanin, blood, deep, veil = pigment(rng, distance, asymmetry, colours)
    skin_melanin, skin_blood = skin_texture(rng, size, skin or skin_tone(rng))
    image = np.exp(-np.stack([melanin + skin_melanin, blood + skin_blood, deep], axis=-1) @ PIGMENTS)
    image += veil[..., None] * (VEIL - image)
    image = vignette(rng, bubbles(rng, ruler(rng, hair(rng, image))))
    camera = np.exp(rng.normal(0, [0.05, 0.04, 0.09]) + rng.normal(0, 0.07))  # white balance and exposure
    image = image * camera + rng.normal(0, 0.012, image.shape)
    return (255 * np.clip(image, 0, 1)).astype(np.uint8), distance < 1


def skin_tone(rng: np.random.Generator) -> tuple[float, float]:
    """A patient's skin as densities of (melanin, blood): mostly fair, as in the ISIC archive, some tanned or brown."""
    return 0.1 + rng.gamma(1.2, 0.13), 0.1 + rng.gamma(2.5, 0.06)


def noise(rng: np.random.Generator, size: int, cells: int, octaves: int = 1) -> np.ndarray:
    """Smooth random field, float32 `[size, size]`, deviation about 1, `cells` bumps wide; octaves roughen it."""
    field = np.zeros((size, size), np.float32)
    for octave in range(octaves):
        grid = rng.standard_normal((cells * 2**octave + 1,) * 2, dtype=np.float32)
        field += cv2.resize(grid, (size, size), interpolation=cv2.INTER_CUBIC) * (1.35 / 1.7**octave)
    return field


def step(field: np.ndarray, width: float) -> np.ndarray:
    """Soft threshold at zero: from 0 well below to 1 well above, blurred over `width`."""
    return 1 / (1 + np.exp(-np.clip(field / width, -30, 30)))


def plane(size: int) -> np.ndarray:
    """The y and x of each pixel, float32 `[2, size, size]`, from -1 to 1."""
    return np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j].astype(np.float32)


def skin_texture(rng: np.random.Generator, size: int, skin: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
    """Melanin and blood of the skin: blotches, mottled redness, fine furrows between pores, freckles on some."""
    furrows = np.abs(noise(rng, size, 34)) * rng.uniform(0, 0.05)
    freckles = step(noise(rng, size, 14, 3) - rng.uniform(2.3, 4.5), 0.35) * rng.uniform(0.1, 0.5)
    melanin = skin[0] * np.exp(0.1 * noise(rng, size, 3, 4)) + 0.02 * noise(rng, size, 60) + furrows + freckles
    blood = skin[1] * np.exp(rng.uniform(0.05, 0.22) * noise(rng, size, 8, 4)) + 0.015 * noise(rng, size, 50)
    return melanin, blood


def outline(rng: np.random.Generator, size: int, asymmetry: float, border: float, diameter: float) -> np.ndarray:
    """Distance from the lesion's centre in radii, float32 `[size, size]`: below 1 inside.

    A wavy ellipse joined to a side lobe that moves out with the asymmetry, its edge ragged and notched with the border.
    """
    radius = np.clip(np.exp(rng.normal(-1.65 + 1.15 * diameter, 0.22)), 0.12, 0.5)
    ragged = 0.015 + 0.11 * border
    y, x = ((axis + rng.normal(0, 0.08)) / radius + ragged * noise(rng, size, 6, 4) for axis in plane(size))
    lobes = []
    for shift, scale in ((0, 1), (rng.uniform(0.4, 0.5 + 0.5 * asymmetry), rng.uniform(0.4, 0.8))):
        turn, stretch = rng.uniform(0, 2 * np.pi), rng.uniform(1, 1.5)
        u = np.cos(turn) * x + np.sin(turn) * y - shift
        v = (np.cos(turn) * y - np.sin(turn) * x) * stretch
        edge = np.float32(scale)
        for k in range(2, 8):
            wave = np.cos(k * np.arctan2(v, u) + rng.uniform(0, 2 * np.pi))
            edge = edge + scale * rng.normal(0, (0.04 + 0.16 * border) / k) * wave
        lobes.append(np.hypot(u, v) / np.maximum(edge, 0.2))
    frame = 20 * np.maximum(np.abs(plane(size)).max(axis=0) - 0.85, 0)  # the whole lesion lies in the picture
    return np.minimum(*lobes) + frame


def pigment(rng: np.random.Generator, distance: np.ndarray, asymmetry: float, colours: float) -> tuple[np.ndarray, ...]:
    """Melanin, blood, deep melanin and white veil of the lesion, each float `[size, size]`: its structure and colours.

    A shade from tan to nearly black with a pigment network or globules, darker to one side with the asymmetry; then
    patches of dark brown, red, blue-grey and white, each likelier with the colours and none of them proof.
    """
    size = len(distance)
    inside = step(1 - distance, rng.uniform(0.04, 0.2))

    def patch(likelihood: float, low: float, high: float) -> np.ndarray:
        shape = step(noise(rng, size, 3, 4) - rng.uniform(0.3, 1.2), rng.uniform(0.2, 0.5))
        return inside * shape * rng.uniform(low, high) * (rng.random() < likelihood)

    if rng.random() < 0.6:
        structure = np.exp(-4 * noise(rng, size, rng.integers(18, 30)) ** 2)  # network: where noise crosses zero
    else:
        structure = step(noise(rng, size, rng.integers(14, 26)) - 0.6, 0.25)  # globules: where it peaks
    shade = np.exp(rng.normal(-0.35 + 0.6 * colours, 0.35))
    side = (0.1 + 0.5 * asymmetry) * noise(rng, size, 2)
    core = rng.uniform(-0.3, 0.5) * (1 - np.minimum(distance, 1.5))
    shades = np.clip(np.exp(0.2 * noise(rng, size, 5, 4) + side + core), 0.25, 3)
    melanin = inside * shade * shades * (1 + rng.uniform(0, 0.7) * structure) + patch(0.1 + 0.6 * colours, 0.5, 1.3)
    blood = inside * rng.gamma(1.0, 0.25) + patch(0.1 + 0.5 * colours, 0.2, 0.8)
    return melanin, blood, patch(0.05 + 0.5 * colours, 0.3, 0.9), patch(0.05 + 0.4 * colours, 0.15, 0.5)


def ink(image: np.ndarray, strokes: list[tuple[np.ndarray, float]], colour: float | np.ndarray) -> np.ndarray:
    """Paint strokes (points in 0..1, thickness; both in picture widths) with soft edges, also thinner than a pixel."""
    size = len(image)
    canvas = np.zeros((4 * size, 4 * size), np.uint8)
    for points, thickness in strokes:
        points = np.round(points * 4 * size).astype(np.int32)
        cv2.polylines(canvas, [points], False, 255, max(1, round(thickness * 4 * size)), cv2.LINE_AA)
    cover = cv2.resize(canvas, (size, size), interpolation=cv2.INTER_AREA)[..., None] / np.float32(255)
    return image + cover * (colour - image)


def hair(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Dark or fair hairs, curved, of varying thickness, most of them running one way; none on half of the pictures."""
    count = rng.choice([0, 0, 0, rng.integers(1, 5), rng.integers(3, 12), rng.integers(10, 40)])
    direction, colour = rng.uniform(0, 2 * np.pi), rng.uniform(0.05, 0.5) * np.array([1.3, 1.0, 0.75])
    strokes = []
    for _ in range(count):
        angle = direction + rng.normal(0, 0.4) + rng.normal(0, 0.8) * np.linspace(-0.5, 0.5, 24)
        points = np.cumsum(np.stack([np.cos(angle), np.sin(angle)], axis=1), axis=0) * rng.uniform(0.2, 1) / 24
        strokes.append((points - points.mean(axis=0) + rng.uniform(0, 1, 2), rng.uniform(0.001, 0.006)))
    return ink(image, strokes, colour)


def ruler(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """The millimetre scale that some dermatoscopes show near the edge, on a quarter of the pictures."""
    turn, gap = rng.normal(0, 0.08) + np.pi / 2 * rng.integers(4), rng.uniform(0.04, 0.09)
    along, across = np.array([np.cos(turn), np.sin(turn)]), np.array([-np.sin(turn), np.cos(turn)])
    feet = (
        0.5
        + across * rng.uniform(0.36, 0.46)
        + along * gap * np.arange(-rng.integers(2, 8), rng.integers(2, 8))[:, None]
    )
    lengths = [0.06 if tick % 5 == 0 else 0.035 for tick in range(len(feet))]
    strokes = [(np.stack([foot, foot - across * length]), 0.006) for foot, length in zip(feet, lengths, strict=True)]
    return ink(image, strokes, rng.uniform(0.05, 0.35)) if rng.random() < 0.25 else image


def bubbles(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Air caught in the gel under the glass, on a tenth of the pictures: faint bright rings."""
    turn = np.linspace(0, 2 * np.pi, 40)
    ring = np.stack([np.cos(turn), np.sin(turn)], axis=1)
    strokes = [(rng.uniform(0, 1, 2) + rng.uniform(0.015, 0.06) * ring, 0.006) for _ in range(rng.integers(1, 5))]
    return ink(image, strokes, 0.3 + 0.7 * image) if rng.random() < 0.1 else image


def vignette(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Light that falls off towards the edge; on some pictures the round, dark rim of the dermatoscope as well."""
    distance = np.hypot(*(axis + rng.normal(0, 0.06) for axis in plane(len(image))))
    image = image * (1 - rng.uniform(0, 0.2) * distance**2)[..., None]
    rim = step(distance - rng.uniform(0.98, 1.2), 0.008)[..., None] * (rng.random() < 0.15)
    return image + rim * (rng.uniform(0.02, 0.1) - image)


def patients(rng: np.random.Generator, images: int) -> tuple[pd.DataFrame, list[tuple[float, float]], np.ndarray]:
    """The metadata, one row a file; each row's skin tone; and the row it is drawn from, which for a copy is another.

    Every patient has 1 to 9 images and a risk. The malignant lesions are those with the highest sum of risk and chance,
    so that some patients have several and some both classes. A copy has another id but the same patient and lesion.
    """

    def ids(prefix: str) -> np.ndarray:
        return np.array([f"{prefix}_{number:07d}" for number in rng.choice(10**7, images, replace=False)])

    patient = np.repeat(np.arange(images), rng.integers(1, 10, images))[:images]
    risk = rng.standard_normal(images)
    rank = np.argsort(np.argsort(risk[patient] + 1.2 * rng.standard_normal(images)))
    target = (rank >= round(images * (1 - MALIGNANT_SHARE))).astype(int)
    benign = rng.choice(["unknown", "nevus", "seborrheic keratosis"], images, p=[0.8, 0.18, 0.02])
    age = 5 * np.round((50 + 5 * risk + 13 * rng.standard_normal(images)).clip(15, 85) / 5)
    sex = rng.choice(np.array(["male", "female"], object), images)
    unknown = rng.random(images) < 0.02
    age[unknown], sex[unknown] = np.nan, None
    tones = [skin_tone(rng) for _ in range(images)]
    table = pd.DataFrame(
        {
            "patient_id": ids("IP")[patient],
            "lesion_id": ids("IL"),
            "sex": sex[patient],
            "age_approx": age[patient],
            "anatom_site_general_challenge": rng.choice(np.array(SITES, object), images, p=SITE_SHARES),
            "diagnosis": np.where(target == 1, "melanoma", benign),
            "benign_malignant": np.where(target == 1, "malignant", "benign"),
            "target": target,
        }
    )
    source = np.arange(images)
    second = source[1::2][patient[1::2] == patient[: images - 1 : 2]]
    source[rng.permutation(second)[: images // 25]] -= 1
    table = table.iloc[source].reset_index(drop=True)
    table.insert(0, "isic_id", ids("ISIC"))
    return table, [tones[index] for index in patient], source


def write_dataset(folder: Path, images: int = 600, size: int = 128, seed: int = 0) -> Path:
    """Write a data set in the Kaggle layout and return its folder.

        folder/train-image/image/ISIC_0000000.jpg    `images` JPEG files of `size` pixels square, 30 % malignant
        folder/train-metadata.csv                    the ISIC columns, one row a file, in the order of the ids
        folder/ISIC_2020_Training_Duplicates.csv     half of the duplicates; the others only share their bytes

    The same seed, `images` and `size` give the same bytes. The folder appears only when complete. One that already
    holds a `train-metadata.csv` is returned untouched, whatever it was made with: to have another, remove it first.
    Raises `UserError` for a folder that holds anything else.
    """
    folder = Path(folder)
    if (folder / "train-metadata.csv").exists():
        return folder
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} holds something other than a data set: remove it or name another folder")
    table, skins, source = patients(np.random.default_rng(seed), images)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        part = Path(temporary) / folder.name
        (part / "train-image" / "image").mkdir(parents=True)
        rows = zip(table.isic_id, table.target, skins, source, strict=True)
        for isic_id, target, skin, index in tqdm(rows, "synthetic images", images, unit="image", ncols=80):
            rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(index,)))
            image, _ = draw(rng, bool(target), size, skin)
            _, jpeg = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 92])
            (part / "train-image" / "image" / f"{isic_id}.jpg").write_bytes(jpeg.tobytes())
        table.sort_values("isic_id").to_csv(part / "train-metadata.csv", index=False)
        copies = np.flatnonzero(source != np.arange(images))[::2]
        pairs = np.sort(np.stack([table.isic_id[copies], table.isic_id[source[copies]]], axis=1), axis=1)
        listed = pd.DataFrame(pairs, columns=["image_name_1", "image_name_2"]).sort_values("image_name_1")
        listed.to_csv(part / "ISIC_2020_Training_Duplicates.csv", index=False)
        part.rename(folder)
    return folder
