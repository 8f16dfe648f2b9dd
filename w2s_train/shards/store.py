"""Random access to the samples of shards: read at their places, or held decoded in memory."""

import abc
import os
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from w2s_train.errors import UserError
from w2s_train.shards.index import Shard, load_table
from w2s_train.shards.order import Places
from w2s_train.shards.reading import Span, read_spans
from w2s_train.shards.samples import ARRAY_TYPES, FLIPPED, payloads
from w2s_train.shards.storage import Storage, one_line
from w2s_train.shards.table import ShardTable

OPEN_SHARDS = 128  # that one process keeps open
CHUNK = 1024  # samples that are read together when all of them are


class Rows(NamedTuple):
    """Samples as they are stored.

    Args:
        image: (B, C, H, W): pixels as uint8, or arrays of their own type and shape.
        label: (B,) int64.
        bad: Why a sample could not be read, by its number in the batch; its image means nothing.
    """

    image: Tensor
    label: Tensor
    bad: dict[int, str]


class Store(abc.ABC):
    """Samples of shards, numbered from 0 through all of them."""

    @abc.abstractmethod
    def read(self, places: Places) -> Rows:
        """Samples by number, mirrored where ``places`` says so.

        Raises:
            UserError: Their shapes differ.
        """

    @abc.abstractmethod
    def name(self, row: int) -> tuple[str, str]:
        """Shard and key of a sample."""

    @abc.abstractmethod
    def fetch(self, shard: int) -> None:
        """Have a shard at hand that will be read soon."""


class OpenShard(NamedTuple):
    """A shard to read from: descriptor, table, fields that hold data; or why that cannot be."""

    file: int
    table: ShardTable | None
    fields: list[str]
    problem: str

    def span(self, row: int, *, mirrored: bool) -> Span:
        """Where the data of a sample lie: the first of the fields that it has."""
        if self.table is None or row >= len(self.table):
            return Span(-1, 0, 0, "", self.problem or "missing")
        for field in self.fields:
            stored = mirrored and field in ARRAY_TYPES
            name = FLIPPED + field if stored else field
            column = self.table.fields.index(name)
            offset, size = self.table.offsets[row, column], self.table.sizes[row, column]
            if offset >= 0:
                return Span(self.file, int(offset), int(size), name)
        return Span(-1, 0, 0, "", f"it has none of {', '.join(self.fields)}")


