"""Writes the shards of a source: again after an interruption, and never twice."""

import errno
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from w2s_train.errors import UserError, one_line
from w2s_train.preparation import record
from w2s_train.preparation.base import Item, Source
from w2s_train.preparation.image import (
    BrokenImage,
    ColourImage,
    Conversion,
    Encoded,
    decode,
    is_grey,
)
from w2s_train.preparation.workers import write_shards
from w2s_train.shards import ShardWriter, is_written, write_index
from w2s_train.shards.table import ShardTable
from w2s_train.shards.writer import CLASSES, table_path

VERSION = 2  # of the bytes that are written for an image
# Missing, a broken link, not ours to read; without a number it is the source that says so.
OF_THE_FILE = (None, errno.ENOENT, errno.ELOOP, errno.EACCES, errno.EPERM, errno.EISDIR)
LOCK_SECONDS = 10  # the workers of a run that was killed hold its lock until they notice


def load(item: Item) -> bytes:
    """The encoded image; raises BrokenImage if it cannot be read.

    Only for reasons of its own: a disk or a network that fails is an OSError and ends the run, or
    all the images behind it would be skipped for good.
    """
    try:
        return item.load()
    except OSError as error:
        if error.errno not in OF_THE_FILE:
            raise OSError(error.errno, error.strerror, error.filename or item.name) from error
        # Without the path, which the list of skipped images has.
        raise BrokenImage(error.strerror or one_line(error)) from error


def first_mode(source: Source) -> str:
    """What "auto" means: "L" if the first readable image of a source is grey, else "RGB".

    Raises:
        UserError: None can be read.
    """
    for shard in range(len(source)):
        for item in source.read(shard):
            try:
                return "L" if is_grey(decode(load(item))) else "RGB"
            except BrokenImage:
                continue  # listed when its shard is written
    raise UserError("mode=auto: needs an image that can be read; there is none")


@dataclass(frozen=True)
class Totals:
    """Of a split that is finished.

    Args:
        shards: Their number.
        counts: (K,) images of each class.
        bytes: Of all shards.
        kept: Images whose bytes are those that came in.
        skipped: "name, tab, reason" of each broken image.
    """

    shards: int
    counts: np.ndarray
    bytes: int
    kept: int
    skipped: list[str]


