"""Small shards for tests: numbered images, arrays, and damage."""

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from w2s_train.shards import ShardFiles, ShardWriter, Storage, expand_urls, write_index
from w2s_train.shards.dataset import Decoded, Rows
from w2s_train.shards.index import find_shards
from w2s_train.shards.order import Places


def png(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "png")
    return stream.getvalue()


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def number_image(number: int) -> bytes:
    """A grey 2x2 image whose left column is the number and whose right column is its complement."""
    return png(np.array([[number, 255 - number]] * 2, np.uint8))


def numbers(batch: dict) -> list[int]:
    """Which samples a batch of number images holds; checks labels, too."""
    image = batch["image"].int()
    mirrored = image[:, 0, 0, 0] + image[:, 0, 0, 1] == 255
    assert mirrored.all()
    values = image.amin(dim=(1, 2, 3)).tolist()  # the smaller of number and complement
    assert [v % 10 for v in values] == batch["label"].tolist()
    return values


def write_numbers(folder: Path, counts: list[int], *, index: bool = True) -> str:
    """Shards of number images, numbered through from 0 to at most 127; gives their pattern."""
    number = 0
    for shard, count in enumerate(counts):
        with ShardWriter(folder / f"train-{shard:06d}.tar") as writer:
            for _ in range(count):
                writer.write(f"{number:04d}", number % 10, png=number_image(number))
                number += 1
    write_index(folder)
    if not index:
        (folder / "index.json").unlink()
        for table in folder.glob("*.npz"):
            table.unlink()
    return str(folder / "train-*.tar")


def write_latents(folder: Path, counts: list[int], shape: tuple[int, ...], **options) -> str:
    """Shards of float16 arrays filled with their number; the mirrored ones with its negative."""
    number = 0
    for shard, count in enumerate(counts):
        with ShardWriter(folder / f"train-{shard:06d}.tar") as writer:
            for _ in range(count):
                fields = {"npy": npy(np.full(shape, number, np.float16))}
                if options.get("flip", True):
                    fields["flip.npy"] = npy(np.full(shape, -number, np.float16))
                writer.write(f"{number:06d}", number % 10, **fields)
                number += 1
    write_index(folder)
    return str(folder / "train-*.tar")


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def overwrite(path: Path, key: str, content: bytes) -> None:
    """Put other bytes into the first field of a sample, in place."""
    from w2s_train.shards.format import ShardTable, table_path

    table = ShardTable.load(table_path(path))
    row = table.keys.tolist().index(key)
    with open(path, "r+b") as file:
        file.seek(int(table.offsets[row, 0]))
        file.write(content[: int(table.sizes[row, 0])])


def same(one: dict, other: dict) -> bool:
    """Two training batches, bit for bit."""
    return torch.equal(one["image"], other["image"]) and torch.equal(one["label"], other["label"])


def files(pattern: str, storage: Storage, *, flip: bool = False) -> ShardFiles:
    return ShardFiles(find_shards(expand_urls(pattern), storage), storage, flip=flip)


def read(source: ShardFiles | Decoded, rows: Iterable[int], mirrored: Any = False) -> Rows:
    numbers = np.array(rows)
    return source.read(Places(numbers, np.broadcast_to(mirrored, numbers.shape)))
