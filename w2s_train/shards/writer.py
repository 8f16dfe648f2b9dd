"""Writes shards, their tables and the index of a folder."""

import dataclasses
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import webdataset as wds

from w2s_train.files import atomic_write, naming, sha256_of
from w2s_train.shards.table import ShardTable

INDEX = "index.json"
CLASSES = "classes.txt"  # names of the classes, one a line
TABLE = ".table.npz"


def table_path(shard: Path) -> Path:
    """Where the table of a shard lies: ``train-000000.table.npz`` beside ``train-000000.tar``."""
    return shard.with_name(table_name(shard.name))


def table_name(shard: str) -> str:
    """The name of a shard's table, for that of the shard."""
    return shard.removesuffix(".tar") + TABLE


def is_written(shard: Path) -> bool:
    """Whether a `ShardWriter` has finished this shard, and nothing has cut it since."""
    if not shard.is_file():
        return False
    try:
        return ShardTable.load(table_path(shard)).bytes == shard.stat().st_size
    except OSError:  # no table, or a broken one: it is to be written again
        return False


class ShardWriter:
    """Writes one shard; it and its table appear under their names when they are whole.

    A context manager. The same samples give the same bytes, whoever writes them and when.

    Args:
        path: The shard, ``NAME.tar``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        self.sums: dict[str, np.ndarray] = {}

    def __enter__(self) -> "ShardWriter":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        table_path(self.path).unlink(missing_ok=True)
        self.file = open(self.partial, "wb")
        self.tar = wds.TarWriter(self.file, user="", group="", encoder=False, mtime=0)
        return self

    def write(self, key: str, label: int, **fields: bytes) -> None:
        """Append a sample.

        Args:
            key: Its name, without dots.
            label: Its class.
            fields: Their contents, by name; a name with dots goes in as ``**{"flip.npy": ...}``.
        """
        with naming(self.path):
            self.tar.write({"__key__": key, "cls": b"%d" % label, **fields})

    def add(self, name: str, value: np.ndarray) -> None:
        """Add to a sum that the table keeps beside the samples."""
        self.sums[name] = self.sums[name] + value if name in self.sums else value

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            with naming(self.path):
                self.tar.close()
                self.file.flush()
                os.fsync(self.file.fileno())
                self.file.close()
            if kind is None:
                self._finish()
        finally:
            self.partial.unlink(missing_ok=True)

    def _finish(self) -> None:
        """Give shard and table their names."""
        with naming(self.path):
            table = ShardTable.scan(self.partial, name=str(self.path))
            table = dataclasses.replace(table, sha256=sha256_of(self.partial), sums=self.sums)
        os.replace(self.partial, self.path)
        table.save(table_path(self.path))


def write_index(folder: Path) -> dict[str, Any]:
    """Write ``index.json``: samples, bytes, sha256 and range of labels of each shard of a folder.

    Returns:
        What was written.

    """
    shards = {}
    for path in sorted(folder.glob(f"*{TABLE}")):
        table, shard = ShardTable.load(path), path.name.removesuffix(TABLE) + ".tar"
        if (folder / shard).is_file():
            shards[shard] = {
                "samples": len(table),
                "bytes": table.bytes,
                "sha256": table.sha256,
                "labels": [int(table.labels.min()), int(table.labels.max())] if len(table) else [],
            }
    index = {"version": 1, "shards": shards}
    with atomic_write(folder / INDEX) as file:
        file.write(json.dumps(index, indent=1).encode() + b"\n")
    return index
