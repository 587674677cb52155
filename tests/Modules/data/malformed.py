"""Files that no well-behaved camera wrote: broken ones with a word of the reason, and odd but readable ones."""

import io
import os
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = 64


def picture(seed: int = 0, size: int = SIZE) -> np.ndarray:
    """A smooth, colourful picture with a mark in its upper left quarter, uint8 [size, size, 3]."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(40, 216, (6, 6, 3), np.uint8))
    pixels = np.array(coarse.resize((size, size), Image.Resampling.BICUBIC))
    pixels[4 : size // 4, 4 : size // 3] = (250, 20, 20)
    return pixels


def encoded(image: np.ndarray | Image.Image, kind: str = "JPEG", **options) -> bytes:
    buffer = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(buffer, kind, **({"quality": 95} if kind == "JPEG" else {}), **options)
    return buffer.getvalue()


def patched_size(jpeg: bytes, width: int, height: int, bits: int = 8) -> bytes:
    """`jpeg` with another size in its frame header than it has."""
    place = max(jpeg.find(b"\xff\xc0"), jpeg.find(b"\xff\xc2"))
    return jpeg[: place + 4] + struct.pack(">BHH", bits, height, width) + jpeg[place + 9 :]


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, body: bytes, bits: int = 8, colour: int = 2) -> bytes:
    """A PNG with any header, also one that its `body` doesn't fill."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    chunks = (png_chunk(b"IHDR", header), png_chunk(b"IDAT", zlib.compress(body)), png_chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def rotated(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(picture(), exif=exif)


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("word/document.xml", "<xml/>")
    return buffer.getvalue()


