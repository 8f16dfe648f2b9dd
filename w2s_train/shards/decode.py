"""One decoder of images, for preparation, training, references and latents.

What it gives is upright, of eight bits, grey (one channel) or RGB (three), and opaque:

- turned as the EXIF orientation says;
- 16 bits by their high byte, where Pillow's own conversion clips, so that a ramp keeps 256 levels;
- transparent pixels on white, and not in the colour that hides below them;
- one bit, grey with alpha and 16-bit grey as grey; palettes, CMYK and all others as RGB;
- of several frames the first one.
"""

import io

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from w2s_train.errors import one_line

# Formats that are read; Pillow knows more, some of which start other programs.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000")
PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
GREY = ("1", "L", "LA", "La", "I", "F")
ORIENTATION = 0x0112  # of EXIF; 1 is upright, 2 ... 8 are not
ABOUT = {"exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp"}  # where it may be said
WHITE = 255  # behind transparent pixels


class BrokenImage(Exception):
    """An image that cannot be used; its message says why."""


def open_image(content: bytes) -> Image.Image:
    """An image as it is stored, read to its end; the first one of several.

    Raises:
        BrokenImage: It cannot be read.
    """
    if not content:
        raise BrokenImage("empty file")
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
        image.load()
    except UnidentifiedImageError:
        raise BrokenImage(f"no image of a known type ({', '.join(FORMATS)})") from None
    except MemoryError:
        raise
    except Exception as error:  # decoders raise nearly anything on broken input
        raise BrokenImage(one_line(error)) from error
    if image.format == "PNG" and PNG_END not in content:
        raise BrokenImage("truncated: its end is missing")  # which Pillow reads, others do not
    return image


def is_grey(image: Image.Image) -> bool:
    """Whether an image has no colours, whatever its depth."""
    return image.mode in GREY or image.mode.startswith("I;16")


def is_turned(image: Image.Image) -> bool:
    """Whether its EXIF orientation says that it is stored turned or mirrored."""
    if not ABOUT.intersection(image.info):
        return False  # the usual case, at once; a TIFF has been turned when it was read
    try:
        return image.getexif().get(ORIENTATION, 1) in range(2, 9)
    except Exception:  # of data that is no EXIF, and says nothing: the pixels are as good as any
        return False


def upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF orientation says; the same object if that is upright or not known."""
    if not is_turned(image):
        return image
    try:
        return ImageOps.exif_transpose(image)
    except Exception as error:  # as in `open_image`
        raise BrokenImage(f"EXIF: {one_line(error)}") from error


def plain(image: Image.Image) -> Image.Image:
    """Eight bits, opaque, "L" if it is grey and else "RGB"; the same object if it is that already.

    Raises:
        BrokenImage: What its pixels mean is not known.
    """
    try:
        clear = image.has_transparency_data
        if image.mode in ("L", "RGB") and not clear:
            return image
        if image.mode == "I" or image.mode.startswith("I;16"):
            return _high_byte(image)
        if image.mode == "F":
            raise BrokenImage("floating-point pixels, whose range is not known")
        mode = "L" if is_grey(image) else "RGB"
        return (_on_white(image) if clear else image).convert(mode)
    except (BrokenImage, MemoryError):
        raise
    except Exception as error:  # a conversion that Pillow does not know
        raise BrokenImage(f"mode {image.mode}: {one_line(error)}") from error


def decode_image(content: bytes) -> Tensor:
    """An encoded image as uint8 (C, H, W): grey ones with one channel, all others with three.

    Raises:
        BrokenImage: It cannot be read, or what its pixels mean is not known.
    """
    pixels = np.array(plain(upright(open_image(content))))
    return torch.from_numpy(pixels if pixels.ndim == 3 else pixels[:, :, None]).permute(2, 0, 1)


def _high_byte(image: Image.Image) -> Image.Image:
    pixels = np.asarray(image)
    # Pillow stretches every PGM of more than eight bits to 65535.
    if image.mode == "I" and image.format != "PPM" and 0 < pixels.max() < 256:
        raise BrokenImage("pixels of 32 bits, none above 255: their range is not known")
    if pixels.min() < 0 or pixels.max() > 0xFFFF:
        raise BrokenImage(f"pixels from {pixels.min()} to {pixels.max()}, not in [0, 65535]")
    grey = (pixels >> 8).astype(np.uint8)
    grey[pixels == image.info.get("transparency", -1)] = WHITE
    return Image.fromarray(grey)


def _on_white(image: Image.Image) -> Image.Image:
    straight = image.convert("LA") if image.mode == "La" else image
    ground = Image.new("RGBA", image.size, (WHITE, WHITE, WHITE, 255))
    return Image.alpha_composite(ground, straight.convert("RGBA")).convert("RGB")
