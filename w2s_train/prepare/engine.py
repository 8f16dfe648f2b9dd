"""What an output folder says of a preparation: its settings, the classes, what was skipped.

Writes shards in several processes that end when their parent does.

Writes the shards of a source: again after an interruption, and never twice.

One process writes a shard at a time, also where the same command runs twice.

``latents.json`` beside the shards: what made them, and their statistics.
"""

import contextlib
import errno
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from filelock import FileLock, Timeout
from tqdm import tqdm

from w2s_train.autoencoder import LATENTS
from w2s_train.errors import UserError, one_line
from w2s_train.files import atomic_write
from w2s_train.prepare.images import (
    BrokenImage,
    ColourImage,
    Conversion,
    Encoded,
    decode,
    is_grey,
)
from w2s_train.prepare.sources import Item, Source
from w2s_train.secrets import redacted
from w2s_train.shards import ShardWriter, is_written, write_index
from w2s_train.shards.format import CLASSES, INDEX, ShardTable, table_path

DIGESTS = ("files", "labels")  # settings whose values say nothing to a reader


def check_settings(output: Path, split: str, settings: dict[str, Any]) -> None:
    """Refuse a folder whose shards of this split come from elsewhere or from other settings.

    Raises:
        UserError: Says which, and how to go on.
    """
    path = output / f"{split}.preparation.json"
    ways = f"another --output or --split, or delete {output}/{split}-* and {path.name} there"
    made = sorted(output.glob(f"{split}-*.tar*"))
    if not made:
        return
    if not path.is_file():
        raise UserError(
            f"output={output}: holds {made[0].name}, which this command did not make; "
            f"must be {ways}"
        )
    try:
        there = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"output={output}: {path.name} cannot be read ({error})") from error
    names = sorted(name for name in {*there, *settings} if there.get(name) != settings.get(name))
    if names:
        differ = ", ".join(
            f"other {name}"
            if name in DIGESTS
            else f"{name} {there.get(name)}, not {settings.get(name)}"
            for name in names
        )
        raise UserError(
            f"output={output}: its {split} shards were made with {differ}; must be {ways}"
        )


def write_settings(output: Path, split: str, settings: dict[str, Any]) -> None:
    """Write what `check_settings` compares with."""
    with atomic_write(output / f"{split}.preparation.json") as file:
        file.write(json.dumps(settings, indent=1).encode() + b"\n")


def check_classes(output: Path, classes: list[str]) -> None:
    """Refuse a folder that has other classes, and names that are no lines.

    Raises:
        UserError: Says which.
    """
    for name in classes:
        if len(name.splitlines()) != 1:
            raise UserError(f"class={name!r}: must be one line, for {CLASSES}")
    path = output / CLASSES
    if classes and path.is_file():
        there = path.read_text("utf-8", "surrogateescape").splitlines()
        if there != classes:
            differ = _differing(there, classes)
            raise UserError(
                f"output={output}: {CLASSES} must name the same classes; it has {differ}"
            )


def _differing(there: list[str], now: list[str]) -> str:
    if len(there) != len(now):
        return f"{len(there)}, these are {len(now)}"
    place = next(i for i, (a, b) in enumerate(zip(there, now, strict=True)) if a != b)
    return f"{there[place]!r} where these have {now[place]!r}"


def write_classes(output: Path, classes: list[str]) -> None:
    """Write the names, one a line; none if they are not known."""
    if classes:
        with atomic_write(output / CLASSES) as file:
            file.write("".join(f"{name}\n" for name in classes).encode(errors="surrogateescape"))


def write_skipped(output: Path, split: str, lines: list[str]) -> Path:
    """List what was skipped, one image a line; without any there is no such file."""
    path = output / f"{split}.skipped.txt"
    if lines:
        with atomic_write(path) as file:
            file.write("".join(f"{line}\n" for line in lines).encode(errors="surrogateescape"))
    else:
        path.unlink(missing_ok=True)
    return path


def remove_partials(output: Path, split: str) -> None:
    """Remove what dead runs of this split left; the caller holds its lock."""
    found = [*output.glob(f"{split}-*.partial"), *output.glob(f"{split}.*.partial")]
    for name in (CLASSES, INDEX):  # a run of another split may be writing them
        found += [path for path in output.glob(f"{name}.*.partial") if not _runs(path)]
    for path in found:
        path.unlink(missing_ok=True)


