"""Samples of shards: their fields, undecoded one after another or decoded at their places."""

import io
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from w2s_train.errors import UserError, one_line
from w2s_train.files import naming
from w2s_train.shards.decode import BrokenImage, decode_image
from w2s_train.shards.format import whole_samples
from w2s_train.shards.members import (
    ARRAY_TYPES,
    IMAGE_TYPES,
    LABEL,
    parse_label,
    shown_label,
    unpacked,
)

Sample = dict[str, Any]
SHORT = "the file ends before it does"
MOST_CLASSES = 2**20  # more are a mistake, and counts of each would fill the memory


class EncodedImage(NamedTuple):
    """An image as a sample holds it, and its class."""

    content: bytes
    label: int


def read_shard(path: str | Path) -> Iterator[Sample]:
    """The samples of one local shard, undecoded, in their order; compressed ones, too.

    Each has "__key__" and its fields by name, such as "png" and "cls", as bytes.

    Raises:
        UserError: It cannot be read as a tar, or is not whole; before the first sample.
    """
    shard = Path(path)
    with naming(shard), open(shard, "rb") as file:
        samples = whole_samples(file, shard)
        file.seek(0)
        if not samples:
            return
        content = unpacked(file)
        for key, fields in samples.items():
            sample: Sample = {"__key__": key}
            for field, (offset, size) in fields.items():
                content.seek(offset)
                sample[field] = content.read(size)
            yield sample


def encoded_image(
    sample: Sample, shard: Path, classes: int = MOST_CLASSES, *, unlabelled: bool = False
) -> EncodedImage:
    """The image and the class of a sample.

    Args:
        sample: As `read_shard` gives it.
        shard: Where it is from, for messages.
        classes: Number of classes.
        unlabelled: Its class is 0, whatever it says.

    Raises:
        UserError: It has no image, or no label in [0, classes).
    """
    key = sample["__key__"]
    held = [name for name in sample if not name.startswith("__")]
    field = next((field for field in IMAGE_TYPES if field in sample), None)
    if field is None:
        types = ", ".join(IMAGE_TYPES)
        raise UserError(
            f"shard={shard}: must hold images ({types}); sample {key} holds {', '.join(held)}"
        )
    if unlabelled:
        return EncodedImage(sample[field], 0)
    if LABEL not in sample:
        raise UserError(
            f"label: sample {key} of {shard} must have one, in {key}.{LABEL}; it holds "
            f"{', '.join(held)}. data/prepare.py shards --unlabelled takes shards without labels"
        )
    try:
        label = parse_label(sample[LABEL])
    except ValueError:
        allowed = "a whole number"
    else:
        if 0 <= label < classes:
            return EncodedImage(sample[field], label)
        allowed = "at least 0" if label < 0 else f"in [0, {classes - 1}]"
    shown = shown_label(sample[LABEL])
    raise UserError(f"label={shown}: must be {allowed}, in {key}.{LABEL} of {shard}")


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
        except BrokenImage as error:
            bad[i] = str(error)
        except Exception as error:  # decoders raise all kinds on broken data; counted and reported
            bad[i] = one_line(error)
    if not decoded:
        return torch.zeros(len(spans), 0), bad
    first, example = next(iter(decoded.items()))
    hint = "; data/prepare.py shards makes them so" if example.dtype == torch.uint8 else ""
    for i, tensor in decoded.items():
        if (tensor.shape, tensor.dtype) != (example.shape, example.dtype):
            raise UserError(
                f"images={tuple(example.shape)}, {tuple(tensor.shape)}: must be of one shape and "
                f"type ({name(first)} is {example.dtype}, {name(i)} {tensor.dtype}){hint}"
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