def broken() -> dict[str, tuple[bytes, str]]:
    """By name: the bytes, and a word that the reason must hold."""
    rng = np.random.default_rng(1)
    jpeg, progressive = encoded(picture()), encoded(picture(), progressive=True)
    exif = rotated(6)
    image = Image.fromarray(picture())
    kinds = {kind: encoded(image, kind) for kind in ("PNG", "BMP", "TIFF", "WEBP", "GIF")}
    bad_idat = bytearray(kinds["PNG"])
    bad_idat[len(bad_idat) // 2] ^= 0xFF
    noise = rng.integers(0, 256, 4000, np.uint8).tobytes()
    scan = jpeg.find(b"\xff\xda")
    no_picture, cut, damaged = "not a picture", "truncated", "damaged"
    return {
        "zero-byte": (b"", "empty"),
        "one-byte": (b"\xff", no_picture),
        "start-marker-only": (b"\xff\xd8", ""),
        "start-and-end-marker": (b"\xff\xd8\xff\xd9", ""),
        "jpeg-header-only": (jpeg[:scan], ""),
        "jpeg-no-pixels": (jpeg[: scan + 14], cut),
        **{f"jpeg-cut-at-{share}": (jpeg[: len(jpeg) * share // 100], cut) for share in (50, 75, 90, 99)},
        "jpeg-no-end-marker": (jpeg[:-2], cut),
        "progressive-cut": (progressive[: len(progressive) * 3 // 4], cut),
        "progressive-cut-early": (progressive[: len(progressive) // 3], cut),
        "exif-jpeg-cut": (exif[: len(exif) * 2 // 3], cut),
        "jpeg-no-width": (patched_size(jpeg, 0, SIZE), ""),
        "jpeg-twelve-bit": (patched_size(jpeg, SIZE, SIZE, bits=12), ""),
        "jpeg-over-limit": (patched_size(jpeg, 65500, 65500), "megapixels"),
        "jpeg-tables-lost": (jpeg[:20] + jpeg[scan:], ""),
        "jpeg-then-noise": (jpeg[:20] + noise, ""),
        "text": (b"the lesion is on the left arm\n", no_picture),
        "html": (b"<!DOCTYPE html><title>404 Not Found</title>", no_picture),
        "svg": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', no_picture),
        "pdf": (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n1 0 obj\n", no_picture),
        "zip": (zipped(), no_picture),
        "movie": (b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom", no_picture),
        "dicom": (b"\0" * 128 + b"DICM" + noise, no_picture),
        "noise": (noise, no_picture),
        "zeros": (bytes(4000), no_picture),
        "lfs-pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n", no_picture),
        "png-cut": (kinds["PNG"][: len(kinds["PNG"]) // 2], ""),
        "png-bad-checksum": (bytes(bad_idat), damaged),
        "png-signature-only": (kinds["PNG"][:8], no_picture),
        "png-over-limit": (png(20000, 20000, b""), "megapixels"),
        "png-too-little-data": (png(SIZE, SIZE, b"\0" * 100), ""),
        "bmp-cut": (kinds["BMP"][:2000], cut),
        "bmp-over-limit": (kinds["BMP"][:18] + struct.pack("<ii", 30000, 30000) + kinds["BMP"][26:], "megapixels"),
        "tiff-cut": (kinds["TIFF"][:1000], ""),
        "tiff-bad-offset": (b"II*\0" + struct.pack("<I", 10**9), ""),
        "webp-cut": (kinds["WEBP"][: len(kinds["WEBP"]) // 2], ""),
        "gif-cut": (kinds["GIF"][: len(kinds["GIF"]) // 2], ""),
        "gif-header-only": (kinds["GIF"][:13], ""),
        "float-tiff": (encoded(Image.fromarray(picture()[..., 0].astype(np.float32)), "TIFF"), "floating-point"),
        "32-bit-tiff": (encoded(Image.fromarray(picture()[..., 0].astype(np.int32) * 10**5), "TIFF"), "32-bit"),
        "one-pixel": (encoded(picture()[:1, :1], "PNG"), "tiny"),
        "eight-pixels": (encoded(picture(size=8)), "tiny"),
        "strip": (encoded(picture()[:4]), "tiny"),
        "black": (encoded(np.zeros((SIZE, SIZE, 3), np.uint8)), "blank"),
        "white": (encoded(np.full((SIZE, SIZE, 3), 255, np.uint8), "PNG"), "blank"),
        "nearly-grey": (encoded(rng.integers(127, 130, (SIZE, SIZE, 3), np.uint8), "PNG"), "blank"),
        "transparent": (encoded(Image.new("RGBA", (SIZE, SIZE), (9, 9, 9, 0)), "PNG"), "blank"),
    }


def write_special(folder: Path) -> dict[str, str]:
    """What is in a folder under a picture's name and no regular file; by name the word that the reason must hold."""
    (folder / "a-folder.jpg").mkdir()
    (folder / "dead-link.jpg").symlink_to(folder / "nowhere.jpg")
    os.mkfifo(folder / "pipe.jpg")
    return {"a-folder": "not a file", "dead-link": "no such file", "pipe": "not a file"}


def odd() -> dict[str, tuple[bytes, str]]:
    """Readable all the same, by name: the bytes, and the note of what had to be converted."""
    image = Image.fromarray(picture())
    grey, frames = image.convert("L"), [Image.fromarray(picture(seed)) for seed in (0, 1, 2)]
    alpha = image.convert("RGBA")
    alpha.putalpha(Image.fromarray(np.tile(np.linspace(128, 255, SIZE, dtype=np.uint8), (SIZE, 1))))
    deep = (np.asarray(grey).astype(np.uint16) * 257).astype(np.uint16)
    deep_rows = b"".join(b"\0" + (row.astype(">u2") * 257).tobytes() for row in picture().astype(np.uint16))
    jpeg = encoded(image)
    more = {"save_all": True, "append_images": frames[1:]}
    return {
        "cmyk": (encoded(image.convert("CMYK")), "CMYK"),
        "grey": (encoded(grey), ""),
        "progressive": (encoded(image, progressive=True), ""),
        "trailing-bytes": (jpeg + b"\0" * 100 + b"appended by a camera", ""),
        "long-comment": (jpeg[:2] + b"\xff\xfe" + struct.pack(">H", 60002) + b"\xff" * 60000 + jpeg[2:], ""),
        "fill-bytes": (jpeg[:2] + b"\xff\xff\xff" + jpeg[2:], ""),
        "png-named-jpg": (encoded(image, "PNG"), "PNG named .jpg"),
        "bmp-named-jpg": (encoded(image, "BMP"), "BMP named .jpg"),
        "webp-named-jpg": (encoded(image, "WEBP", lossless=True), "WEBP named .jpg"),
        "16-bit-grey": (encoded(Image.fromarray(deep), "PNG"), "16-bit"),
        "16-bit-colour": (png(SIZE, SIZE, deep_rows, bits=16), "16-bit"),
        "16-bit-grey-tiff": (encoded(Image.fromarray(deep), "TIFF"), "16-bit"),
        "palette": (encoded(image.convert("P"), "PNG"), "PNG"),
        "palette-transparent": (encoded(image.convert("P"), "PNG", transparency=0), "alpha"),
        "alpha": (encoded(alpha, "PNG"), "alpha"),
        "grey-alpha": (encoded(alpha.convert("LA"), "PNG"), "alpha"),
        "one-bit": (encoded(image.convert("1"), "PNG"), "PNG"),
        "animated-gif": (encoded(frames[0], "GIF", **more), "animated"),
        "animated-webp": (encoded(frames[0], "WEBP", **more), "animated"),
        "animated-png": (encoded(frames[0], "PNG", **more), "animated"),
        "pages": (encoded(frames[0], "TIFF", **more), "animated"),
        "mpo": (encoded(frames[0], "MPO", **more), ""),
        **{f"rotated-{orientation}": (rotated(orientation), "rotated") for orientation in range(2, 9)},
    }


PLAIN_TABLE = "isic_id,patient_id,target\n" + "".join(f"A{row},P{row // 2},{row % 2}\n" for row in range(24))


def broken_tables() -> dict[str, tuple[bytes, str]]:
    """By name: a metadata file, and what the message must hold."""

    def changed(old: str, new: str) -> str:
        assert old in PLAIN_TABLE
        return PLAIN_TABLE.replace(old, new)

    tables = {
        "empty": ("", "empty"),
        "blank": (" \n\n", "empty"),
        "header-only": ("isic_id,target\n", "no row"),
        "empty-rows": ("isic_id,target\n,\n,\n", "no row"),
        "no-id-column": (changed("isic_id", "name"), "isic_id"),
        "no-target-column": (changed("target", "label"), "target"),
        "one-column-twice": (changed("patient_id", "target"), "more than once"),
        "other-separator": (PLAIN_TABLE.replace(",", "|"), "isic_id"),
        "target-two": (changed("A1,P0,1", "A1,P0,2"), "row 3, column target: '2'"),
        "target-word": (changed("A1,P0,1", "A1,P0,maybe"), "row 3, column target: 'maybe'"),
        "target-missing": (changed("A1,P0,1", "A1,P0,"), "row 3, column target: missing"),
        "target-negative": (changed("A1,P0,1", "A1,P0,-1"), "row 3, column target"),
        "target-fraction": (changed("A1,P0,1", "A1,P0,0.5"), "row 3, column target"),
        "many-targets-wrong": (PLAIN_TABLE.replace(",1\n", ",7\n"), "and 9 more"),
        "id-missing": (changed("A1,P0,1", ",P0,1"), "row 3, column isic_id: missing"),
        "patient-missing": (changed("A1,P0,1", "A1,NaN,1"), "row 3, column patient_id: missing"),
        "id-twice-two-targets": (PLAIN_TABLE + "A1,P0,0\n", "rows 3, 26: A1 differs in target"),
        "id-twice-two-patients": (PLAIN_TABLE + "A1,P9,1\n", "rows 3, 26: A1 differs in patient_id"),
        "columns-contradict": ("isic_id,target,benign_malignant\nA0,0,benign\nA1,1,benign\n", "row 3"),
        "unknown-word": (
            "isic_id,benign_malignant\nA0,benign\nA1,unsure\n",
            "row 3, column benign_malignant: 'unsure'",
        ),
        "word-missing": ("isic_id,benign_malignant\nA0,benign\nA1,\n", "row 3, column benign_malignant: missing"),
        "id-leaves-folder": (changed("A1,", "../A1,"), "'../A1' is not an id"),
        "id-absolute": (changed("A1,", "/etc/A1,"), "'/etc/A1' is not an id"),
        "id-hidden": (changed("A1,", ".A1,"), "'.A1' is not an id"),
        "id-endless": (changed("A1,", "A" * 300 + ","), "is not an id"),
        "id-of-two-lines": (changed("A1,", '"A\n1",'), "is not an id"),
        "row-too-long": (PLAIN_TABLE + "A90,P9,0,1,2\n", "line 26"),
        "row-too-short": (PLAIN_TABLE + "A90,P9\n", "row 26, column target: missing"),
        "quote-left-open": (PLAIN_TABLE + '"A90,P9,0\n', "not a table"),
        "header-endless": (PLAIN_TABLE.replace("isic_id", "i" * 140_000), "the header is none"),
        "html": ("<!DOCTYPE html>\n<html>404 Not Found</html>\n", "isic_id"),
        "json": ('[{"isic_id": "A0", "target": 1}]\n', "no row"),
        "other-ids": (PLAIN_TABLE.replace("A", "B"), "no picture"),
        "one-class": (PLAIN_TABLE.replace(",1\n", ",0\n"), "hold a malignant image"),
        "one-patient": ("isic_id,patient_id,target\nA0,P0,0\nA1,P0,1\n", "hold a benign image"),
        "most-absent": (PLAIN_TABLE + "".join(f"B{row},Q,0\n" for row in range(9)), "B0: absent"),
    }
    return {
        **{name: (text.encode(), word) for name, (text, word) in tables.items()},
        "latin-1": (changed("A1,", "Ä1,").encode("latin-1"), "row 3 is not UTF-8"),
        "utf-16-unmarked": (PLAIN_TABLE.encode("utf-16-le"), "NUL"),
        "nul-byte": (changed("A1,", "A\0,").encode(), "row 3 holds a NUL byte"),
        "a-picture": (encoded(picture()), "not UTF-8"),
        "a-spreadsheet": (zipped(), ""),
    }


def odd_tables() -> dict[str, bytes]:
    """Ways to write PLAIN_TABLE, by name; each must be read as the same table."""
    lines = PLAIN_TABLE.splitlines()
    texts = {
        "carriage-returns": PLAIN_TABLE.replace("\n", "\r\n"),
        "old-carriage-returns": PLAIN_TABLE.replace("\n", "\r"),
        "semicolons": PLAIN_TABLE.replace(",", ";"),
        "tabs": PLAIN_TABLE.replace(",", "\t"),
        "quoted": "\n".join(",".join(f'"{cell}"' for cell in line.split(",")) for line in lines),
        "spaces": PLAIN_TABLE.replace(",", " , "),
        "same-row-twice": PLAIN_TABLE + lines[3] + "\n",
        "blank-lines": PLAIN_TABLE.replace("\n", "\n\n"),
        "no-last-newline": PLAIN_TABLE.rstrip(),
        "trailing-commas": PLAIN_TABLE.replace("\n", ",\n"),
        "targets-as-floats": PLAIN_TABLE.replace(",1\n", ",1.0\n").replace(",0\n", ",0.0\n"),
        "image-name": PLAIN_TABLE.replace("isic_id", "image_name"),
        "words": PLAIN_TABLE.replace("target", "benign_malignant")
        .replace(",1\n", ",Malignant\n")
        .replace(",0\n", ",benign\n"),
        "more-columns": f"{lines[0]},note\n" + "".join(f'{line},"a, b"\n' for line in lines[1:]),
        "other-order": "\n".join(",".join(reversed(line.split(","))) for line in lines),
    }
    return {
        **{name: text.encode() for name, text in texts.items()},
        "marked-utf-8": PLAIN_TABLE.encode("utf-8-sig"),
        "marked-utf-16": PLAIN_TABLE.encode("utf-16"),
    }