def _runs(partial: Path) -> bool:
    """Whether the process that writes ``NAME.PROCESS.partial`` is there."""
    try:
        os.kill(int(partial.name.split(".")[-2]), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # somebody else's
    return True


Write = Callable[[int], int]  # of a shard's number; gives its number of images
STOP = (signal.SIGINT, signal.SIGTERM)
_write: Write  # of this worker


def write_shards(write: Write, shards: list[int], *, finished: int, processes: int) -> None:
    """Write shards, with a progress bar.

    Args:
        write: Writes one, in a worker; the same whichever it is.
        shards: Numbers of the shards to write.
        finished: How many others there are already.
        processes: Number of workers.

    Raises:
        UserError: A worker was killed; or the first that ``write`` raised.
    """
    # Forked workers have the list of files without a copy of it. None has threads yet.
    context = multiprocessing.get_context("fork")
    executor = ProcessPoolExecutor(min(processes, len(shards)), context, _begin, (write,))
    try:
        with _signals_wait():
            first = executor.submit(_run, shards[0])  # starts all workers
        futures = [first, *(executor.submit(_run, shard) for shard in shards[1:])]
        images = 0
        with _bar(len(shards) + finished, finished) as bar:
            for future in as_completed(futures):
                images += future.result()
                bar.set_postfix_str(f"{images:,} images", refresh=False)
                bar.update()
    except BrokenProcessPool:
        raise UserError(
            f"processes={processes}: one of them was killed, perhaps because memory ran out; the "
            "same command goes on, with fewer --processes if need be"
        ) from None
    except BaseException:  # an interrupt, too: nobody waits for shards that are half done
        for worker in multiprocessing.active_children():
            worker.terminate()
        raise
    finally:
        executor.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _signals_wait() -> Iterator[None]:
    """Signals that end the command do so when the block has ended.

    During a fork, Python prints what a handler raises, and goes on. Here handlers only take note:
    blocking signals is not enough, since any other thread may receive them. Workers are born with
    both blocked, until they handle them as they should.
    """
    noted: list[int] = []
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP)
    before = {number: signal.signal(number, lambda n, _: noted.append(n)) for number in STOP}
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in before.items():
            signal.signal(number, handler)
    if noted:
        signal.raise_signal(noted[0])


def _bar(total: int, finished: int) -> tqdm:
    seconds = 0.2 if sys.stderr.isatty() else 10.0  # a log file wants few lines
    return tqdm(total=total, initial=finished, unit="shard", mininterval=seconds, smoothing=0.1)


def _begin(write: Write) -> None:
    global _write
    _write = write
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C; the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Without this, a worker whose parent was killed waits for work forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _run(shard: int) -> int:
    return _write(shard)


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
        check_settings(self.output, self.split, self.settings())
        check_classes(self.output, self.source.classes)
        finished = self._write_missing(processes)
        totals = self._totals()
        listed = write_skipped(self.output, self.split, totals.skipped)
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
        remove_partials(self.output, self.split)
        write_settings(self.output, self.split, self.settings())
        write_classes(self.output, self.source.classes)
        missing = [k for k in range(len(self.source)) if not is_written(self.shard(k))]
        finished = len(self.source) - len(missing)
        if missing:
            try:
                write_shards(self.write, missing, finished=finished, processes=processes)
            finally:
                remove_partials(self.output, self.split)
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


LOCKS = ".locks"  # folder, beside the shards
SECONDS = 60  # more than writing the files that describe the whole takes


@contextlib.contextmanager
def claim(target: Path) -> Iterator[None]:
    """Keep others from writing a shard, and delete what killed ones left of it.

    Raises:
        UserError: Another run is writing it.
    """
    with _locked(target, seconds=0):
        remove_leftover_files(target)
        yield


@contextlib.contextmanager
def claim_summary(folder: Path) -> Iterator[None]:
    """As `claim`, for the files beside the shards; waits for other parts that write them.

    Raises:
        UserError: Another run does not end writing them.
    """
    with _locked(folder / "summary", seconds=SECONDS):
        for path in folder.glob("*.json.*.partial"):
            path.unlink(missing_ok=True)
        yield


