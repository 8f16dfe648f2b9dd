"""Data sets of shards: training batches by their positions, and every image once.

Samples are numbered from 0 through all shards. `ShardFiles` reads them where the tables of their
shards say that they are; `Decoded` holds all of them in memory.
"""

import dataclasses
import errno
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info
from tqdm import tqdm

from w2s_train.errors import UserError, one_line
from w2s_train.shards.format import ShardTable
from w2s_train.shards.index import Shard, load_table
from w2s_train.shards.members import ARRAY_TYPES, FLIPPED, IMAGE_TYPES, TOKENS
from w2s_train.shards.order import Places, StreamOrder
from w2s_train.shards.samples import Span, payloads, read_spans
from w2s_train.shards.storage import Storage

OPEN_SHARDS = 128  # that one process keeps open
RETRY_SECONDS = 60.0  # before a shard that could not be opened is tried again
OF_THE_MACHINE = (errno.EMFILE, errno.ENFILE, errno.ENOSPC, errno.EDQUOT, errno.EROFS)
CHUNK = 256  # samples that are read together when all of them are
ATTEMPTS = 100  # samples that are tried in place of one that cannot be read


class Rows(NamedTuple):
    """Samples as they are stored.

    Args:
        image: (B, C, H, W): pixels as uint8, or arrays of their own type and shape. (B, 0) if none
            of them could be read.
        label: (B,) int64.
        bad: Why a sample could not be read, by its number in the batch; its image means nothing.
        tokens: (B, N, F) of an encoder, as they are stored; None where none are asked for.
    """

    image: Tensor
    label: Tensor
    bad: dict[int, str]
    tokens: Tensor | None = None


class Contents(NamedTuple):
    """Where the samples of a shard lie, and which of its fields hold their data."""

    table: ShardTable
    fields: list[str]
    tokens: list[str]  # those that hold an encoder's tokens, if they are asked for

    def span(self, file: int, row: int, *, mirrored: bool, tokens: bool = False) -> Span:
        """The data of a sample, or its tokens: the first of the fields that it has."""
        fields = self.tokens if tokens else self.fields
        if row >= len(self.table.labels):
            return Span(-1, 0, 0, "", "it is missing")
        for field in fields:
            name = FLIPPED + field if mirrored and field.endswith(ARRAY_TYPES) else field
            column = self.table.fields.index(name)
            offset, size = self.table.offsets[row, column], self.table.sizes[row, column]
            if offset >= 0:
                return Span(file, int(offset), int(size), name)
        return Span(-1, 0, 0, "", f"it has none of {', '.join(fields)}")


