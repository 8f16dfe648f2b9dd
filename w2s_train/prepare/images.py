"""Images to shards: each upright, of eight bits, grey or RGB, cropped, encoded; all of a split.

What beside the shards describes them: ``SPLIT.preparation.json`` is their recipe, ``classes.txt``
names the classes, ``SPLIT.skipped.txt`` lists the images that are left out, and ``index.json`` says
that all shards are there.
"""

import errno
import io
import json
import os
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from w2s_train.errors import UserError, one_line
from w2s_train.files import atomic_write
from w2s_train.prepare import engine
from w2s_train.prepare.sources import Item, Source
from w2s_train.shards.decode import BrokenImage, is_grey, is_turned, open_image, plain, upright
from w2s_train.shards.format import (
    CLASSES,
    INDEX,
    ShardTable,
    ShardWriter,
    is_written,
    table_path,
    write_index,
)

# ---- one image

# Formats that shards may hold, and their fields. MPO: a JPEG file with more behind its end.
FIELDS = {"PNG": "png", "JPEG": "jpg", "MPO": "jpg", "WEBP": "webp"}
MOST_PIXELS = 2 * 89_478_485  # Pillow's limit against decompression bombs, for what is enlarged


class ColourImage(Exception):
    """An image with colours, where none has been expected."""


class Encoded(NamedTuple):
    """An image as a shard holds it."""

    field: str  # "png", "jpg" or "webp"
    content: bytes  # the file
    kept: bool  # these are the bytes that came in


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """The middle square, ``size`` pixels wide, as ADM cuts it.

    Halves with a box filter while the shorter side is at least 2 ``size``, then resizes the shorter
    side to ``size`` with a bicubic filter, then crops (``center_crop_arr`` in
    guided_diffusion/image_datasets.py of github.com/openai/guided-diffusion).
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    if width * height > MOST_PIXELS:
        raise BrokenImage(f"too long: {width} x {height} pixels once its shorter side is {size}")
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


class Conversion(NamedTuple):
    """What becomes of every image."""

    size: int | None  # side of the square in pixels; None keeps the size
    mode: str  # "RGB" or "L"
    format: str  # "png" or "jpg", for images that cannot stay as they are
    quality: int  # of "jpg", 1 ... 100
    exif: bool  # turn the image as its EXIF orientation says
    only_grey: bool = False  # refuse images with colours, because nobody asked for "L"

    def __call__(self, content: bytes) -> Encoded:
        """Convert an encoded image; one that needs no change keeps its bytes."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of metadata; what breaks an image raises
            stored = open_image(content)
            if self.only_grey and not is_grey(stored):
                raise ColourImage
            image = self._pixels(stored)
            several = stored.format != "MPO" and getattr(stored, "is_animated", False)
            # Whoever reads the shard turns what says that it is turned: that must not be kept.
            same = image is stored and not several and (self.exif or not is_turned(stored))
            if same and stored.format in FIELDS:
                return Encoded(FIELDS[stored.format], content, kept=True)
            return Encoded(self.format, self._encode(image), kept=False)

    def _pixels(self, image: Image.Image) -> Image.Image:
        """The image as it is to be; the same object if nothing has to change."""
        if self.exif:
            image = upright(image)
        image = plain(image)
        if image.mode != self.mode:
            image = image.convert(self.mode)
        if self.size is not None and image.size != (self.size, self.size):
            image = center_crop(image, self.size)
        return image

    def _encode(self, image: Image.Image) -> bytes:
        image.info = {}  # colour profiles and the like, which were of the pixels before
        file = io.BytesIO()
        if self.format == "png":
            # Encoding takes longest. Level 6, the default, takes a quarter longer than this (photos
            # at 256 x 256, Pillow 13) for files that are 7 % smaller.
            image.save(file, "png", compress_level=1)
        else:
            image.save(file, "jpeg", quality=self.quality)
        return file.getvalue()


# Missing, a broken link, not ours to read; without a number it is the source that says so.
OF_THE_FILE = (None, errno.ENOENT, errno.ELOOP, errno.EACCES, errno.EPERM, errno.EISDIR)


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
    """What "auto" means: "L" if the first readable image of a source is grey, else "RGB"."""
    for shard in range(len(source)):
        for item in source.read(shard):
            try:
                return "L" if is_grey(open_image(load(item))) else "RGB"
            except BrokenImage:
                continue  # listed when its shard is written
    raise UserError("mode=auto: needs an image that can be read; there is none")


