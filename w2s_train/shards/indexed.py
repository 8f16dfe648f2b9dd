"""Reads samples where the tables of their shards say that they are."""

import dataclasses
import errno
import os
import time
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from w2s_train.errors import UserError, one_line
from w2s_train.shards.index import Shard, load_table
from w2s_train.shards.order import Places
from w2s_train.shards.reading import Span, read_spans
from w2s_train.shards.samples import ARRAY_TYPES, FLIPPED, payloads
from w2s_train.shards.storage import Storage
from w2s_train.shards.store import Rows, Store
from w2s_train.shards.table import ShardTable

OPEN_SHARDS = 128  # that one process keeps open
RETRY_SECONDS = 60.0  # before a shard that could not be opened is tried again
OF_THE_MACHINE = (errno.EMFILE, errno.ENFILE, errno.ENOSPC, errno.EDQUOT, errno.EROFS)


class Contents(NamedTuple):
    """Where the samples of a shard lie, and which of its fields hold their data."""

    table: ShardTable
    fields: list[str]

    def span(self, file: int, row: int, *, mirrored: bool) -> Span:
        """The data of a sample: the first of the fields that it has."""
        if row >= len(self.table.labels):
            return Span(-1, 0, 0, "", "it is missing")
        for field in self.fields:
            name = FLIPPED + field if mirrored and field in ARRAY_TYPES else field
            column = self.table.fields.index(name)
            offset, size = self.table.offsets[row, column], self.table.sizes[row, column]
            if offset >= 0:
                return Span(file, int(offset), int(size), name)
        return Span(-1, 0, 0, "", f"it has none of {', '.join(self.fields)}")


class Failure(NamedTuple):
    """Why a shard could not be opened, and when (`time.monotonic`)."""

    reason: str
    when: float


class IndexedStore(Store):
    """Samples on the disk.

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
        self._contents: dict[int, Contents] = {}
        self._files: OrderedDict[int, int] = OrderedDict()  # descriptors, by shard
        self._failures: dict[int, Failure] = {}

    def read(self, places: Places) -> Rows:
        self._close_oldest()
        shards = np.searchsorted(self.firsts, places.rows, "right") - 1
        mirrored = places.mirrored & self.flip
        spans: list[Span] = [Span(-1, 0, 0, "")] * len(shards)
        labels = np.zeros(len(shards), np.int64)
        for shard in np.unique(shards).tolist():
            here = np.flatnonzero(shards == shard)
            rows = places.rows[here] - self.firsts[shard]
            problem = self._open(shard)
            for i, row in zip(here.tolist(), rows.tolist(), strict=True):
                if problem:
                    spans[i] = Span(-1, 0, 0, "", problem)
                    continue
                contents = self._contents[shard]
                spans[i] = contents.span(self._files[shard], row, mirrored=bool(mirrored[i]))
                if not spans[i].problem:
                    labels[i] = contents.table.labels[row]
        image, bad = read_spans(spans, lambda i: " of ".join(self.name(places.rows[i])[::-1]))
        turn = np.flatnonzero(mirrored).tolist()
        turn = [i for i in turn if not spans[i].field.startswith(FLIPPED)]
        if turn and image.ndim > 2:
            image[turn] = image[turn].flip(-1)
        return Rows(image, torch.from_numpy(labels), bad)

    def name(self, row: int) -> tuple[str, str]:
        number = int(np.searchsorted(self.firsts, row, "right")) - 1
        shard, place = self.shards[number], int(row - self.firsts[number])
        if number in self._failures:
            return shard.url, f"number {place}"
        keys = load_table(shard, self.storage).keys
        return shard.url, str(keys[place]) if place < len(keys) else f"number {place}"

    def fetch(self, shard: int) -> None:
        # Called in a thread: a shard is only brought here, and opened where it is read.
        self.storage.local(self.shards[shard].url, self.shards[shard].sha256)

    def field(self, row: int) -> str:
        """The name of the field that holds a sample's data, once it has been read."""
        number = int(np.searchsorted(self.firsts, row, "right")) - 1
        return self._contents[number].span(-1, int(row - self.firsts[number]), mirrored=False).field

    def stores_mirrored(self) -> bool:
        found = {field for contents in self._contents.values() for field in contents.fields}
        return not found.isdisjoint(ARRAY_TYPES)

    def _open(self, number: int) -> str:
        """Have table and file of a shard at hand; says why that cannot be."""
        if number in self._files:
            self._files.move_to_end(number)
            return ""
        failure = self._failures.get(number)
        if failure and time.monotonic() < failure.when + RETRY_SECONDS:
            return failure.reason
        shard = self.shards[number]
        try:
            if number not in self._contents:
                table = load_table(shard, self.storage)
                # Names are needed for messages alone, and take more room than all the rest.
                slim = dataclasses.replace(table, keys=table.keys[:0], sums={})
                self._contents[number] = Contents(slim, self._fields(table, shard.url))
            self._files[number] = self._descriptor(shard)
        except OSError as error:
            if error.errno in OF_THE_MACHINE:
                raise UserError(f"shard={shard.url}: cannot be opened ({error})") from error
            self._failures[number] = Failure(one_line(error), time.monotonic())
            return self._failures[number].reason
        return ""

    def _descriptor(self, shard: Shard) -> int:
        try:
            return os.open(self.storage.local(shard.url, shard.sha256), os.O_RDONLY)
        except FileNotFoundError:
            # Another process may have made room in the cache just now.
            return os.open(self.storage.local(shard.url, shard.sha256), os.O_RDONLY)

    def _close_oldest(self) -> None:
        """Between batches only, since a batch reads from all shards that it has opened."""
        while len(self._files) > OPEN_SHARDS:
            os.close(self._files.popitem(last=False)[1])

    def _fields(self, table: ShardTable, url: str) -> list[str]:
        fields = payloads(table.fields, url) if len(table) else []
        for field in fields:
            if self.flip and field in ARRAY_TYPES and FLIPPED + field not in table.fields:
                raise UserError(
                    f"flip=True: must be False for {url}, which holds arrays ({field}) and none of "
                    f"mirrored images ({FLIPPED}{field})"
                )
        return fields