class IndexedStore(Store):
    """Reads samples where the tables say that they are.

    By positioned reads and not through a memory map: where another process truncates a file they
    come short, while a map would kill the reader.

    Args:
        shards: As `find_shards` found them.
        storage: Gives files for their URLs.
        flip: Samples are going to be mirrored: images here, arrays by their stored mirror images.
    """

    def __init__(self, shards: Sequence[Shard], storage: Storage, *, flip: bool) -> None:
        self.shards, self.storage, self.flip = shards, storage, flip
        counts = np.array([shard.samples for shard in shards], np.int64)
        self.firsts = np.cumsum(counts) - counts
        self._opened: OrderedDict[int, OpenShard] = OrderedDict()

    def read(self, places: Places) -> Rows:
        self._close_oldest()
        shards = np.searchsorted(self.firsts, places.rows, "right") - 1
        mirrored = places.mirrored & self.flip
        spans: list[Span] = [Span(-1, 0, 0, "")] * len(shards)
        labels = np.zeros(len(shards), np.int64)
        for shard in np.unique(shards):
            opened, here = self._open(int(shard)), np.flatnonzero(shards == shard)
            rows = places.rows[here] - self.firsts[shard]
            for i, row in zip(here, rows.tolist(), strict=True):
                spans[i] = opened.span(row, mirrored=bool(mirrored[i]))
            if opened.table is not None:
                known = rows < len(opened.table)
                labels[here[known]] = opened.table.labels[rows[known]]
        image, bad = read_spans(spans, lambda i: " of ".join(self.name(places.rows[i])[::-1]))
        turn = np.flatnonzero(mirrored).tolist()
        turn = [i for i in turn if not spans[i].field.startswith(FLIPPED)]
        if turn and image.ndim > 2:
            image[turn] = image[turn].flip(-1)
        return Rows(image, torch.from_numpy(labels), bad)

    def name(self, row: int) -> tuple[str, str]:
        number = int(np.searchsorted(self.firsts, row, "right")) - 1
        place, table = int(row - self.firsts[number]), self._open(number).table
        known = table is not None and place < len(table)
        key = str(table.keys[place]) if table is not None and known else f"number {place}"
        return self.shards[number].url, key

    def fetch(self, shard: int) -> None:
        # Called in a thread: a shard is only brought here, and opened where it is read.
        self.storage.local(self.shards[shard].url, self.shards[shard].sha256)

    def stores_mirrored(self) -> bool:
        """Whether mirrored samples are read, and not made of the others."""
        return any(
            field in ARRAY_TYPES for i in range(len(self.shards)) for field in self._open(i).fields
        )

    def __getstate__(self) -> dict[str, object]:
        """For worker processes, which open files of their own."""
        return {**self.__dict__, "_opened": OrderedDict()}

    def _open(self, number: int) -> OpenShard:
        if number in self._opened:
            self._opened.move_to_end(number)
            return self._opened[number]
        shard = self.shards[number]
        try:
            table = load_table(shard, self.storage)
            file = os.open(self.storage.local(shard.url, shard.sha256), os.O_RDONLY)
            opened = OpenShard(file, table, self._fields(table, shard.url), "")
        except OSError as error:  # reported with each sample that it costs
            opened = OpenShard(-1, None, [], one_line(error))
        self._opened[number] = opened
        return opened

    def _close_oldest(self) -> None:
        """Between batches only, since a batch reads from all shards that it has opened."""
        while len(self._opened) > OPEN_SHARDS:
            _, oldest = self._opened.popitem(last=False)
            if oldest.file >= 0:
                os.close(oldest.file)

    def _fields(self, table: ShardTable, url: str) -> list[str]:
        fields = payloads(table.fields, url) if len(table) else []
        for field in fields:
            if self.flip and field in ARRAY_TYPES and FLIPPED + field not in table.fields:
                raise UserError(
                    f"flip=True: must be False for {url}, which holds arrays ({field}) and none of "
                    f"mirrored images ({FLIPPED}{field})"
                )
        return fields


class MemoryStore(Store):
    """All samples of another store, decoded.

    Args:
        source: Read here, and never again.
        samples: How many it holds.
        flip: Samples are going to be mirrored.
    """

    def __init__(self, source: IndexedStore, samples: int, *, flip: bool) -> None:
        self.source, self.flip = source, flip
        self.plain = self._read_all(samples, mirrored=False)
        # Images are mirrored when needed, which costs little; of arrays the mirrored ones are kept.
        stored = flip and source.stores_mirrored()
        self.flipped = self._read_all(samples, mirrored=True) if stored else None

    def _read_all(self, samples: int, *, mirrored: bool) -> Rows:
        parts: list[Rows] = []
        bad: dict[int, str] = {}
        for first in tqdm(
            range(0, samples, CHUNK), "reading samples", delay=5, disable=None, leave=False
        ):
            rows = np.arange(first, min(first + CHUNK, samples))
            part = self.source.read(Places(rows, np.full(len(rows), mirrored)))
            bad |= {first + i: reason for i, reason in part.bad.items()}
            parts.append(part)
        example = next((part.image for part in parts if part.image.ndim > 2), None)
        if example is None:
            raise UserError(f"shards: must hold a readable sample ({next(iter(bad.values()))})")
        blank = torch.zeros_like(example[:1])
        images = [
            part.image if part.image.ndim > 2 else blank.expand(len(part.label), *blank.shape[1:])
            for part in parts
        ]
        return Rows(torch.cat(images), torch.cat([part.label for part in parts]), bad)

    def read(self, places: Places) -> Rows:
        image, label = self.plain.image[places.rows], self.plain.label[places.rows]
        mirrored = torch.from_numpy(places.mirrored & self.flip)
        if self.flipped is not None:
            image[mirrored] = self.flipped.image[places.rows[mirrored]]
        else:
            image[mirrored] = image[mirrored].flip(-1)
        bad = {i: self.plain.bad[r] for i, r in enumerate(places.rows) if r in self.plain.bad}
        return Rows(image, label, bad)

    def name(self, row: int) -> tuple[str, str]:
        return self.source.name(row)

    def fetch(self, shard: int) -> None:
        """Nothing: everything is here."""
