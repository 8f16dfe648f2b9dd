"""What data/prepare.py makes of one image: size, mode, orientation, encoding, or a reason."""

import io

import numpy as np
import pytest
from image_folders import BROKEN, ORIENTATION, encode, noise, pixels
from PIL import Image

from w2s_train.prepare.images import Conversion, center_crop
from w2s_train.shards.decode import BrokenImage

RGB = Conversion(size=None, mode="RGB", format="png", quality=95, exif=True)


@pytest.mark.parametrize("shape", [(64, 64), (64, 96), (128, 64), (51, 80)])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_crop_of_a_constant(shape: tuple[int, int], mode: str):
    image = Image.new(mode, shape, 77 if mode == "L" else (7, 77, 177))
    expected = Image.new(mode, (24, 24), image.getpixel((0, 0)))
    np.testing.assert_array_equal(center_crop(image, 24), expected)


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_crop_halves_exactly(factor: int):
    """Blocks of equal pixels: boxes of powers of two give the blocks, the middle square is kept."""
    blocks = noise(16, 26)
    image = Image.fromarray(np.kron(blocks, np.ones((factor, factor), np.uint8)))
    np.testing.assert_array_equal(center_crop(image, 16), blocks[:, 5:21])
    tall = image.transpose(Image.Transpose.ROTATE_90)
    np.testing.assert_array_equal(center_crop(tall, 16), np.rot90(blocks)[5:21])


def test_crop_averages_boxes():
    """Not only constant ones: means of 2 x 2 pixels, chosen so that none is rounded."""
    image = noise(20, 20) // 4 * 4
    means = image.reshape(10, 2, 10, 2).astype(int).sum((1, 3)) // 4
    found = np.asarray(center_crop(Image.fromarray(image), 10)).astype(int)
    assert np.abs(found - means).max() <= 1  # Pillow rounds after each direction


def cubic_matrix(n: int, m: int) -> np.ndarray:
    """(m, n): bicubic (a = -1/2) resampling of n pixels to m, widened when it shrinks."""
    scale = n / m
    wide = max(scale, 1.0)
    x = np.abs((np.arange(n) + 0.5 - (np.arange(m)[:, None] + 0.5) * scale) / wide)
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    weights = np.where(x < 1, near, np.where(x < 2, far, 0.0))
    return weights / weights.sum(1, keepdims=True)


@pytest.mark.parametrize("shape", [(37, 37), (37, 61), (47, 30), (11, 17)])
def test_crop_resizes_bicubically(shape: tuple[int, int]):
    """Against matrices, for images that are too small to be halved, and one that grows."""
    size = 24
    height, width = (round(side * size / min(shape)) for side in shape)
    smooth = np.add.outer(np.arange(shape[0]) * 3.0, np.arange(shape[1]) * 2.0)
    image = (smooth + noise(*shape) / 8).clip(0, 255).astype(np.uint8)
    full = cubic_matrix(shape[0], height) @ image @ cubic_matrix(shape[1], width).T
    top, left = (height - size) // 2, (width - size) // 2
    expected = full[top : top + size, left : left + size]
    found = np.asarray(center_crop(Image.fromarray(image), size)).astype(float)
    assert np.abs(found - expected.clip(0, 255)).max() <= 1.5  # of 255: rounded twice


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
@pytest.mark.parametrize("size", [None, 12])
def test_bytes_are_kept(kind: str, size: int | None):
    content = encode(noise(12, 12, 3), kind)
    field = {"jpeg": "jpg"}.get(kind, kind)
    assert RGB._replace(size=size, format="jpg")(content) == (field, content, True)


@pytest.mark.parametrize("change", [{"size": 10}, {"mode": "L"}])
def test_changed_images_are_encoded(change: dict):
    encoded = RGB._replace(**change)(encode(noise(12, 12, 3), "jpeg"))
    assert (encoded.field, encoded.kept) == ("png", False)
    again = encode(pixels(encoded.content), compress_level=1)
    assert encoded.content == again


