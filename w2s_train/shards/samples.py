"""Samples of shards: their fields, undecoded one after another or decoded at their places."""

import io
import lzma
import os
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import webdataset as wds
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from w2s_train.errors import UserError, one_line
from w2s_train.files import naming

Sample = dict[str, Any]
IMAGE_TYPES = ("png", "jpg", "jpeg", "webp")
ARRAY_TYPES = ("npy", "bf16.npy")  # bfloat16 is stored as its bits, uint16
FLIPPED = "flip."  # before the name of an array: the same of the mirrored image
SHORT = "the file ends before it does"
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


class Span(NamedTuple):
    """Where a field of one sample lies.

    Args:
        file: Descriptor of the open shard.
        offset: Bytes from its start.
        size: In bytes.
        field: Name, which says how it is encoded.
        problem: Why it cannot be read; empty if it may be.
    """

    file: int
    offset: int
    size: int
    field: str
    problem: str = ""


def read_spans(spans: Sequence[Span], name: Callable[[int], str]) -> tuple[Tensor, dict[int, str]]:
    """A batch (B, C, H, W) as it is stored, and why some of it could not be read.

    Args:
        spans: One a sample.
        name: What to call sample i of the batch in a message.

    Raises:
        UserError: Samples of different shapes or types.
    """
    bad = {i: span.problem for i, span in enumerate(spans) if span.problem}
    readable = [i for i in range(len(spans)) if i not in bad]
    together = _read_arrays(spans, readable)
    if together is not None:
        return together[0], bad | together[1]
    decoded: dict[int, Tensor] = {}
    for i in readable:
        file, offset, size, field, _ = spans[i]
        content = os.pread(file, size, offset)
        try:
            if len(content) < size:
                raise EOFError(SHORT)
            image = field in IMAGE_TYPES
            decoded[i] = decode_image(content) if image else decode_array(content, field)
        except Exception as error:  # decoders raise all kinds on broken data; counted and reported
            bad[i] = one_line(error)
    if not decoded:
        return torch.zeros(len(spans), 0), bad
    first, example = next(iter(decoded.items()))
    for i, tensor in decoded.items():
        if (tensor.shape, tensor.dtype) != (example.shape, example.dtype):
            raise UserError(
                f"images={tuple(example.shape)}, {tuple(tensor.shape)}: must be of one shape and "
                f"type ({name(first)} is {example.dtype}, {name(i)} {tensor.dtype})"
            )
    blank = torch.zeros_like(example)
    return torch.stack([decoded.get(i, blank) for i in range(len(spans))]), bad


def _read_arrays(
    spans: Sequence[Span], readable: list[int]
) -> tuple[Tensor, dict[int, str]] | None:
    """The same for arrays of one type and shape, several times as fast; None for all others.

    Their files are equal in size and begin with the same header, which is decoded once.
    """
    if not readable or len({spans[i].size for i in readable}) > 1:
        return None
    if not all(spans[i].field.endswith(ARRAY_TYPES) for i in readable):
        return None
    _, _, size, field, _ = spans[readable[0]]
    buffer = np.empty((len(spans), size), np.uint8)
    read = {i: os.preadv(spans[i].file, [buffer[i]], spans[i].offset) for i in readable}
    whole = [i for i in readable if read[i] == size]
    header = _header(buffer[whole[0]]) if whole else None
    if header is None or (buffer[whole, : header.size] != buffer[whole[0], : header.size]).any():
        return None
    array = buffer[:, header.size :].view(header.dtype).reshape(len(spans), *header.shape)
    tensor = torch.from_numpy(array)
    tensor = tensor.view(torch.bfloat16) if field.endswith("bf16.npy") else tensor
    return tensor, {i: SHORT for i in readable if read[i] < size}


class Header(NamedTuple):
    """Of a ``.npy`` file: its size in bytes, and what follows."""

    size: int
    dtype: np.dtype
    shape: tuple[int, ...]


def _header(content: np.ndarray) -> Header | None:
    """The header, if it is a plain one: version 1, C order, a type of numbers."""
    file = io.BytesIO(content.tobytes())
    try:
        if np.lib.format.read_magic(file) != (1, 0):
            return None
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    except ValueError:
        return None  # broken: decoding it alone says how
    plain = dtype.isnative and dtype.kind in "fiu" and not fortran
    whole = file.tell() + dtype.itemsize * int(np.prod(shape)) == len(content)
    return Header(file.tell(), dtype, shape) if plain and whole else None
