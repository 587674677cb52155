"""Pictures are read as they look, or refused with a reason; no file ends a scan."""

import hashlib
import struct

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from Modules.data import images
from Modules.data.images import ImageError, decode, encode_jpeg, read_image, resize, scan
from tests.Modules.data import malformed

PICTURE = malformed.picture()
BROKEN, ODD = malformed.broken(), malformed.odd()
UPRIGHT = {  # by EXIF orientation: what turns the stored pixels into the picture as shown
    2: np.fliplr,
    3: lambda pixels: np.rot90(pixels, 2),
    4: np.flipud,
    5: lambda pixels: np.swapaxes(pixels, 0, 1),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: np.swapaxes(np.rot90(pixels, 2), 0, 1),
    8: np.rot90,
}


def difference(one, other):
    return np.abs(one.astype(int) - other.astype(int)).mean()


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_refused_with_its_reason(name, tmp_path):
    data, word = BROKEN[name]
    path = tmp_path / "picture.jpg"
    path.write_bytes(data)
    found = scan([path], progress=False).iloc[0]
    assert word in found["reason"]
    assert "\n" not in found["reason"]
    if found["reason"].startswith("unreadable"):
        with pytest.raises(ImageError, match=r"picture\.jpg: "):
            read_image(path, 32)


@pytest.mark.parametrize("name", ODD)
def test_an_odd_file_is_read_as_it_looks(name, tmp_path):
    data, note = ODD[name]
    path = tmp_path / "picture.jpg"
    path.write_bytes(data)
    found = scan([path], progress=False).iloc[0]
    assert found[["reason"]].isna().all()
    assert note in found["notes"]
    assert found["plain"] == (found["notes"] == "")
    pixels = decode(data)
    assert pixels.dtype == np.uint8
    expected, tolerance = PICTURE, 6
    if "grey" in name:
        expected = np.repeat(np.array(Image.fromarray(PICTURE).convert("L"))[..., None], 3, 2)
    if name.startswith("rotated"):
        expected = UPRIGHT[int(name[-1])](PICTURE)
    if "alpha" in name:
        weight = np.linspace(128, 255, malformed.SIZE)[None, :, None] / 255
        expected = expected * weight + 255 * (1 - weight)
    if "palette" in name or name in ("cmyk", "one-bit", "animated-gif"):
        tolerance = {"one-bit": 128}.get(name, 16)
    assert difference(pixels, expected) < tolerance


@pytest.mark.parametrize("bits", [8, 16])
def test_the_whole_range_of_grey_is_kept(bits):
    ramp = np.tile(np.arange(256), (64, 1))
    data = malformed.encoded(Image.fromarray((ramp * (257 if bits == 16 else 1)).astype(f"uint{bits}")), "PNG")
    np.testing.assert_array_equal(decode(data), np.repeat(ramp[..., None], 3, 2))


def test_fast_and_strict_paths_agree_on_a_plain_jpeg():
    data = malformed.encoded(PICTURE)
    assert difference(decode(data), images._decode_odd(data).pixels) < 1


def test_limits_hold_before_anything_is_decoded(monkeypatch, tmp_path):
    data = malformed.encoded(PICTURE)
    monkeypatch.setattr(images, "PIXEL_LIMIT", malformed.SIZE**2 - 1)
    monkeypatch.setattr(cv2, "imdecode", lambda *_: pytest.fail("decoded"))
    for kind in (data, malformed.encoded(PICTURE, "PNG")):
        with pytest.raises(ImageError, match="64x64 pixels, over"):
            decode(kind)
    monkeypatch.setattr(images, "BYTE_LIMIT", len(data) - 1)
    (tmp_path / "large.jpg").write_bytes(data)
    for read in (lambda: decode(data), lambda: read_image(tmp_path / "large.jpg")):
        with pytest.raises(ImageError, match="bytes"):
            read()


def test_a_size_that_only_one_reader_sees_does_not_pass_the_limit(monkeypatch):
    """Behind a marker without a length, two readers find different frame headers in the same bytes."""
    data = malformed.encoded(PICTURE)
    place = data.find(b"\xff\xc0")
    true = data[place : place + 19]
    small = true[:5] + struct.pack(">HH", 1, 1) + true[9:]
    hiding = true + b"\xff\xfe" + struct.pack(">H", 2 + len(small))  # a comment, which swallows the small one
    for marker in sorted(images.WITHOUT_LENGTH - {0xD8, 0xD9}):
        crafted = data[:place] + bytes([0xFF, marker]) + struct.pack(">H", 2 + len(hiding)) + hiding + small
        crafted += data[place + 19 :]
        assert cv2.imdecode(np.frombuffer(crafted, np.uint8), cv2.IMREAD_COLOR).shape == PICTURE.shape
        with monkeypatch.context() as patch:
            patch.setattr(images, "PIXEL_LIMIT", malformed.SIZE**2 - 1)
            patch.setattr(cv2, "imdecode", lambda *_: pytest.fail("decoded"))
            with pytest.raises(ImageError):
                decode(crafted)


def test_resizing_averages_over_areas():
    stripes = np.zeros((128, 128, 3), np.uint8)
    stripes[:, ::2] = 200  # sampled without anti-aliasing this is black or bright, never the mean
    assert set(np.unique(resize(stripes, 32))) == {100}
    assert resize(stripes, 128) is stripes
    assert resize(PICTURE[:32], 48).shape == (48, 48, 3)


def test_read_image_squashes_to_a_square(tmp_path):
    Image.fromarray(PICTURE[:40]).save(tmp_path / "wide.png")
    assert read_image(tmp_path / "wide.png").shape == (40, 64, 3)
    assert read_image(str(tmp_path / "wide.png"), 32).shape == (32, 32, 3)


@pytest.mark.parametrize("name", ["absent.jpg", "no\0name.jpg"])
def test_a_file_that_is_not_there_has_one_line(tmp_path, name):
    with pytest.raises(ImageError, match=r"no such file$"):
        read_image(f"{tmp_path}/{name}")


def test_written_jpegs_look_the_same():
    assert difference(decode(encode_jpeg(PICTURE)), PICTURE) < 6


def test_scan_goes_on_past_what_is_no_file(tmp_path):
    special = malformed.write_special(tmp_path)
    good = tmp_path / "good.jpg"
    good.write_bytes(malformed.encoded(PICTURE[:48]))
    found = scan([*(tmp_path / f"{name}.jpg" for name in special), None, good], progress=False)
    for reason, word in zip(found["reason"], [*special.values(), "absent"], strict=False):
        assert word in reason
    assert found.iloc[-1][["width", "height", "bytes", "sha256"]].tolist() == [
        64,
        48,
        good.stat().st_size,
        hashlib.sha256(good.read_bytes()).hexdigest(),
    ]
    assert scan([], progress=False).empty


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(ODD)), st.data())
def test_whatever_happens_to_a_file_it_is_a_picture_or_a_reason(name, data):
    """Cut anywhere, or some bytes changed: uint8 pixels or ImageError, nothing else."""
    content = bytearray(ODD[name][0])
    for _ in range(data.draw(st.integers(0, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        pixels = decode(bytes(content[: data.draw(st.integers(0, len(content)))]))
    except ImageError:
        return
    assert pixels.dtype == np.uint8
    assert pixels.ndim == 3
    assert pixels.shape[2] == 3