class ShardFiles:
    """Samples on the disk.

    By positioned reads and not through a memory map: where another process truncates a file they
    come short, while a map would kill the reader.

    Args:
        shards: As `find_shards` found them.
        storage: Gives files for their URLs.
        flip: Samples are going to be mirrored: images here, arrays by their stored mirror images.
        tokens: Read tokens of an encoder, too, which lie beside the data.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        storage: Storage,
        *,
        flip: bool = False,
        tokens: bool = False,
    ) -> None:
        self.shards, self.storage, self.flip, self.tokens = shards, storage, flip, tokens
        counts = np.array([shard.samples for shard in shards], np.int64)
        self.firsts, self.samples = np.cumsum(counts) - counts, int(counts.sum())
        self._contents: dict[int, Contents] = {}
        self._files: OrderedDict[int, int] = OrderedDict()  # descriptors, by shard
        self._failures: dict[int, tuple[str, float]] = {}  # why a shard was not opened, and when

    def read(self, places: Places) -> Rows:
        """Samples by number, mirrored where ``places`` says so.

        Raises:
            UserError: Their shapes differ; or shards do not hold what they must.
        """
        self._close_oldest()
        shards = np.searchsorted(self.firsts, places.rows, "right") - 1
        mirrored = places.mirrored & self.flip
        spans: list[Span] = [Span(-1, 0, 0, "")] * len(shards)
        beside = list(spans)
        labels = np.zeros(len(shards), np.int64)
        for shard in np.unique(shards).tolist():
            here = np.flatnonzero(shards == shard)
            rows = places.rows[here] - self.firsts[shard]
            problem = self._open(shard)
            for i, row in zip(here.tolist(), rows.tolist(), strict=True):
                if problem:
                    spans[i] = beside[i] = Span(-1, 0, 0, "", problem)
                    continue
                contents, turned = self._contents[shard], bool(mirrored[i])
                spans[i] = contents.span(self._files[shard], row, mirrored=turned)
                if self.tokens:
                    where = dict(mirrored=turned, tokens=True)
                    beside[i] = contents.span(self._files[shard], row, **where)
                if not spans[i].problem:
                    labels[i] = contents.table.labels[row]
        image, bad = read_spans(spans, lambda i: self.title(places.rows[i]))
        tokens = None
        if self.tokens:
            tokens, missing = read_spans(beside, lambda i: self.title(places.rows[i]))
            bad |= missing
        turn = np.flatnonzero(mirrored).tolist()
        turn = [i for i in turn if not spans[i].field.startswith(FLIPPED)]
        if turn and image.ndim > 2:
            image[turn] = image[turn].flip(-1)
        return Rows(image, torch.from_numpy(labels), bad, tokens)

    def place(self, row: int) -> tuple[int, int]:
        """The number of a sample's shard, and its own in there."""
        shard = int(np.searchsorted(self.firsts, row, "right")) - 1
        return shard, int(row - self.firsts[shard])

    def name(self, row: int) -> tuple[str, str]:
        """Shard and key of a sample."""
        number, place = self.place(row)
        shard = self.shards[number]
        if number in self._failures:
            return shard.url, f"number {place}"
        keys = load_table(shard, self.storage).keys
        return shard.url, str(keys[place]) if place < len(keys) else f"number {place}"

    def title(self, row: int) -> str:
        """Both in words."""
        shard, key = self.name(row)
        return f"{key} of {shard}"

    def field(self, row: int) -> str:
        """The name of the field that holds a sample's data, once it has been read."""
        shard, place = self.place(row)
        return self._contents[shard].span(-1, place, mirrored=False).field

    def fetch(self, shards: Sequence[int]) -> None:
        """Have shards at hand that will be read soon."""
        for shard in shards:  # in a thread: only brought here, and opened where they are read
            try:
                self.storage.local(self.shards[shard].url, self.shards[shard].sha256)
            except OSError:
                continue  # tried again, and reported, when one of its samples is due

    def stores_mirrored(self) -> bool:
        """Whether mirrored samples are stored ones; known when all samples have been read once."""
        found = (*self._contents.values(),)
        return any(f.endswith(ARRAY_TYPES) for each in found for f in each.fields + each.tokens)

    def _open(self, number: int) -> str:
        """Have table and file of a shard at hand; says why that cannot be."""
        if number in self._files:
            self._files.move_to_end(number)
            return ""
        reason, when = self._failures.get(number, ("", 0.0))
        if reason and time.monotonic() < when + RETRY_SECONDS:
            return reason
        shard = self.shards[number]
        try:
            if number not in self._contents:
                table = load_table(shard, self.storage)
                # Names are needed for messages alone, and take more room than all the rest.
                slim = dataclasses.replace(table, keys=table.keys[:0], sums={})
                self._contents[number] = Contents(slim, *self._fields(table, shard.url))
            self._files[number] = self._descriptor(shard)
        except OSError as error:
            if error.errno in OF_THE_MACHINE:
                raise UserError(f"shard={shard.url}: cannot be opened ({error})") from error
            self._failures[number] = one_line(error), time.monotonic()
            return self._failures[number][0]
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

    def _fields(self, table: ShardTable, url: str) -> tuple[list[str], list[str]]:
        """Those that hold the data, and those that hold tokens."""
        fields = payloads(table.fields, url) if len(table) else []
        tokens = [TOKENS + kind for kind in ARRAY_TYPES if TOKENS + kind in table.fields]
        if self.tokens and len(table) and not tokens:
            raise UserError(
                f"train_urls={url}: must hold an encoder's tokens ({TOKENS}npy), made by "
                "data/encode_latents.py --align MODEL"
            )
        tokens = tokens if self.tokens else []
        for field in fields + tokens:
            mirrored = field.endswith(ARRAY_TYPES) and FLIPPED + field in table.fields
            if self.flip and field.endswith(ARRAY_TYPES) and not mirrored:
                raise UserError(
                    f"flip=True: must be False for {url}, which holds arrays ({field}) and none of "
                    f"mirrored images ({FLIPPED}{field})"
                )
        return fields, tokens


