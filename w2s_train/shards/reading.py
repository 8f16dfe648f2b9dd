"""Reads fields of samples at their places in files, and decodes them into one batch."""

import io
import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from w2s_train.errors import UserError, one_line
from w2s_train.shards.samples import ARRAY_TYPES, IMAGE_TYPES, decode_array, decode_image

SHORT = "the file ends before it does"


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
    together = _read_arrays(spans)
    if together is not None:
        return together
    decoded: dict[int, Tensor] = {}
    bad = {i: span.problem for i, span in enumerate(spans) if span.problem}
    for i, span in enumerate(spans):
        if i in bad:
            continue
        content = os.pread(span.file, span.size, span.offset)
        try:
            if len(content) < span.size:
                raise EOFError(SHORT)
            decoded[i] = decode(content, span.field)
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


def decode(content: bytes, field: str) -> Tensor:
    """A field of a sample as a tensor."""
    if field in IMAGE_TYPES:
        return decode_image(content)
    assert field.endswith(ARRAY_TYPES)
    return decode_array(content, field)


def _read_arrays(spans: Sequence[Span]) -> tuple[Tensor, dict[int, str]] | None:
    """The same for arrays of one type and shape, several times as fast; None for all others.

    Their files are equal in size and begin with the same header, which is decoded once.
    """
    readable = [i for i, span in enumerate(spans) if not span.problem]
    if not readable or len({spans[i].size for i in readable}) > 1:
        return None
    if not all(spans[i].field.endswith(ARRAY_TYPES) for i in readable):
        return None
    bad = {i: span.problem for i, span in enumerate(spans) if span.problem}
    size = spans[readable[0]].size
    buffer = np.empty((len(spans), size), np.uint8)
    for i in readable:
        if os.preadv(spans[i].file, [buffer[i]], spans[i].offset) < size:
            bad[i] = SHORT
    whole = [i for i in readable if i not in bad]
    header = _header(buffer[whole[0]]) if whole else None
    if header is None or (buffer[whole, : header.size] != buffer[whole[0], : header.size]).any():
        return None
    array = buffer[:, header.size :].view(header.dtype).reshape(len(spans), *header.shape)
    bits16 = spans[readable[0]].field.endswith("bf16.npy")
    tensor = torch.from_numpy(array)
    return (tensor.view(torch.bfloat16) if bits16 else tensor), bad


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