UPRIGHT = {
    1: lambda x: x,
    2: np.fliplr,
    3: lambda x: np.rot90(x, 2),
    4: np.flipud,
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: np.rot90(x, 2).swapaxes(0, 1),
    8: np.rot90,
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif(orientation: int):
    stored = noise(6, 9, 3)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    content = encode(stored, exif=exif)
    encoded = RGB(content)
    np.testing.assert_array_equal(pixels(encoded.content), UPRIGHT[orientation](stored))
    ignored = RGB._replace(exif=False)(content)
    np.testing.assert_array_equal(pixels(ignored.content), stored)
    for each in (encoded, ignored):  # whoever reads the shard turns nothing again
        assert each.kept == (orientation == 1)
        if not each.kept:
            assert ORIENTATION not in Image.open(io.BytesIO(each.content)).getexif()


@pytest.mark.parametrize("kind", ["png", "tiff"])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_sixteen_bits(kind: str, mode: str):
    values = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16) | 0xFF
    found = pixels(RGB._replace(mode=mode)(encode(values, kind)).content)
    expected = (values // 256).astype(np.uint8)
    np.testing.assert_array_equal(found if mode == "L" else found[..., 0], expected)


def test_sixteen_bits_in_wider_pixels():
    values = np.array([[0, 255], [256, 65535]], np.int32)
    found = pixels(RGB._replace(mode="L")(encode(values, "tiff")).content)
    np.testing.assert_array_equal(found, [[0, 0], [1, 255]])
    for wide in (values * 2, values - 1):
        with pytest.raises(BrokenImage, match="65535"):
            RGB(encode(wide, "tiff"))


def test_colour_modes():
    """As Pillow converts them, which is what ADM does, but for what is transparent: on white."""
    cmyk = Image.fromarray(noise(8, 8, 4), "CMYK")
    palette = Image.fromarray(noise(8, 8, 3)).quantize(16)
    clear = palette.copy()
    clear.info["transparency"] = 3
    for image, kind in (
        (cmyk, "jpeg"),
        (palette, "png"),
        (clear, "png"),
        (Image.fromarray(noise(8, 8, 4)), "png"),
        (Image.fromarray(noise(8, 8, 2), "LA"), "png"),
        (Image.fromarray(noise(8, 8) > 99), "png"),
    ):
        content = encode(image, kind)
        rgba = np.asarray(Image.open(io.BytesIO(content)).convert("RGBA")).astype(float)
        alpha = rgba[..., 3:] / 255
        expected = np.rint(rgba[..., :3] * alpha + 255 * (1 - alpha))
        found = Image.open(io.BytesIO(RGB(content).content))
        assert found.mode == "RGB" and "transparency" not in found.info
        assert np.abs(np.asarray(found).astype(float) - expected).max() <= 1  # Pillow's rounding


@pytest.mark.parametrize("kind", ["gif", "webp", "png", "tiff"])
def test_first_frame(kind: str):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if kind == "webp" else {}
    content = encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    encoded = RGB(content)
    assert encoded.field == "png" and not encoded.kept
    np.testing.assert_array_equal(pixels(encoded.content), frames[0])


@pytest.mark.parametrize("name", BROKEN)
def test_broken_images(name: str):
    content, reason = BROKEN[name]
    with pytest.raises(BrokenImage, match=reason) as caught:
        RGB(content)
    assert "0x" not in str(caught.value)  # the same reason in every process


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "gif", "bmp", "tiff"])
@pytest.mark.parametrize("left", [0.02, 0.5, 0.95, -20, -3])
def test_truncated_images(kind: str, left: float):
    """Wherever a file is cut (a share of it, or bytes from its end), it is not taken for whole."""
    content = encode(noise(64, 64, 3), kind)
    with pytest.raises(BrokenImage):
        RGB(content[: round(left * len(content)) if left > 0 else left])


def test_long_images():
    """One that resizing would make too large is broken, and no reason to run out of memory."""
    with pytest.raises(BrokenImage, match="too long"):
        center_crop(Image.new("L", (1, 20_000)), 256)