class Decoded:
    """All samples of shards in memory, decoded once.

    Args:
        files: Read here, and never again.

    Raises:
        UserError: None of them can be read, or their shapes differ.
    """

    def __init__(self, files: ShardFiles) -> None:
        self.files = files
        self.plain = self._read_all(mirrored=False)
        # Images are mirrored when needed, which costs little; of arrays the mirrored ones are kept.
        stored = files.flip and files.stores_mirrored()
        self.flipped = self._read_all(mirrored=True) if stored else None

    def read(self, places: Places) -> Rows:
        """As `ShardFiles.read`."""
        image, label = self.plain.image[places.rows], self.plain.label[places.rows]
        tokens = None if self.plain.tokens is None else self.plain.tokens[places.rows]
        mirrored = places.mirrored & self.files.flip
        turn = torch.from_numpy(mirrored)
        kept = [self.plain.bad] * len(mirrored)
        if self.flipped is None:
            image[turn] = image[turn].flip(-1)
        else:
            image[turn] = self.flipped.image[places.rows[mirrored]]
            if tokens is not None and self.flipped.tokens is not None:
                tokens[turn] = self.flipped.tokens[places.rows[mirrored]]
            kept = [self.flipped.bad if turned else self.plain.bad for turned in mirrored]
        found = enumerate(zip(kept, places.rows.tolist(), strict=True))
        unread = {i: bad[row] for i, (bad, row) in found if row in bad}
        return Rows(image, label, unread, tokens)

    def _read_all(self, *, mirrored: bool) -> Rows:
        samples, image, bad = self.files.samples, torch.zeros(0), dict[int, str]()
        tokens: Tensor | None = None
        label = torch.zeros(samples, dtype=torch.int64)
        firsts = range(0, samples, CHUNK)
        for first in tqdm(firsts, "reading samples", delay=5, disable=None, leave=False):
            numbers = range(first, min(first + CHUNK, samples))
            part = self.files.read(Places.of(numbers, mirrored=mirrored))
            bad |= {first + i: reason for i, reason in part.bad.items()}
            label[numbers.start : numbers.stop] = part.label
            if len(part.bad) == len(numbers):
                continue
            if not len(image):
                image = part.image.new_zeros(samples, *part.image.shape[1:])
            if image.shape[1:] != part.image.shape[1:] or image.dtype != part.image.dtype:
                raise UserError(
                    f"images={tuple(image.shape[1:])}, {tuple(part.image.shape[1:])}: must be of "
                    f"one shape and type ({self.files.title(first)} differs)"
                )
            image[numbers.start : numbers.stop] = part.image
            if part.tokens is not None:
                shape = (samples, *part.tokens.shape[1:])
                tokens = part.tokens.new_zeros(shape) if tokens is None else tokens
                tokens[numbers.start : numbers.stop] = part.tokens
        if not len(image):
            reason = next(iter(bad.values()), "there are none")
            raise UserError(f"train_urls: must hold a readable sample ({reason})")
        return Rows(image, label, bad, tokens)


class Skipped(NamedTuple):
    """A sample that could not be read: in which epoch of the data, its shard and key, and why."""

    epoch: int
    shard: str
    key: str
    reason: str


