"""Batches from shards: an endless shuffled stream for training, and every image once."""

import itertools
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from w2s_train.errors import UserError
from w2s_train.shards.indexed import IndexedStore
from w2s_train.shards.order import Places, StreamOrder
from w2s_train.shards.samples import IMAGE_TYPES
from w2s_train.shards.store import Rows, Store
from w2s_train.signals import PREEMPTION

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