def remove_leftovers(target: Path) -> None:
    """Delete what a process left of a shard that has been ended, unless another writes it now."""
    with contextlib.suppress(UserError), claim(target):
        pass


def remove_leftover_files(target: Path) -> None:
    """Delete what writers of this shard left; the caller holds its lock."""
    stem = target.name.removesuffix(".tar")
    for kind in ("tar", "table.npz"):
        for path in target.parent.glob(f"{stem}.{kind}.*.partial"):
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(target: Path, seconds: float) -> Iterator[None]:
    folder = target.parent / LOCKS
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / f"{target.name}.lock", timeout=seconds)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(f"output={target.parent}: another run is writing {target.name}") from None
    try:
        yield
    finally:
        lock.release()


class Recipe(NamedTuple):
    """What latents are made of and how; those of two recipes do not go into one folder."""

    autoencoder: str
    revision: str | None
    weights: str
    dtype: str
    flip: bool
    precision: str
    batch_size: int  # it decides about the last bits
    image_shape: tuple[int, ...]
    latent_shape: tuple[int, ...]
    source: str
    source_shards: int
    source_digest: str  # sha256 of the shards' names


# The same weights may be found under two names, and the same shards by two patterns.
NAMES = ("autoencoder", "revision", "source")


def begin(folder: Path, recipe: Recipe) -> None:
    """Write ``latents.json``, still without statistics, or agree with the one that is there.

    Raises:
        UserError: It is of another recipe, or shards are there without it.
    """
    path = folder / LATENTS
    if not path.is_file():
        if any(folder.glob("*.tar")):
            raise UserError(
                f"output={folder}: must be empty or hold a {LATENTS}; it holds other shards"
            )
        _write_json(path, recipe._asdict())
        return
    try:
        stored = json.loads(path.read_text())
        before = {name: stored[name] for name in Recipe._fields}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"output={folder}: must hold a {LATENTS} of this command ({error!r})"
        ) from error
    now = json.loads(json.dumps(recipe._asdict()))
    changed = [name for name in now if name not in NAMES and now[name] != before[name]]
    if changed:
        differ = "; ".join(f"{name} {before[name]}, now {now[name]}" for name in changed)
        raise UserError(
            f"output={folder}: must be a folder of its own, it holds latents of {differ} "
            f"(made by {before['autoencoder']} of {before['source']})"
        )


class Summary(NamedTuple):
    """Of all shards of a folder."""

    images: int
    broken: int
    bytes: int
    mean: list[float]  # per channel
    std: list[float]
    std_of_all: float  # over all channels; 1 over it is the one scale for all of them


def complete(folder: Path, stems: list[str], recipe: Recipe) -> Summary:
    """Add the statistics to ``latents.json`` when all shards are written.

    Over images (mirrored ones, too), height and width, exact for a posterior N(m, s^2):

        E[z] = E[m],    Var[z] = E[m^2] + E[s^2] - E[z]^2.
    """
    tables = [ShardTable.load(table_path(folder / f"{stem}.tar")) for stem in stems]
    first, second, count, broken = (
        np.sum([table.sums[name] for table in tables if name in table.sums], axis=0)
        for name in ("first", "second", "count", "broken")
    )
    mean, square = first / count, second / count
    std = np.sqrt(square - mean**2)
    std_of_all = float(np.sqrt(square.mean() - mean.mean() ** 2))
    images, size = sum(map(len, tables)), sum(table.bytes for table in tables)
    summary = Summary(images, int(broken), size, mean.tolist(), std.tolist(), std_of_all)
    statistics = {name: getattr(summary, name) for name in ("mean", "std", "std_of_all")}
    statistics["count"] = int(count)
    counts = {"images": images, "broken": summary.broken}
    _write_json(folder / LATENTS, recipe._asdict() | counts | {"statistics": statistics})
    return summary


def _write_json(path: Path, content: dict[str, Any]) -> None:
    with atomic_write(path) as file:
        file.write(json.dumps(redacted(content), indent=1).encode() + b"\n")
