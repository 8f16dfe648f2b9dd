"""What shards hold, known before any of them is read: samples, labels, and what is missing."""

import contextlib
import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from w2s_train.errors import UserError
from w2s_train.files import locked
from w2s_train.shards.format import INDEX, ShardTable, parse_index, read_index, table_path
from w2s_train.shards.storage import Storage, is_pipe, is_remote, split_url

SCAN = 2  # version of how tars are scanned


@dataclasses.dataclass(frozen=True)
class Shard:
    """One shard.

    Args:
        url: Where it is.
        samples: How many it should hold.
        labels: Smallest and largest; empty where it holds none.
        bytes: Size of the file.
        sha256: Of the file; empty if not known.
        lost: Samples that are known to be missing.
        damage: What is wrong with it; empty if nothing is known to be.
        unlabelled: Its labels do not count: all samples are of class 0.
    """

    url: str
    samples: int
    labels: tuple[int, ...]
    bytes: int
    sha256: str = ""
    lost: int = 0
    damage: str = ""
    unlabelled: bool = False

    def loss(self) -> str:
        """What the damage costs, in words."""
        lost = f"{self.lost:,}" if self.sha256 else "an unknown number of"
        return f"{self.damage}, {lost} samples lost"


def find_shards(urls: Sequence[str], storage: Storage, *, unlabelled: bool = False) -> list[Shard]:
    """Look the shards up in the indices beside them; scan those that are in none.

    Args:
        urls: Of the shards.
        storage: Gives files for them.
        unlabelled: All samples are of class 0; labels need not be there.

    Raises:
        UserError: A shard that cannot be read, or that differs from its index.
    """
    indices: dict[str, dict[str, Any]] = {}
    found = []
    # A scan reads headers and labels only, but of every sample: the first time that takes a while.
    for url in tqdm(urls, "indexing shards", delay=5, disable=None, leave=False):
        folder, name = split_url(url)
        if not is_pipe(url) and folder not in indices:
            indices[folder] = _read_index(folder, storage)
        entry = indices.get(folder, {}).get(name) if not is_pipe(url) else None
        shard = _listed(url, entry) if entry else _scanned(url, storage, unlabelled)
        if unlabelled:
            labels = (0, 0) if shard.samples else ()
            shard = dataclasses.replace(shard, labels=labels, unlabelled=True)
        found.append(shard)
    return found


def load_table(shard: Shard, storage: Storage) -> ShardTable:
    """The table of a shard: the one beside it, or of a scan that is kept in the cache.

    Raises:
        OSError: The shard cannot be had.
        UserError: It is no uncompressed tar.
    """
    try:
        table = ShardTable.load(_table_file(shard, storage))
        if table.bytes == shard.bytes and shard.sha256 in ("", table.sha256):
            zeros = np.zeros_like(table.labels)
            return dataclasses.replace(table, labels=zeros) if shard.unlabelled else table
    except OSError:  # none beside it, or a broken one: the shard itself says what it holds
        pass
    path = storage.local(shard.url, shard.sha256)
    return _scan(path, shard.url, storage, shard.unlabelled)


def count_labels(shards: Sequence[Shard], num_classes: int, storage: Storage) -> np.ndarray:
    """How many samples each class has, (num_classes,) int64; those that cannot be had count not.

    Raises:
        UserError: There are none.
    """
    counts = np.zeros(num_classes, np.int64)
    for shard in tqdm(shards, "counting labels", delay=5, disable=None, leave=False):
        if len(set(shard.labels)) == 1:
            counts[shard.labels[0]] += shard.samples
        elif shard.labels:
            with contextlib.suppress(OSError):  # missing: reported where it is to be read
                labels = load_table(shard, storage).labels
                counts += np.bincount(labels, minlength=num_classes)
    if not counts.any():
        raise UserError(f"train_urls: must hold samples of {num_classes} classes, there are none")
    return counts


