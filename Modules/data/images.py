"""Pictures from files of any origin: decoded safely, or refused with one line that says why.

`decode` and `read_image` serve training, prediction and the web page; `scan` vets a whole data set before anything else
touches it. The format is judged by content, never by the file's name.
"""

import hashlib
import io
import os
import stat
import struct
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import cv2
import numpy as np
import pandas as pd
from PIL import Image, ImageOps
from tqdm import tqdm

from Modules.data.records import read_part

FORMATS = {  # as Pillow calls them
    "JPEG": (".jpg", ".jpeg"),
    "PNG": (".png",),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
    "GIF": (".gif",),
}
EXTENSIONS = tuple(dict.fromkeys(extension for extensions in FORMATS.values() for extension in extensions))
PIXEL_LIMIT = 100_000_000
BYTE_LIMIT = 512 * 2**20
TINY = 32  # pixels; a lesion on fewer shows nothing that a network could use
WITHOUT_LENGTH = {0x00, 0x01, *range(0xD0, 0xDA)}  # JPEG markers that no length follows
SCANNED = ["width", "height", "bytes", "sha256", "pixels", "plain", "notes", "reason"]
BLANK = 2.0  # grey levels; standard deviation of a picture under which there is nothing on it

cv2.setNumThreads(1)  # who reads many pictures has a thread a core: OpenCV's own would compete with those
Image.MAX_IMAGE_PIXELS = None  # `decode` checks PIXEL_LIMIT itself, from the header and with its own message
warnings.filterwarnings("ignore", module="PIL")  # about odd metadata, of no consequence for the pixels


class ImageError(Exception):
    """A picture can't be used; its one line says why."""


class Picture(NamedTuple):
    """What `_decode` knows about a picture beside its pixels."""

    pixels: np.ndarray  # uint8 [H, W, 3] RGB
    format: str
    notes: tuple[str, ...]  # what had to be converted: "CMYK", "16-bit", "alpha", "animated", "rotated"
    plain: bool  # a JPEG that every decoder shows alike


def decode(data: bytes) -> np.ndarray:
    """The picture in `data` as uint8 [H, W, 3] RGB, its EXIF rotation applied.

    Grey, palette, CMYK and 16-bit pictures are converted; transparency is laid on white; of an animation or a file of
    several pages the first frame is taken. Raises ImageError for what is truncated, no picture, of floating-point
    values, or over PIXEL_LIMIT (judged by the header, before any pixel is decoded).
    """
    return _decode(data).pixels


def read_image(path: str | os.PathLike, size: int | None = None) -> np.ndarray:
    """The picture at `path`, uint8 [H, W, 3] RGB; `size` squashes it to [size, size, 3]. ImageError names the path."""
    try:
        pixels = decode(read_bytes(path))
    except ImageError as error:
        raise ImageError(f"{os.fspath(path)}: {error}") from None
    return pixels if size is None else resize(pixels, size)


def resize(pixels: np.ndarray, size: int) -> np.ndarray:
    """[H, W, 3] squashed to [size, size, 3] as the published set is: averaged over areas when shrinking, else cubic."""
    if pixels.shape[:2] == (size, size):
        return pixels
    return cv2.resize(
        pixels, (size, size), interpolation=cv2.INTER_AREA if max(pixels.shape) > size else cv2.INTER_CUBIC
    )


