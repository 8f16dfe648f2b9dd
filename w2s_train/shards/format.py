"""The format of shards: what is written beside their samples, so that any can be read directly.

A shard is a plain webdataset tar: members ``KEY.FIELD``, those of one sample one after another,
``KEY.cls`` its label as text. Its table, ``NAME.table.npz`` beside ``NAME.tar``, says where each
sample lies; it is written with the shard by `ShardWriter`, and other people's shards are scanned
once. ``index.json`` states what each shard of a folder holds.
"""

import dataclasses
import json
import lzma
import os
import re
import warnings
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
import webdataset as wds

from w2s_train.errors import UserError, one_line
from w2s_train.files import atomic_write, naming, sha256_of
from w2s_train.shards.members import LABEL, Members, parse_label, read_samples, shown_label

TABLE = ".table.npz"
INDEX = "index.json"
CLASSES = "classes.txt"  # names of the classes, one a line


@dataclass(frozen=True)
class ShardTable:
    """Of N samples with F fields each.

    Args:
        keys: (N,) names of the samples.
        labels: (N,) int64.
        fields: Names of the fields, such as "png" or "npy"; the label is none of them.
        offsets: (N, F) int64, bytes from the start of the file; -1 where a sample lacks the field.
        sizes: (N, F) int64, in bytes.
        bytes: Size of the whole file.
        sha256: Of the whole file; empty if it was only scanned.
        damage: What is wrong with the file; empty if nothing is. Samples before it are listed.
        sums: Whatever else the writer keeps, by name, such as channel sums of latents.
    """

    keys: np.ndarray
    labels: np.ndarray
    fields: list[str]
    offsets: np.ndarray
    sizes: np.ndarray
    bytes: int
    sha256: str = ""
    damage: str = ""
    sums: dict[str, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.keys)

    def within(self, size: int) -> np.ndarray:
        """(N,) bool: which samples lie in a file's first ``size`` bytes."""
        return (self.offsets + self.sizes).max(axis=1, initial=0) <= size

    def save(self, path: Path) -> None:
        """Write it; it appears under its name when whole."""
        about = {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}
        about |= {f"sum_{name}": value for name, value in about.pop("sums").items()}
        with atomic_write(path) as file:
            np.savez(file, **about)

    @classmethod
    def load(cls, path: Path) -> "ShardTable":
        """Read what `save` wrote.

        Raises:
            OSError: It cannot be read, or is something else.
        """
        try:
            with np.load(path, allow_pickle=False) as stored:
                return cls(
                    keys=stored["keys"],
                    labels=stored["labels"],
                    fields=stored["fields"].tolist(),
                    offsets=stored["offsets"],
                    sizes=stored["sizes"],
                    bytes=int(stored["bytes"]),
                    sha256=str(stored["sha256"]),
                    damage=str(stored["damage"]),
                    sums={k[4:]: stored[k] for k in stored if k.startswith("sum_")},
                )
        except (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise OSError(f"{path}: is no table of a shard ({error})") from error

    @classmethod
    def scan(cls, path: Path, *, name: str | None = None, unlabelled: bool = False) -> "ShardTable":
        """Read the headers and the labels of an uncompressed tar, not the images.

        Args:
            path: The file.
            name: What to call it in messages; the path if not given.
            unlabelled: Read no labels: all samples are of class 0.

        Raises:
            UserError: It is compressed or no tar, or a sample has no label; names shard and key.
        """
        name = name or str(path)
        with open(path, "rb", buffering=0) as file:  # headers and labels, and nothing beside
            samples, damage = read_samples(file, name)
            size = file.seek(0, 2)
            whole = {
                key: fields
                for key, fields in samples.items()
                if all(offset + length <= size for offset, length in fields.values())
            }
            if damage and whole:
                first, last = next(iter(whole)), list(whole)[-1]
                lacking = LABEL not in whole[last] and not unlabelled
                if whole[last].keys() != whole[first].keys() or lacking:
                    del whole[last]  # its other members may have followed
            labels = [0] * len(whole)
            if not unlabelled:
                labels = [_label(file, key, fields, name) for key, fields in whole.items()]
        fields = sorted({each for members in whole.values() for each in members} - {LABEL})
        places = np.array(
            [[members.get(f, (-1, 0)) for f in fields] for members in whole.values()], np.int64
        ).reshape(len(whole), len(fields), 2)
        keys = np.array(list(whole), dtype=np.str_)
        offsets, sizes = places[..., 0], places[..., 1]
        return cls(keys, np.array(labels, np.int64), fields, offsets, sizes, size, "", damage)


def _label(file: IO[bytes], key: str, members: Members, name: str) -> int:
    if LABEL not in members:
        raise UserError(
            f"label: sample {key} of {name} must have one, in {key}.{LABEL}; it holds "
            f"{', '.join(members)}. data.unlabelled=true takes shards without labels"
        )
    offset, size = members[LABEL]
    file.seek(offset)
    content = file.read(size)
    try:
        return int(np.int64(parse_label(content)))
    except (ValueError, OverflowError) as error:
        kind = "a whole number" if isinstance(error, ValueError) else "below 2**63 in size"
        where = f"sample {key} of {name}"
        raise UserError(f"label={shown_label(content)}: must be {kind} ({where})") from None


def table_path(shard: Path) -> Path:
    """Where the table of a shard lies: ``train-000000.table.npz`` beside ``train-000000.tar``."""
    return shard.with_name(shard.name.removesuffix(".tar") + TABLE)


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


def read_index(folder: Path) -> dict[str, Any]:
    """The shards that the index of a folder lists; none where it has no index of ours.

    Raises:
        UserError: It is one of ours, and broken.
    """
    path = folder / INDEX
    try:
        return parse_index(path.read_text(), str(path)) if path.is_file() else {}
    except UnicodeDecodeError:
        return parse_index("", str(path))


def parse_index(text: str, name: str) -> dict[str, Any]:
    """The shards that an index lists; other programs' files of this name list none.

    Args:
        text: Its contents.
        name: Where it is.

    Raises:
        UserError: It is one of ours, and broken.
    """
    broken = f"index={name}: must be the index of a folder of shards, whole; it is broken"
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        if text.lstrip().startswith("<"):  # of a server that has no such file, or wants a login
            raise UserError(f"index={name}: must be the index of a folder, it is a page") from None
        if re.match(r'\s*{\s*"version": 1,\s*"shards": {', text):  # as `write_index` begins
            raise UserError(f"{broken} ({one_line(error)}); remove it") from None
        content = None
    shards = content.get("shards") if isinstance(content, dict) else None
    if not isinstance(shards, dict):
        warnings.warn(f"index={name}: ignored, it is another program's", stacklevel=2)
        return {}
    for shard, entry in shards.items():
        try:
            int(entry["samples"]), int(entry["bytes"]), str(entry["sha256"]), list(entry["labels"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{broken} at {shard} ({one_line(error)}); remove it") from None
    return shards


def whole_samples(file: IO[bytes], shard: Path) -> dict[str, Members]:
    """The samples of a shard, compressed or not, by key; offsets are of what it holds.

    Raises:
        UserError: It has been cut off, has a field twice, or is no tar.
    """
    if table_path(shard).is_file() and not is_written(shard):
        raise UserError(f"shard={shard}: must be as long as when it was written, it is not")
    try:
        samples, damage = read_samples(file, str(shard), compressed=True)
    except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        damage = one_line(error)
    if damage:
        raise UserError(f"shard={shard}: must be a whole tar ({damage})")
    return samples
