"""One sample of a shard: undecoded fields by name, and the tensors that they hold."""

import io
import lzma
import re
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import webdataset as wds
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from w2s_train.errors import UserError
from w2s_train.files import naming

Sample = dict[str, Any]
IMAGE_TYPES = ("png", "jpg", "jpeg", "webp")
ARRAY_TYPES = ("npy", "bf16.npy")  # bfloat16 is stored as its bits, uint16
FLIPPED = "flip."  # before the name of an array: the same of the mirrored image
MOST_CLASSES = 2**20  # more are a mistake, and counts of each would fill the memory


class EncodedImage(NamedTuple):
    """An image as a sample holds it, and its class."""

    content: bytes
    label: int


def read_shard(path: str | Path) -> Iterator[Sample]:
    """The samples of one local shard, undecoded, in their order; compressed ones, too.

    Each has "__key__", "__url__" and its fields by name, such as "png" and "cls", as bytes.
    One that is cut off between two samples seems to end there: `check_whole` finds that out.

    Raises:
        UserError: It cannot be read as a tar.
    """
    with naming(Path(path)), open(path, "rb") as stream:
        source = [{"url": str(path), "stream": stream}]
        try:
            yield from wds.tariterators.group_by_keys(wds.tariterators.tar_file_expander(source))
        except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, ValueError) as error:
            # webdataset adds where it was, as an object and as further arguments
            reason = str(error.args[0]).partition(" @ ")[0]
            raise UserError(f"shard={path}: must be a whole tar ({reason})") from error


def encoded_image(sample: Sample, shard: Path, classes: int = MOST_CLASSES) -> EncodedImage:
    """The image and the class of a sample.

    Args:
        sample: As `read_shard` gives it.
        shard: Where it is from, for messages.
        classes: Number of classes.

    Raises:
        UserError: It has no image, or no label in [0, classes).
    """
    key = sample["__key__"]
    field = next((field for field in IMAGE_TYPES if field in sample), None)
    if field is None:
        held = ", ".join(name for name in sample if not name.startswith("__"))
        types = ", ".join(IMAGE_TYPES)
        raise UserError(f"shard={shard}: must hold images ({types}); sample {key} holds {held}")
    text = sample.get("cls", b"").decode(errors="replace").strip()
    if not re.fullmatch(r"-?[0-9]{1,100}", text):
        allowed = "a whole number"
    elif 0 <= int(text) < classes:
        return EncodedImage(sample[field], int(text))
    else:
        allowed = "at least 0" if int(text) < 0 else f"in [0, {classes - 1}]"
    raise UserError(f"label={text[:20]}: must be {allowed}, in {key}.cls of {shard}")


def decode_image(content: bytes) -> Tensor:
    """An encoded image as uint8 (C, H, W): grey ones with one channel, all others with three."""
    try:
        image = Image.open(io.BytesIO(content))
    except UnidentifiedImageError:
        raise ValueError("it is no image of a known format") from None  # without an address
    pixels = np.array(image if image.mode == "L" else image.convert("RGB"))
    return torch.from_numpy(pixels if pixels.ndim == 3 else pixels[:, :, None]).permute(2, 0, 1)


def decode_array(content: bytes | memoryview, field: str) -> Tensor:
    """An array field as it is stored; pickled objects are refused."""
    array = torch.from_numpy(np.load(io.BytesIO(content), allow_pickle=False))
    return array.view(torch.bfloat16) if field.endswith("bf16.npy") else array


def payloads(fields: list[str], where: str) -> list[str]:
    """The fields that hold the data, in the order of preference.

    Args:
        fields: Those of a sample or a shard.
        where: What they are of, for the message.

    Raises:
        UserError: None does.
    """
    known = (*ARRAY_TYPES, *IMAGE_TYPES)
    found = [field for field in known if field in fields]
    if not found:
        names = ", ".join(fields) or "nothing"
        raise UserError(f"shard={where}: must hold one of {', '.join(known)}, it holds {names}")
    return found


def to_float(stored: Tensor) -> Tensor:
    """As networks and autoencoders take it: float32, pixels (uint8) in [-1, 1]."""
    if stored.dtype == torch.uint8:
        return stored.float().div_(127.5).sub_(1)
    return stored.float()