def encode_jpeg(pixels: np.ndarray) -> bytes:
    """uint8 [H, W, 3] RGB as a JPEG of quality 95."""
    return cv2.imencode(".jpg", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes()


def scan(paths: Sequence[str | os.PathLike | None], progress: bool = True) -> pd.DataFrame:
    """Open each file once, on all cores, and tell what it holds; no bad file ends the scan.

    One row a path (None: no file), in order: `width`, `height` (pixels, as shown), `bytes`, `sha256` (of the file) and
    `pixels` (hash of what it shows; both empty where unread), `plain` (a JPEG with nothing to convert), `notes` (what
    `decode` converts: "CMYK, rotated"), `reason` (NA: usable; "absent", "unreadable: ...", "tiny: ...", "blank: ...").
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # reading, hashing and decoding all release the interpreter's lock
        rows = tqdm(
            pool.map(_scan_one, paths), "scan", len(paths), unit=" images", ncols=80, disable=None if progress else True
        )
        return pd.DataFrame(list(rows), columns=SCANNED)


def _scan_one(path: str | os.PathLike | None) -> tuple:
    if path is None:
        return 0, 0, 0, "", "", False, "", "absent"
    try:
        return examine(read_bytes(path), os.path.splitext(path)[1].lower())
    except ImageError as error:
        return 0, 0, 0, "", "", False, "", f"unreadable: {error}"


def examine(data: bytes, extension: str) -> tuple:
    """SCANNED of the file whose bytes are `data`; `extension` is that of its name."""
    try:
        picture, reason = _decode(data), None
    except ImageError as error:
        picture, reason = None, f"unreadable: {error}"
    digest = hashlib.sha256(data).hexdigest() if data else ""
    if picture is None:
        return 0, 0, len(data), digest, "", False, "", reason
    height, width = picture.pixels.shape[:2]
    if min(height, width) < TINY:
        reason = f"tiny: {width}x{height} pixels"
    elif (spread := float(cv2.meanStdDev(picture.pixels)[1].max())) < BLANK:
        reason = f"blank: its grey levels vary by {spread:.1f}"
    misnamed = () if extension in FORMATS[picture.format] else (f"{picture.format} named {extension}",)
    shown = hashlib.blake2b(picture.pixels, digest_size=16, key=f"{width}x{height}".encode()).hexdigest()
    return width, height, len(data), digest, shown, picture.plain, ", ".join(picture.notes + misnamed), reason


def read_bytes(path: str | os.PathLike) -> bytes:
    """What the file, or the part of a record file, holds. Raises ImageError, without naming it."""
    try:
        if (part := read_part(os.fspath(path))) is not None:
            return part
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode):  # a pipe or device would wait for ever
            raise ImageError("not a file")
        if found.st_size > BYTE_LIMIT:
            raise ImageError(f"{found.st_size:,} bytes (at most {BYTE_LIMIT:,})")
        with open(path, "rb", buffering=0) as stream:
            return stream.readall()
    except (FileNotFoundError, ValueError):  # ValueError: no file can have that name
        raise ImageError("there is no such file") from None
    except OSError as error:
        raise ImageError(error.strerror or str(error)) from None
    except EOFError as error:
        raise ImageError(str(error)) from None


def _decode(data: bytes) -> Picture:
    if not data:
        raise ImageError("empty file")
    if len(data) > BYTE_LIMIT:
        raise ImageError(f"{len(data):,} bytes (at most {BYTE_LIMIT:,})")
    if data[:2] == b"\xff\xd8" and (size := _plain_jpeg(data)) is not None:
        _check_pixels(*size)
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
        if pixels is None:
            raise ImageError("damaged JPEG")
        return Picture(pixels, "JPEG", (), True)
    return _decode_odd(data)


def _check_pixels(width: int, height: int) -> None:
    if width * height > PIXEL_LIMIT:
        raise ImageError(f"{width}x{height} pixels, over {PIXEL_LIMIT // 10**6} megapixels")


def _plain_jpeg(data: bytes) -> tuple[int, int] | None:
    """Width and height of an 8-bit grey or colour JPEG without EXIF, which OpenCV decodes fast and right; else None.

    OpenCV fills the missing part of a truncated JPEG with grey and says nothing. Within the coded pixels every 0xff is
    followed by 0 or a restart marker, so a file that was cut there has no end-of-image marker after its first scan.
    (Bytes changed within a complete file show as wrong colours; no decoder in reach tells them from a picture.)
    """
    position, size = 2, None
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker, length = data[position + 1], struct.unpack_from(">H", data, position + 2)[0]
        if marker == 0xFF:  # fill byte
            position += 1
            continue
        if marker in WITHOUT_LENGTH:  # readers differ in where the next segment begins, and so in the picture's size
            return None
        if marker == 0xE1 and data[position + 4 : position + 8] == b"Exif":
            return None
        if marker in (0xC0, 0xC1, 0xC2) and position + 10 <= len(data):
            bits, height, width, components = struct.unpack_from(">BHHB", data, position + 4)
            if bits != 8 or components not in (1, 3) or not height or not width:
                return None
            size = width, height
        elif marker == 0xDA:
            if data.rfind(b"\xff\xd9", position) < 0:
                raise ImageError("truncated JPEG")
            return size
        position += 2 + length
    return None


def _decode_odd(data: bytes) -> Picture:
    """Through Pillow: slower, but strict about truncation and aware of every colour model."""
    try:
        with Image.open(io.BytesIO(data), formats=list(FORMATS)) as image:
            _check_pixels(*image.size)
            notes = _notes(image)
            image.load()
            kind = "JPEG" if image.format == "MPO" else image.format  # MPO: a JPEG with more pictures behind the first
            return Picture(_to_rgb(image), kind, notes, False)
    except ImageError:
        raise
    except Image.UnidentifiedImageError:
        raise ImageError("not a picture of a known format (JPEG, PNG, BMP, TIFF, WebP, GIF)") from None
    except Exception as error:  # a damaged file can make Pillow raise nearly anything
        raise ImageError(f"damaged {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return f"({str(error).splitlines()[0]})" if str(error) else f"({type(error).__name__})"


def _notes(image: Image.Image) -> tuple[str, ...]:
    return tuple(
        note
        for note, holds in {
            "CMYK": image.mode == "CMYK",
            "16-bit": image.mode.startswith("I") or any(";16" in str(tile) for tile in image.tile),
            "alpha": image.has_transparency_data,
            "animated": getattr(image, "n_frames", 1) > 1 and image.format != "MPO",
            "rotated": image.getexif().get(0x0112, 1) in range(2, 9),
        }.items()
        if holds
    )


def _to_rgb(image: Image.Image) -> np.ndarray:
    """Any mode of Pillow's as uint8 [H, W, 3] RGB."""
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ImageError("floating-point values, whose range is unknown")
    if image.mode.startswith("I"):  # 16 bits; Pillow's own conversion would cut them off at 255
        values = np.asarray(image, np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ImageError("32-bit values, whose range is unknown")
        return np.repeat((values // 257).astype(np.uint8)[..., None], 3, axis=2)
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return np.ascontiguousarray(image.convert("RGB"))