class ShardBatches(Dataset):
    """The item of a range of positions is the batch of the samples that lie there.

    Items are ``{"image": (B, C, H, W) as stored, "label": (B,) int64, "skipped": [Skipped, ...]}``,
    and "tokens" (B, N, F) where the files read them; samples that could not be read are replaced by
    others, which depend on the position alone. Nothing else does either: who reads an item, and
    what was read before, changes nothing.

    Args:
        files: Give samples by number.
        order: Gives numbers by position.
        in_memory: Decode all samples here and now, and keep them.
        prefetch: Have the shards of the next window fetched in the meantime.

    Raises:
        UserError: See `Decoded`.
    """

    def __init__(
        self,
        files: ShardFiles,
        order: StreamOrder,
        *,
        in_memory: bool = False,
        prefetch: bool = False,
    ) -> None:
        self.files, self.order, self.in_memory = files, order, in_memory
        self.source = Decoded(files) if in_memory else files
        self.prefetch, self._fetched = prefetch and not in_memory, list[int]()

    def __getitem__(self, positions: range) -> dict[str, Any]:
        if self.prefetch:
            self._fetch_upcoming(positions.start)
        places = self.order.at(positions.start, positions.stop)
        rows = self.source.read(places)
        skipped = [
            Skipped(positions[i] // self.order.samples, *self.files.name(places.rows[i]), reason)
            for i, reason in rows.bad.items()
        ]
        if rows.bad:
            rows = self._replace(positions, places, rows)
        tokens = {} if rows.tokens is None else {"tokens": rows.tokens}
        return {"image": rows.image, "label": rows.label, "skipped": skipped} | tokens

    def _fetch_upcoming(self, position: int) -> None:
        """Of each window once; the worker processes share its shards."""
        upcoming = self.order.upcoming(position)
        if upcoming == self._fetched:
            return
        self._fetched, info = upcoming, get_worker_info()
        share = upcoming[info.id :: info.num_workers] if info else upcoming
        threading.Thread(target=self.files.fetch, args=(share,), daemon=True).start()

    def _replace(self, positions: range, places: Places, rows: Rows) -> Rows:
        """The batch with other samples in place of the bad ones."""
        image, label, left, tokens = rows.image, rows.label, dict(rows.bad), rows.tokens
        for attempt in range(ATTEMPTS):
            bad = np.array(sorted(left))
            numbers = [self.order.substitute(positions[i], attempt) for i in bad.tolist()]
            found = self.source.read(Places(np.array(numbers), places.mirrored[bad]))
            good = [k for k in range(len(bad)) if k not in found.bad]
            if good and len(rows.bad) == len(label):  # until now there was no shape
                rows = rows._replace(bad={})
                image = found.image.new_zeros(len(label), *found.image.shape[1:])
                if found.tokens is not None:
                    tokens = found.tokens.new_zeros(len(label), *found.tokens.shape[1:])
            if good:
                image[bad[good]], label[bad[good]] = found.image[good], found.label[good]
                if tokens is not None and found.tokens is not None:
                    tokens[bad[good]] = found.tokens[good]
            left = {int(bad[k]): reason for k, reason in found.bad.items()}
            if not left:
                return Rows(image, label, {}, tokens)
        reason = next(iter(left.values()))
        raise UserError(f"train_urls: must hold readable samples; {ATTEMPTS} were not ({reason})")


class ShardImages(Dataset):
    """The item of a range of numbers is the batch of these images, as they are stored.

    Items are ``{"image": (B, C, H, W) uint8, "place": [(shard, number in the shard), ...],
    "encoding": ["png" and the like, ...]}``.

    Args:
        files: Give samples by number.
    """

    def __init__(self, files: ShardFiles) -> None:
        self.files = files

    def __getitem__(self, numbers: range) -> dict[str, Any]:
        rows = self.files.read(Places.of(numbers))
        for i, reason in rows.bad.items():
            url, key = self.files.name(numbers[i])
            raise UserError(f"urls={url}: must hold readable images; {key}: {reason}")
        encodings = [self.files.field(number) for number in numbers]
        for number, encoding in zip(numbers, encodings, strict=True):
            if encoding not in IMAGE_TYPES:
                url, _ = self.files.name(number)
                raise UserError(f"urls={url}: must hold images, one of {', '.join(IMAGE_TYPES)}")
        places = [self.files.place(number) for number in numbers]
        return {"image": rows.image, "place": places, "encoding": encodings}
