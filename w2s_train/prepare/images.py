"""What is done to an image: upright, eight bits, grey or RGB, cropped, encoded."""

import io
import warnings
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from w2s_train.errors import one_line

# Formats that are read; Pillow knows more, some of which start other programs.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000")
# Formats that shards may hold, and their fields. MPO: a JPEG file with more behind its end.
FIELDS = {"PNG": "png", "JPEG": "jpg", "MPO": "jpg", "WEBP": "webp"}
PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
GREY = ("1", "L", "LA", "La", "I", "F")
MOST_PIXELS = 2 * 89_478_485  # Pillow's limit against decompression bombs, for what is enlarged


class BrokenImage(Exception):
    """An image that cannot be used; its message says why."""


class ColourImage(Exception):
    """An image with colours, where none has been expected."""


class Encoded(NamedTuple):
    """An image as a shard holds it.

    Args:
        field: "png", "jpg" or "webp".
        content: The file.
        kept: Whether these are the bytes that came in.
    """

    field: str
    content: bytes
    kept: bool


def decode(content: bytes) -> Image.Image:
    """An image, read to its end; the first one of several.

    Raises:
        BrokenImage: It cannot be read, or holds more pixels than Pillow takes for a safe number.
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


def eight_bits(image: Image.Image) -> Image.Image:
    """Images of 16 bits by their high byte, where Pillow's own conversion clips; others as is.

    Raises:
        BrokenImage: It has values that are not 16 bits wide.
    """
    if image.mode == "F":
        raise BrokenImage("floating-point pixels, whose range is not known")
    if image.mode != "I" and not image.mode.startswith("I;16"):
        return image
    pixels = np.asarray(image)
    if pixels.min() < 0 or pixels.max() > 0xFFFF:
        raise BrokenImage(f"pixels from {pixels.min()} to {pixels.max()}, not in [0, 65535]")
    return Image.fromarray((pixels >> 8).astype(np.uint8))


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """The middle square, ``size`` pixels wide, as ADM cuts it.

    Halves with a box filter while the shorter side is at least 2 ``size``, then resizes the shorter
    side to ``size`` with a bicubic filter, then crops (``center_crop_arr`` in
    guided_diffusion/image_datasets.py of github.com/openai/guided-diffusion).

    Raises:
        BrokenImage: It is so long that it would be too large.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    if width * height > MOST_PIXELS:
        raise BrokenImage(f"too long: {width} x {height} pixels once its shorter side is {size}")
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


class Conversion(NamedTuple):
    """What becomes of every image.

    Args:
        size: Side of the square in pixels; None keeps the size.
        mode: "RGB" or "L".
        format: "png" or "jpg", for images that cannot stay as they are.
        quality: Of "jpg", 1 ... 100.
        exif: Turn the image as its EXIF orientation says.
        only_grey: Refuse images with colours, because nobody asked for "L".
    """

    size: int | None
    mode: str
    format: str
    quality: int
    exif: bool
    only_grey: bool = False

    def __call__(self, content: bytes) -> Encoded:
        """Convert an encoded image; one that needs no change keeps its bytes.

        Raises:
            BrokenImage: It cannot be read.
            ColourImage: It has colours, and ``only_grey``.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of metadata; what breaks an image raises
            stored = decode(content)
            if self.only_grey and not is_grey(stored):
                raise ColourImage
            image = self._pixels(stored)
            several = stored.format != "MPO" and getattr(stored, "is_animated", False)
            if image is stored and stored.format in FIELDS and not several:
                return Encoded(FIELDS[stored.format], content, kept=True)
            return Encoded(self.format, self._encode(image), kept=False)

    def _pixels(self, image: Image.Image) -> Image.Image:
        """The image as it is to be; the same object if nothing has to change."""
        if self.exif:
            image = _upright(image)
        image = eight_bits(image)
        if image.mode != self.mode:
            image = image.convert(self.mode)
        if self.size is not None and image.size != (self.size, self.size):
            image = center_crop(image, self.size)
        return image

    def _encode(self, image: Image.Image) -> bytes:
        image.info = {}  # colour profiles and the like, which were of the pixels before
        file = io.BytesIO()
        if self.format == "png":
            # Encoding takes longest. Level 6, the default, takes a quarter longer than this (photos
            # at 256 x 256, Pillow 13) for files that are 7 % smaller.
            image.save(file, "png", compress_level=1)
        else:
            image.save(file, "jpeg", quality=self.quality)
        return file.getvalue()


def _upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF orientation says; the same object if that is upright or missing."""
    try:
        orientation = image.getexif().get(0x0112, 1)
        if orientation in range(2, 9):
            return ImageOps.exif_transpose(image)
    except Exception as error:  # as in `decode`
        raise BrokenImage(f"EXIF: {one_line(error)}") from error
    return image
