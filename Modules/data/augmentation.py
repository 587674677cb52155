"""Random views of a training picture: one affine warp, one colour matrix, noise from a tile.

Three passes over uint8 in OpenCV, because the input pipeline must keep up with an accelerator. Everything random comes
from the generator handed in, so that a view depends on its seed alone.
"""

from functools import lru_cache

import cv2
import numpy as np

from Modules.config import Data

GREY = np.array([0.299, 0.587, 0.114])  # luma of red, green, blue (ITU-R BT.601)


def augment(image: np.ndarray, config: Data, rng: np.random.Generator) -> np.ndarray:
    """A random view of `image`, uint8 [S, S, 3] RGB in 0..255, by the amounts in `config`; the same shape and type."""
    size = image.shape[0]
    turn, zoom, brightness, contrast, saturation, hue = rng.uniform(-1, 1, 6)
    flip = rng.choice([-1, 1], 2) if config.flips else (1, 1)
    offset = rng.integers(_noise_tile(size).size - image.size)

    geometry = affine(size, 2 * np.pi * config.rotation * turn, 1 + config.zoom * zoom, flip)
    view = cv2.warpAffine(image, geometry, (size, size), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)
    colours = colour_matrix(
        255 * config.brightness * brightness,
        1 + config.contrast * contrast,
        1 + config.saturation * saturation,
        2 * np.pi * config.hue * hue,
        view.mean(),
    )
    view = cv2.transform(view, colours)
    if config.noise:
        noise = _noise_tile(size)[offset : offset + image.size].reshape(image.shape)
        view = cv2.addWeighted(view, 1, noise, config.noise, 0, dtype=cv2.CV_8U)
    return view


def affine(size: int, angle: float, scale: float, flip: tuple[int, int]) -> np.ndarray:
    """The 2x3 matrix that turns by `angle` (radians), scales and flips (-1: mirrored) around the picture's centre."""
    cosine, sine = scale * np.cos(angle), scale * np.sin(angle)
    turn = np.array([[cosine, -sine], [sine, cosine]]) * flip
    centre = np.full(2, (size - 1) / 2)
    return np.column_stack([turn, centre - turn @ centre])


def colour_matrix(shift: float, contrast: float, saturation: float, hue: float, mean: float) -> np.ndarray:
    """The 3x4 matrix on (red, green, blue, 1) for all colour changes at once; contrast keeps `mean` where it is.

    Hue is a rotation about the grey axis, saturation a scaling away from it.
    """
    # Rodrigues' formula about (1, 1, 1) / sqrt(3).
    cross = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / np.sqrt(3)
    turned = np.cos(hue) * np.eye(3) + np.sin(hue) * cross + (1 - np.cos(hue)) / 3
    saturated = saturation * np.eye(3) + (1 - saturation) * GREY
    return np.column_stack([contrast * saturated @ turned, np.full(3, mean * (1 - contrast) + shift)])


@lru_cache(maxsize=2)
def _noise_tile(size: int) -> np.ndarray:
    """Gaussian noise of deviation 255, int16, twice as long as a picture: drawing it anew costs more than the rest."""
    return np.rint(255 * np.random.default_rng(0).standard_normal(2 * size * size * 3)).astype(np.int16)