# ---- all of them

VERSION = 3  # of the bytes that are written for an image
LOCK_SECONDS = 10  # the processes of a run that was killed hold its lock until they notice
DIGESTS = ("files", "labels")  # settings whose values say nothing to a reader


class Totals(NamedTuple):
    """Of a split that is finished."""

    counts: np.ndarray  # (K,) images of each class
    bytes: int  # of all shards
    kept: int  # images whose bytes are those that came in
    skipped: list[str]  # "name, tab, reason" of each broken image

    @property
    def images(self) -> int:
        """That are in the shards."""
        return int(self.counts.sum())


@dataclass(frozen=True)
class Preparation(engine.Work):
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
        """
        began = time.monotonic()
        self.output.mkdir(parents=True, exist_ok=True)
        with engine.locked(self.output, self.split, f".{self.split}.lock", LOCK_SECONDS):
            self._check_recipe()
            check_classes(self.output, self.source.classes)
            missing = self._begin()
            self._write(missing, processes)
            totals = self._totals()
            self._check(totals, max_broken)
            write_index(self.output)
        there = len(self.source) - len(missing)
        seconds = f"{time.monotonic() - began:.1f} s"
        return self._summary(totals) + seconds + (f"; {there:,} shards were there" if there else "")

    @property
    def recipe(self) -> dict[str, Any]:
        """Whatever the bytes of the shards depend on."""
        settings = self.conversion._asdict()
        del settings["only_grey"]  # which only refuses images
        numbers = {"classes": len(self.source.classes), "shards": len(self.source)}
        return {"version": VERSION, **self.source.identity, **numbers, **settings}

    def write(self, number: int, writer: ShardWriter) -> Iterator[int]:
        """Write a shard, given by its number."""
        images, skipped = 0, []
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
        yield images

    def _convert(self, item: Item) -> Encoded:
        try:
            return self.conversion(load(item))
        except ColourImage:
            raise UserError(
                f"mode=auto: the first image is grey, {item.name} is not; give --mode RGB (or L)"
            ) from None

    def _shard(self, number: int) -> Path:
        return self.output / f"{self.split}-{number:06d}.tar"

    @property
    def _recipe(self) -> Path:
        return self.output / f"{self.split}.preparation.json"

    @property
    def _listed(self) -> Path:
        return self.output / f"{self.split}.skipped.txt"

    def _check_recipe(self) -> None:
        """Refuse a folder whose shards of this split come from elsewhere or from other settings."""
        output, path = self.output, self._recipe
        made = sorted(output.glob(f"{self.split}-*.tar*"))
        if not made:
            return
        ways = (
            f"another --output or --split, or delete {output}/{self.split}-* and {path.name} there"
        )
        if not path.is_file():
            raise UserError(
                f"output={output}: holds {made[0].name}, which this command did not make; "
                f"must be {ways}"
            )
        try:
            before = json.loads(path.read_text())
        except ValueError as error:
            raise UserError(f"output={output}: {path.name} cannot be read ({error})") from error
        differ = ", ".join(
            f"other {name}"
            if name in DIGESTS
            else f"{name} {before.get(name)}, not {self.recipe.get(name)}"
            for name in sorted(engine.changed(before, self.recipe))
        )
        if differ:
            raise UserError(
                f"output={output}: its {self.split} shards were made with {differ}; must be {ways}"
            )

    def _begin(self) -> list[engine.Task]:
        """Write what describes the split; gives the shards that are missing."""
        engine.remove_partials(self.output, f"{self.split}-*", self.split)
        for name in (CLASSES, INDEX):  # a run of another split may be writing them
            for path in self.output.glob(f"{name}.*.partial"):
                if not _writes(path):
                    path.unlink(missing_ok=True)
        engine.write_json(self._recipe, self.recipe)
        if self.source.classes:
            _write_lines(self.output / CLASSES, self.source.classes)
        shards = [engine.Task(k, self._shard(k), shared=False) for k in range(len(self.source))]
        return [task for task in shards if not is_written(task.target)]

    def _write(self, missing: list[engine.Task], processes: int) -> None:
        """Write shards, with a progress bar."""
        if not missing:
            return
        there, images = len(self.source) - len(missing), 0
        seconds = 0.2 if sys.stderr.isatty() else 10.0  # a log file wants few lines
        options = dict(unit="shard", mininterval=seconds, smoothing=0.1)
        with (
            engine.in_processes(self, processes, missing) as written,  # before the bar has a thread
            tqdm(total=len(self.source), initial=there, **options) as bar,
        ):
            for progress in written:
                images += progress.images
                bar.set_postfix_str(f"{images:,} images", refresh=False)
                bar.update(progress.shards)

    def _totals(self) -> Totals:
        counts, skipped = np.zeros(len(self.source.classes), np.int64), []
        size = kept = 0
        for number in range(len(self.source)):
            table = ShardTable.load(table_path(self._shard(number)))
            here = np.bincount(table.labels, minlength=len(counts))
            counts = np.pad(counts, (0, len(here) - len(counts))) + here
            size += table.bytes
            kept += int(table.sums.get("kept", 0))
            skipped += table.sums["skipped"].tolist()
        return Totals(counts, size, kept, skipped)

    def _check(self, totals: Totals, max_broken: float) -> None:
        """List what was skipped, and refuse too much of it."""
        if totals.skipped:
            _write_lines(self._listed, totals.skipped)
        else:
            self._listed.unlink(missing_ok=True)
        broken, total = len(totals.skipped), len(totals.skipped) + totals.images
        if broken > max_broken * total:
            name, _, reason = totals.skipped[0].partition("\t")
            raise UserError(
                f"max_broken={max_broken}: {broken:,} of {total:,} images are broken, such as "
                f"{name} ({reason}); {self._listed} lists them; the same command with a larger "
                "--max-broken keeps the shards"
            )
        if not totals.images:
            raise UserError(f"output={self.output}: there is no image for it")

    def _summary(self, totals: Totals) -> str:
        counts, images, broken = totals.counts, totals.images, len(totals.skipped)
        unnamed = "" if self.source.classes else f"; their names are not known, no {CLASSES}"
        names = self.source.classes or [str(k) for k in range(len(counts))]
        empty = [names[k] for k in np.flatnonzero(counts == 0)[:10]]
        lines = [
            f"{self.output}: {len(self.source):,} {self.split} shards, {images:,} images, "
            f"{totals.bytes:,} bytes",
            f"{len(names):,} classes of {counts.min():,} to {counts.max():,} images{unnamed}",
            *([f"no image: {', '.join(empty)}"] if empty else []),
            f"mode {self.conversion.mode}: {totals.kept:,} images as they were, "
            f"{images - totals.kept:,} converted",
            f"{broken:,} broken images skipped" + (f", see {self._listed}" if broken else ""),
            *self.source.notes,
        ]
        return "".join(f"{line}\n" for line in lines)


def check_classes(output: Path, classes: list[str]) -> None:
    """Refuse a folder that has other classes, and names that are no lines."""
    for name in classes:
        if len(name.splitlines()) != 1:
            raise UserError(f"class={name!r}: must be one line, for {CLASSES}")
    path = output / CLASSES
    if not classes or not path.is_file():
        return
    there = path.read_text("utf-8", "surrogateescape").splitlines()
    if len(there) != len(classes):
        differ = f"{len(there)}, these are {len(classes)}"
    elif there != classes:
        a, b = next((a, b) for a, b in zip(there, classes, strict=True) if a != b)
        differ = f"{a!r} where these have {b!r}"
    else:
        return
    raise UserError(f"output={output}: {CLASSES} must name the same classes; it has {differ}")


def _write_lines(path: Path, lines: list[str]) -> None:
    """Write a file of lines, which may hold names of files."""
    with atomic_write(path) as file:
        file.write("".join(f"{line}\n" for line in lines).encode(errors="surrogateescape"))


def _writes(partial: Path) -> bool:
    """Whether the process that writes ``NAME.PROCESS.partial`` is there."""
    try:
        os.kill(int(partial.name.split(".")[-2]), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # somebody else's
    return True