@dataclass(frozen=True)
class Preparation:
    """The shards of one split of a data set.

    Args:
        source: Where images come from.
        conversion: What becomes of each.
        output: Folder to write.
        split: First word of the shards' names.
    """

    source: Source
    conversion: Conversion
    output: Path
    split: str

    def run(self, *, processes: int, max_broken: float) -> str:
        """Write the shards that are missing, then the index.

        Args:
            processes: Number of worker processes.
            max_broken: Share of all images that may be broken, in [0, 1].

        Returns:
            A summary, of a few lines.

        Raises:
            UserError: An output that is in use or made otherwise; too many broken images.
        """
        self.output.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.output / f".{self.split}.lock", timeout=LOCK_SECONDS):
                return self._run(processes, max_broken)
        except Timeout:
            raise UserError(f"output={self.output}: another run is writing {self.split}") from None

    def _run(self, processes: int, max_broken: float) -> str:
        began = time.monotonic()
        record.check_settings(self.output, self.split, self.settings())
        record.check_classes(self.output, self.source.classes)
        finished = self._write_missing(processes)
        totals = self._totals()
        listed = record.write_skipped(self.output, self.split, totals.skipped)
        self._check(totals, max_broken, listed)
        write_index(self.output)
        return self._summary(totals, finished, listed, time.monotonic() - began)

    def settings(self) -> dict[str, Any]:
        """Whatever the bytes of the shards depend on."""
        settings = self.conversion._asdict()
        del settings["only_grey"]  # which only refuses images
        return {
            "version": VERSION,
            **self.source.identity,
            "classes": len(self.source.classes),
            "shards": len(self.source),
            **settings,
        }

    def shard(self, number: int) -> Path:
        """Where a shard lies."""
        return self.output / f"{self.split}-{number:06d}.tar"

    def write(self, number: int) -> int:
        """Write one shard; gives its number of images."""
        images, skipped = 0, []
        with ShardWriter(self.shard(number)) as writer:
            for item in self.source.read(number):
                try:
                    encoded = self._convert(item)
                except BrokenImage as error:
                    skipped.append(f"{' '.join(item.name.split())}\t{error}")
                    continue
                writer.write(item.key, item.label, **{encoded.field: encoded.content})
                writer.add("kept", np.array(int(encoded.kept)))
                images += 1
            # With the table, so that they are there exactly if the shard is.
            writer.add("skipped", np.array(skipped, dtype=np.str_))
        return images

    def _convert(self, item: Item) -> Encoded:
        try:
            return self.conversion(load(item))
        except ColourImage:
            raise UserError(
                f"mode=auto: the first image is grey, {item.name} is not; give --mode RGB (or L)"
            ) from None

    def _write_missing(self, processes: int) -> int:
        """Write the shards that are not there; gives the number of those that were."""
        record.remove_partials(self.output, self.split)
        record.write_settings(self.output, self.split, self.settings())
        record.write_classes(self.output, self.source.classes)
        missing = [k for k in range(len(self.source)) if not is_written(self.shard(k))]
        finished = len(self.source) - len(missing)
        if missing:
            try:
                write_shards(self.write, missing, finished=finished, processes=processes)
            finally:
                record.remove_partials(self.output, self.split)
        return finished

    def _totals(self) -> Totals:
        counts, skipped = np.zeros(len(self.source.classes), np.int64), []
        size = kept = 0
        for number in range(len(self.source)):
            table = ShardTable.load(table_path(self.shard(number)))
            here = np.bincount(table.labels, minlength=len(counts))
            counts = np.pad(counts, (0, len(here) - len(counts))) + here
            size += table.bytes
            kept += int(table.sums.get("kept", 0))
            skipped += table.sums["skipped"].tolist()
        return Totals(len(self.source), counts, size, kept, skipped)

    def _check(self, totals: Totals, max_broken: float, listed: Path) -> None:
        images, broken = int(totals.counts.sum()), len(totals.skipped)
        total = images + broken
        if broken > max_broken * total:
            name, _, reason = totals.skipped[0].partition("\t")
            counts = f"{broken:,} of {total:,}"
            raise UserError(
                f"max_broken={max_broken}: {counts} images are broken, such as {name} "
                f"({reason}); {listed} lists them; the same command with a larger --max-broken "
                "keeps the shards"
            )
        if not images:
            raise UserError(f"output={self.output}: there is no image for it")

    def _summary(self, totals: Totals, finished: int, listed: Path, seconds: float) -> str:
        images = int(totals.counts.sum())
        empty = np.flatnonzero(totals.counts == 0).tolist()
        names = self.source.classes or [str(k) for k in range(len(totals.counts))]
        lines = [
            f"{self.output}: {totals.shards:,} {self.split} shards, {images:,} images, "
            f"{totals.bytes:,} bytes",
            f"{len(names):,} classes of {totals.counts.min():,} to {totals.counts.max():,} images"
            + ("" if self.source.classes else f"; their names are not known, no {CLASSES}"),
            f"mode {self.conversion.mode}: {totals.kept:,} images as they were, "
            f"{images - totals.kept:,} converted",
            f"{len(totals.skipped):,} broken images skipped"
            + (f", see {listed}" if totals.skipped else ""),
            *self.source.notes,
            f"{seconds:.1f} s" + (f"; {finished:,} shards were there" if finished else ""),
        ]
        if empty:
            lines.insert(2, f"no image: {', '.join(names[k] for k in empty[:10])}")
        return "\n".join(lines)
