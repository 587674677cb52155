"""Random views of a training picture: one affine warp, one colour matrix, noise from a tile.

A few passes over uint8 in OpenCV, because the input pipeline must keep up with an accelerator; the threads share one
interpreter, so what has to be done in Python is done for a batch or kept short.
"""

import math
from functools import lru_cache

import cv2
import numpy as np

from Modules.config import Data

DRAWS = 9  # numbers that a view takes
GREY = np.array([0.299, 0.587, 0.114])  # luma of red, green, blue (ITU-R BT.601)


def draws(seed: int, epoch: int, stream: int, place: int, count: int) -> np.ndarray:
    """What `augment` draws for `count` views from `place` in the epoch on: float64 [count, DRAWS], 0 ≤ x < 1.

    A view depends on its place alone, not on where a batch begins. Views of another stream are others.
    """
    # As a key, because numbers in a row are as if zeros followed them: stream 0 would repeat what shuffles the epoch.
    bits = np.random.PCG64(np.random.SeedSequence((seed, epoch), spawn_key=(stream,)))
    bits.advance(place * DRAWS)  # a number takes one step of the generator
    return np.random.Generator(bits).random((count, DRAWS))


def augment(image: np.ndarray, config: Data, drawn: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """A random view of `image`, uint8 [S, S, 3] RGB in 0..255, by the amounts in `config`; the same shape and type.

    drawn: DRAWS uniform numbers, 0 ≤ x < 1, all that is random. out: where the view goes, contiguous; new memory unless
    given.
    """
    out = np.empty_like(image) if out is None else out
    turn, zoom, brightness, contrast, saturation, hue, across, down = (2 * drawn[:-1] - 1).tolist()
    flip = (1 if across < 0 else -1, 1 if down < 0 else -1) if config.flips else (1, 1)
    offset = int(drawn[-1] * image.size)

    if config.rotation or config.zoom:
        warp(image, 2 * math.pi * config.rotation * turn, 1 + config.zoom * zoom, flip, out)
    else:
        out[...] = image[:: flip[1], :: flip[0]]
    shift = 255 * config.brightness * brightness
    if config.contrast or config.saturation or config.hue:
        amounts = 1 + config.contrast * contrast, 1 + config.saturation * saturation, 2 * math.pi * config.hue * hue
        cv2.transform(out, colour_matrix(shift, *amounts, out.mean()), dst=out)
    elif config.brightness:
        # Never a negative number, for which OpenCV takes seven times as long.
        (cv2.add if shift > 0 else cv2.subtract)(out, round(abs(shift)), dst=out)
    if config.noise:
        brighter, darker = (tile[offset : offset + image.size] for tile in _noise_tiles(image.size, config.noise))
        cv2.add(out, brighter.reshape(image.shape), dst=out)
        cv2.subtract(out, darker.reshape(image.shape), dst=out)
    return out


def warp(image: np.ndarray, angle: float, scale: float, flip: tuple[int, int], out: np.ndarray) -> None:
    """Into `out`: `image` [S, S, 3] turned by `angle` (radians), scaled and flipped; the mirror comes in at borders."""
    size = image.shape[0]
    # OpenCV is twice as fast where no pixel lies outside, and it need not ask: the mirror is laid around the picture.
    border, outside = max(0, int(size / 2 * (math.sqrt(2) / scale - 1)) + 2), cv2.BORDER_CONSTANT
    if border >= size:
        border, outside = 0, cv2.BORDER_REFLECT_101
    # And it is faster with four channels than with three.
    image = cv2.copyMakeBorder(cv2.cvtColor(image, cv2.COLOR_RGB2RGBA), *[border] * 4, cv2.BORDER_REFLECT_101)
    matrix = affine(size, angle, scale, flip, border)
    turned = cv2.warpAffine(image, matrix, (size, size), flags=cv2.INTER_LINEAR, borderMode=outside)
    cv2.cvtColor(turned, cv2.COLOR_RGBA2RGB, dst=out)


def affine(size: int, angle: float, scale: float, flip: tuple[int, int], border: int = 0) -> np.ndarray:
    """The 2x3 matrix that turns by `angle` (radians), scales and flips (-1: mirrored) around the picture's centre.

    border: pixels that are laid around the picture before.
    """
    cosine, sine, centre = scale * math.cos(angle), scale * math.sin(angle), (size - 1) / 2
    rows = (cosine * flip[0], -sine * flip[1]), (sine * flip[0], cosine * flip[1])
    return np.array([(x, y, centre - (x + y) * (centre + border)) for x, y in rows])


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
def _noise_tiles(length: int, deviation: float) -> tuple[np.ndarray, np.ndarray]:
    """Gaussian noise, uint8, twice as long as a picture: what is added and what is taken. Drawing it anew costs more
    than all the rest; so would a signed type."""
    noise = np.rint(255 * deviation * np.random.default_rng(0).standard_normal(2 * length))
    return np.clip(noise, 0, 255).astype(np.uint8), np.clip(-noise, 0, 255).astype(np.uint8)
