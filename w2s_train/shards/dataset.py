"""Random access to the samples of shards.

Reads samples where the tables of their shards say that they are.

Batches from shards: an endless shuffled stream for training, and every image once.
"""

import abc
import dataclasses
import errno
import itertools
import os
import signal
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm import tqdm

from w2s_train.errors import UserError, one_line
from w2s_train.shards.format import ShardTable
from w2s_train.shards.index import Shard, load_table
from w2s_train.shards.order import Places, StreamOrder
from w2s_train.shards.samples import ARRAY_TYPES, FLIPPED, IMAGE_TYPES, Span, payloads, read_spans
from w2s_train.shards.storage import Storage
from w2s_train.signals import PREEMPTION

CHUNK = 256  # samples that are read together when all of them are


class Rows(NamedTuple):
    """Samples as they are stored.

    Args:
        image: (B, C, H, W): pixels as uint8, or arrays of their own type and shape. (B, 0) if none
            of them could be read.
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

    @abc.abstractmethod
    def stores_mirrored(self) -> bool:
        """Whether mirrored samples are stored ones; known when all samples have been read once."""


class MemoryStore(Store):
    """All samples of another store, decoded.

    Args:
        source: Read here, and never again.
        samples: How many it holds.
        flip: Samples are going to be mirrored.

    Raises:
        UserError: None of them can be read, or their shapes differ.
    """

    def __init__(self, source: Store, samples: int, *, flip: bool) -> None:
        self.source, self.flip = source, flip
        self.plain = self._read_all(samples, mirrored=False)
        # Images are mirrored when needed, which costs little; of arrays the mirrored ones are kept.
        stored = flip and source.stores_mirrored()
        self.flipped = self._read_all(samples, mirrored=True) if stored else None

    def _read_all(self, samples: int, *, mirrored: bool) -> Rows:
        image: Tensor | None = None
        label, bad = torch.zeros(samples, dtype=torch.int64), dict[int, str]()
        firsts = range(0, samples, CHUNK)
        for first in tqdm(firsts, "reading samples", delay=5, disable=None, leave=False):
            numbers = np.arange(first, min(first + CHUNK, samples))
            part = self.source.read(Places(numbers, np.full(len(numbers), mirrored)))
            bad |= {first + i: reason for i, reason in part.bad.items()}
            label[first : first + len(numbers)] = part.label
            if len(part.bad) == len(numbers):
                continue
            if image is None:
                image = part.image.new_zeros(samples, *part.image.shape[1:])
            if image.shape[1:] != part.image.shape[1:] or image.dtype != part.image.dtype:
                raise UserError(
                    f"images={tuple(image.shape[1:])}, {tuple(part.image.shape[1:])}: must be of "
                    f"one shape and type ({' of '.join(self.name(first)[::-1])} differs)"
                )
            image[first : first + len(numbers)] = part.image
        if image is None:
            reason = next(iter(bad.values()), "there are none")
            raise UserError(f"train_urls: must hold a readable sample ({reason})")
        return Rows(image, label, bad)

    def read(self, places: Places) -> Rows:
        image, label = self.plain.image[places.rows], self.plain.label[places.rows]
        mirrored = places.mirrored & self.flip
        turn = torch.from_numpy(mirrored)
        kept = [self.plain.bad] * len(mirrored)
        if self.flipped is None:
            image[turn] = image[turn].flip(-1)
        else:
            image[turn] = self.flipped.image[places.rows[mirrored]]
            kept = [self.flipped.bad if turned else self.plain.bad for turned in mirrored]
        found = enumerate(zip(kept, places.rows.tolist(), strict=True))
        return Rows(image, label, {i: bad[row] for i, (bad, row) in found if row in bad})

    def name(self, row: int) -> tuple[str, str]:
        return self.source.name(row)

    def fetch(self, shard: int) -> None:
        """Nothing: everything is here."""

    def stores_mirrored(self) -> bool:
        return self.flipped is not None


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


ATTEMPTS = 100  # samples that are tried in place of one that cannot be read


class Skipped(NamedTuple):
    """A sample that could not be read: in which epoch of the data, its shard and key, and why."""

    epoch: int
    shard: str
    key: str
    reason: str


class ShardStream(IterableDataset):
    """Endless batches of one process.

    Position p of the order belongs to the batch p // batch_size, counted from ``start``, and these
    go round: the processes take them in turn, and the workers of a process take its batches in
    turn, as a `DataLoader` reads from them.

    Items are ``{"image": (B, C, H, W) as stored, "label": (B,) int64, "skipped": [Skipped, ...]}``;
    samples that could not be read are replaced by others, which depend on the position alone.

    Args:
        store: Gives samples by number.
        order: Gives numbers by position.
        batch_size: Rows per batch.
        rank: This process, of ``world_size``.
        world_size: Number of processes.
        start: Position where this run begins: samples that all processes have had before.
        prefetch: Have the shards of the next window fetched in the meantime.
    """

    def __init__(
        self,
        store: Store,
        order: StreamOrder,
        *,
        batch_size: int,
        rank: int,
        world_size: int,
        start: int = 0,
        prefetch: bool = False,
    ) -> None:
        self.store, self.order, self.batch_size = store, order, batch_size
        self.rank, self.world_size, self.start = rank, world_size, start
        self.prefetch = prefetch

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        workers, worker = (info.num_workers, info.id) if info else (1, 0)
        fetched: list[int] = []
        for number in itertools.count(worker, workers):
            first = self.start + (number * self.world_size + self.rank) * self.batch_size
            if self.prefetch and (upcoming := self.order.upcoming(first)) != fetched:
                fetched = upcoming
                shards = upcoming[worker::workers]
                threading.Thread(target=self._fetch, args=(shards,), daemon=True).start()
            yield self._batch(first)

    def _fetch(self, shards: list[int]) -> None:
        for shard in shards:
            try:
                self.store.fetch(shard)
            except OSError:
                continue  # tried again, and reported, when one of its samples is due

    def _batch(self, first: int) -> dict[str, Any]:
        places = self.order.at(first, first + self.batch_size)
        rows = self.store.read(places)
        skipped = [
            Skipped((first + i) // self.order.samples, *self.store.name(places.rows[i]), reason)
            for i, reason in rows.bad.items()
        ]
        if rows.bad:
            rows = self._replace(first, places, rows)
        return {"image": rows.image, "label": rows.label, "skipped": skipped}

    def _replace(self, first: int, places: Places, rows: Rows) -> Rows:
        """The batch with other samples in place of the bad ones."""
        image, label, left = rows.image, rows.label, dict(rows.bad)
        for attempt in range(ATTEMPTS):
            bad = np.array(sorted(left))
            numbers = [self.order.substitute(first + i, attempt) for i in bad.tolist()]
            found = self.store.read(Places(np.array(numbers), places.mirrored[bad]))
            good = [k for k in range(len(bad)) if k not in found.bad]
            if good and len(rows.bad) == len(label):  # until now there was no shape
                rows = rows._replace(bad={})
                image = found.image.new_zeros(len(label), *found.image.shape[1:])
            if good:
                image[bad[good]], label[bad[good]] = found.image[good], found.label[good]
            left = {int(bad[k]): reason for k, reason in found.bad.items()}
            if not left:
                return Rows(image, label, {})
        reason = next(iter(left.values()))
        raise UserError(f"train_urls: must hold readable samples; {ATTEMPTS} were not ({reason})")


class ShardImages(IterableDataset):
    """Every image of some shards once: this process's shards, one after another, nothing shuffled.

    Items are ``{"image": (C, H, W) uint8, "place": (shard, number in the shard), "encoding": "png"
    and the like}``.

    Args:
        store: Of the shards.
        rank: This process, of ``world_size``.
        world_size: Number of processes.
    """

    def __init__(self, store: IndexedStore, *, rank: int, world_size: int) -> None:
        self.store, self.rank, self.world_size = store, rank, world_size

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        workers, worker = (info.num_workers, info.id) if info else (1, 0)
        slot, slots = self.rank * workers + worker, self.world_size * workers
        for shard in range(slot, len(self.store.shards), slots):
            first = int(self.store.firsts[shard])
            for number in range(self.store.shards[shard].samples):
                row = np.array([first + number])
                rows = self.store.read(Places(row, np.array([False])))
                url, key = self.store.name(first + number) if rows.bad else ("", "")
                for reason in rows.bad.values():
                    raise UserError(f"urls={url}: must hold readable images; {key}: {reason}")
                encoding = self.store.field(first + number)
                if encoding not in IMAGE_TYPES:
                    types = ", ".join(IMAGE_TYPES)
                    url, _ = self.store.name(first)
                    raise UserError(f"urls={url}: must hold images, one of {types}")
                yield {"image": rows.image[0], "place": (shard, number), "encoding": encoding}


class Continued(DataLoader):
    """Begins where the run stands each time that it is read from: at every virtual epoch.

    Args:
        stream: What is read.
        position: Samples that all processes have had.
        options: Of `DataLoader`; workers must end with each pass, to take over the position.
    """

    def __init__(self, stream: ShardStream, position: Callable[[], int], **options: Any) -> None:
        super().__init__(stream, **options)
        self.stream, self.position = stream, position

    def __iter__(self) -> Any:
        self.stream.start = self.position()
        return super().__iter__()


def ignore_signals(worker: int) -> None:
    """What is sent to a whole job reaches workers, too; the main process decides when they end."""
    for each in (signal.SIGINT, *PREEMPTION):
        signal.signal(each, signal.SIG_IGN)