def _table_file(shard: Shard, storage: Storage) -> Path:
    """Where the table beside a shard is to be found; of a remote one without the shard itself."""
    if not is_remote(shard.url):
        return table_path(storage.local(shard.url, shard.sha256))
    if not shard.sha256:
        raise FileNotFoundError(f"{shard.url}: no index tells of it")
    folder, name = split_url(shard.url)
    return storage.local(f"{folder}/{table_path(Path(name))}", version=shard.sha256)


def check_labels(shards: Sequence[Shard], num_classes: int, storage: Storage) -> None:
    """Refuse labels that are no class.

    Raises:
        UserError: There is one; names value, sample and shard.
    """
    for shard in shards:
        if not shard.labels or (0 <= shard.labels[0] and shard.labels[-1] < num_classes):
            continue
        try:
            table = load_table(shard, storage)
        except OSError as error:
            rule = f"must be in [0, {num_classes - 1}]"
            raise UserError(f"label={shard.labels}: {rule} ({shard.url}; {error})") from error
        bad = np.flatnonzero((table.labels < 0) | (table.labels >= num_classes))
        for row in bad[:1]:
            raise UserError(
                f"label={table.labels[row]}: must be in [0, {num_classes - 1}] "
                f"(sample {table.keys[row]} of {shard.url}, one of {len(bad):,} in this shard)"
            )


def _read_index(folder: str, storage: Storage) -> dict[str, Any]:
    if not is_remote(folder):
        return read_index(Path(folder))
    text = storage.text(url := f"{folder}/{INDEX}")
    return parse_index(text, url) if text else {}


def _listed(url: str, entry: dict[str, Any]) -> Shard:
    """A shard of an index, compared with what is on the disk."""
    shard = Shard(url, entry["samples"], tuple(entry["labels"]), entry["bytes"], entry["sha256"])
    if is_remote(url):
        return shard
    path = Path(url)
    size = path.stat().st_size if path.is_file() else None
    if size == shard.bytes:
        return shard
    if size is None:
        return dataclasses.replace(shard, lost=shard.samples, damage="missing")
    try:
        table = ShardTable.load(table_path(path))
    except OSError:
        table = None
    if table is None or size > shard.bytes:
        raise UserError(
            f"shard={url}: must have {shard.bytes:,} bytes, as {INDEX} beside it says; it has "
            f"{size:,}. Remove {INDEX} and the tables of shards that were made anew"
        )
    lost = int((~table.within(size)).sum())
    damage = f"cut off at {size:,} of {shard.bytes:,} bytes"
    return dataclasses.replace(shard, lost=lost, damage=damage)


def _scanned(url: str, storage: Storage, unlabelled: bool) -> Shard:
    """A shard of which no index tells."""
    try:
        table = _scan(storage.local(url), url, storage, unlabelled)
    except OSError as error:
        raise UserError(f"shard={url}: must be readable ({error})") from error
    labels = (int(table.labels.min()), int(table.labels.max())) if len(table) else ()
    return Shard(url, len(table), labels, table.bytes, damage=table.damage)


def _scan(path: Path, url: str, storage: Storage, unlabelled: bool) -> ShardTable:
    """Scan a file, or take the result of an earlier scan of the same file."""
    state = path.stat()
    about = f"{path.resolve()} {state.st_size} {state.st_mtime_ns}"
    if storage.cached(path):
        about = f"{path.name} {state.st_size}"  # named by its content; its time is that of its use
    # What one scan has found is not taken for another's: of labels, or of another version.
    about += f" {SCAN}{' unlabelled' * unlabelled}"
    name = hashlib.sha256(about.encode()).hexdigest()[:32]
    kept = storage.folder("tables") / f"{name}.npz"
    with locked(storage.folder("locks") / f"{name}.lock"):  # one process of several scans
        if kept.is_file():
            return ShardTable.load(kept)
        table = ShardTable.scan(path, name=url, unlabelled=unlabelled)
        table.save(kept)
        return table
