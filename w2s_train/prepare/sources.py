"""Where images come from: in shards, or one by one and dealt out to shards.

- `ImageFolder`: a folder with one sub-folder per class.
- `torchvision_images`: the data sets of torchvision, as it downloads and reads them.
- `HuggingFaceImages`: parquet files, and folders that ``datasets.save_to_disk`` wrote. Of parquet
  files, ``datasets`` makes a copy that can be read in any order, as large as they are, in its cache
  (``HF_DATASETS_CACHE``).
- `ShardSource`: webdataset shards: other people's, compressed ones, or our own in another size.
"""

import functools
import glob
import hashlib
import io
import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from w2s_train.errors import UserError
from w2s_train.shards import local_shards
from w2s_train.shards.format import CLASSES
from w2s_train.shards.samples import MOST_CLASSES, encoded_image, read_shard

Identity = dict[str, str | int]


class Item(NamedTuple):
    """One image that is to go into a shard."""

    key: str  # of the sample
    label: int
    name: str  # what the user knows it by: a file, a row
    load: Callable[[], bytes]  # gives the encoded image; raises OSError if it cannot be read


class Source(ABC):
    """Images in shards. What a shard holds depends on the input alone, not on who reads it."""

    classes: list[str]  # their names; empty if they are not known
    identity: Identity  # what tells this input, and how it is dealt out, from others
    notes: list[str]  # what the summary should say of it

    @abstractmethod
    def __len__(self) -> int:
        """Number of shards."""

    @abstractmethod
    def read(self, shard: int) -> Iterator[Item]:
        """The images of one shard, in their order."""


class Images(ABC):
    """Labelled images that can be read in any order; `Dealt` makes a source of them."""

    labels: np.ndarray  # (N,) int64, indices into ``classes``
    classes: list[str]  # as of a source, as what follows
    identity: Identity
    notes: list[str]

    @abstractmethod
    def name(self, index: int) -> str:
        """What the user knows an image by."""

    @abstractmethod
    def content(self, index: int) -> bytes:
        """An encoded image; raises OSError if it cannot be read."""


class Dealt(Source):
    """Images shuffled once, so that every shard has some of all classes.

    Args:
        images: The images.
        per_shard: Images per shard; the last one has what is left.
        seed: Of the order.
    """

    def __init__(self, images: Images, *, per_shard: int, seed: int) -> None:
        self.images, self.per_shard = images, per_shard
        # RandomState, and not a Generator: NumPy promises that its numbers stay the same.
        self.order = np.random.RandomState(seed).permutation(len(images.labels))
        self.classes, self.notes = images.classes, images.notes
        self.identity = {
            **images.identity,
            "items": len(self.order),
            "per_shard": per_shard,
            "shuffle_seed": seed,
        }

    def __len__(self) -> int:
        return -(-len(self.order) // self.per_shard)

    def read(self, shard: int) -> Iterator[Item]:
        start = shard * self.per_shard
        for place, index in enumerate(self.order[start : start + self.per_shard].tolist(), start):
            load = functools.partial(self.images.content, index)
            yield Item(
                f"{place:08d}", int(self.images.labels[index]), self.images.name(index), load
            )


def digest(parts: Iterable[str]) -> str:
    """Sixteen hexadecimal digits that stand for these texts."""
    sha256 = hashlib.sha256()
    for part in parts:
        sha256.update(part.encode(errors="surrogateescape") + b"\0")
    return sha256.hexdigest()[:16]


def without_labels(images: Images) -> Images:
    """The same images, all of one class without a name."""
    images.labels, images.classes = np.zeros(len(images.labels), np.int64), []
    images.identity = images.identity | {"unlabelled": True}
    return images


# ---- a folder

SUFFIXES = tuple(
    ".png .jpg .jpeg .jpe .jfif .webp .gif .bmp .dib .tif .tiff .ppm .pgm .pbm .pnm .jp2".split()
)


class _Bar(tqdm):
    monitor_interval = 0  # no thread: processes are forked later


class ImageFolder(Images):
    """The images below each sub-folder, however deep; its label is its place among the sorted ones.

    Args:
        path: The folder.
        unlabelled: Take all images in it and below it, as one class without a name.

    Raises:
        UserError: It has no sub-folders, or no images in them.
    """

    def __init__(self, path: Path, *, unlabelled: bool = False) -> None:
        if not path.is_dir():
            raise UserError(f"folder={path}: must be an existing folder")
        self.path, self.ignored, self.notes = path, 0, []
        if unlabelled:
            found = sorted(self._walk("", frozenset({os.path.realpath(path)})))
            self._take([], [found], "")
            without_labels(self)
            return
        entries = sorted(os.scandir(path), key=lambda entry: entry.name)
        visible = [entry for entry in entries if not entry.name.startswith(".")]
        self.classes = [entry.name for entry in visible if _is_folder(entry)]
        self.ignored = len(entries) - len(self.classes)
        if not self.classes:
            raise UserError(
                f"folder={path}: must hold one sub-folder per class, it holds none; --unlabelled "
                "takes images without classes"
            )
        bar = _Bar(self.classes, "listing", unit="class", delay=5, disable=None, leave=False)
        self._take(self.classes, [self._images(name) for name in bar], " in its folders")
        self.notes = [f"{self.ignored:,} ignored: hidden, of other types or in no class folder"]

    def _take(self, classes: list[str], found: list[list[tuple[str, int]]], where: str) -> None:
        """The images of each class, by name and size."""
        self.classes = classes
        self.files = [name for names in found for name, _ in names]
        if not self.files:
            raise UserError(f"folder={self.path}: must hold images ({' '.join(SUFFIXES)}){where}")
        counts = [len(names) for names in found]
        self.labels = np.repeat(np.arange(len(counts)), counts)
        files = (f"{name} {size}" for names in found for name, size in names)
        self.identity = {"source": "folder", "files": digest([*classes, *files])}
        self.notes = [f"{self.ignored:,} ignored: hidden or of other types"]

    def name(self, index: int) -> str:
        return self.files[index]

    def content(self, index: int) -> bytes:
        return (self.path / self.files[index]).read_bytes()

    def _images(self, name: str) -> list[tuple[str, int]]:
        """Names, relative to the folder, and sizes in bytes of the images of one class, sorted."""
        above = frozenset(map(os.path.realpath, (self.path, self.path / name)))
        return sorted(self._walk(name, above))

    def _walk(self, folder: str, above: frozenset[str]) -> Iterator[tuple[str, int]]:
        """Follows links to folders, but not to those ``above`` it, which would never end."""
        for entry in os.scandir(self.path / folder):
            name = f"{folder}/{entry.name}" if folder else entry.name
            hidden = entry.name.startswith(".")
            real = os.path.realpath(entry.path) if not hidden and _is_folder(entry) else None
            if real is not None and real not in above:
                yield from self._walk(name, above | {real})
                continue
            size = None if hidden or real is not None else _image_size(entry)
            if size is None:
                self.ignored += 1
            else:
                yield name, size


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Asks the disk where it is a link, only."""
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _image_size(entry: os.DirEntry[str]) -> int | None:
    """In bytes; None for no image, by its name: what it holds is seen when it is read."""
    if not entry.name.lower().endswith(SUFFIXES):
        return None
    try:
        state = entry.stat()
    except OSError:
        if entry.is_symlink():
            return -1  # a link to nothing is a broken image, and not another type of file
        raise
    return state.st_size if stat.S_ISREG(state.st_mode) else None


# ---- Hugging Face

Rows = Any  # a `datasets.Dataset`: the library is imported when it is needed

IMAGE_COLUMNS = ("image", "img", "images", "picture", "jpg", "jpeg", "png", "webp")
LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "target", "cls", "y")


def _load(path: str, split: str) -> Rows:
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"huggingface={path}: needs the datasets library, pip install -e '.[huggingface]'"
        ) from error
    try:
        if _is_stored(path):
            stored = datasets.load_from_disk(path)
            return _part(stored, split) if isinstance(stored, datasets.DatasetDict) else stored
        files = _parquet_files(path)
        names = [file.removeprefix(path) for file in files]
        if Path(path).is_dir():
            found = datasets.load_dataset("parquet", data_dir=path)
            # Files whose names tell no split are all taken for "train".
            unnamed = list(found) == ["train"] and not any("train" in file for file in names)
            return found["train"] if unnamed else _part(found, split)
        return datasets.load_dataset("parquet", data_files=files, split="train")
    except (OSError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
        if isinstance(error, UserError):
            raise
        reason = " ".join(str(error.__cause__ or error).split())[:300]
        raise UserError(f"huggingface={path}: cannot be read ({reason})") from error


def _part(parts: Any, split: str) -> Rows:
    if split not in parts:
        raise UserError(f"split={split}: must be one of {', '.join(parts)}")
    return parts[split]


def _is_stored(path: str) -> bool:
    return any((Path(path) / name).is_file() for name in ("dataset_dict.json", "state.json"))


def _files(path: str) -> list[Path]:
    """That hold the data."""
    if _is_stored(path):
        return sorted(Path(path).rglob("*.arrow"), key=str)
    return [Path(file) for file in _parquet_files(path)]


def _parquet_files(path: str) -> list[str]:
    """Those that a file, a folder or a glob names, sorted."""
    pattern = f"{glob.escape(path)}/**/*.parquet" if Path(path).is_dir() else path
    files = [file for file in sorted(glob.glob(pattern, recursive=True)) if Path(file).is_file()]
    if not files:
        raise UserError(
            f"huggingface={path}: must be parquet files, or a folder of them or of save_to_disk"
        )
    return files


def _column(found: list[str], columns: list[str], usual: tuple[str, ...], name: str) -> str:
    """The column that is meant: the only one ``found`` by its type, or one with a usual name."""
    if len(found) == 1:
        return found[0]
    named = next((column for column in usual if column in (found or columns)), None)
    if named is None:
        raise UserError(f"{name}: must be given, one of {', '.join(found or columns)}")
    return named


def _label_column(found: list[str], columns: list[str], image: str) -> str:
    """As `_column`; a data set of images alone has none."""
    if columns == [image]:
        raise UserError(
            f"label_column: there is none beside {image}; --unlabelled takes images without labels"
        )
    return _column(found, columns, LABEL_COLUMNS, "label_column")


class HuggingFaceImages(Images):
    """The rows of a data set.

    Args:
        path: A parquet file, a glob of some, a folder of some, or a folder of ``save_to_disk``.
        split: The part that is meant where there are several: of a stored ``DatasetDict``, or of a
            folder whose file names begin with splits. Files and globs are taken whole.
        image_column: Its name; None finds it by its type or a usual name.
        label_column: The same.
        unlabelled: Look for no labels: all images are of one class without a name.

    Raises:
        UserError: ``datasets`` is not installed, there is no such thing, no such columns, or a row
            without a label.
    """

    def __init__(
        self,
        path: str,
        split: str,
        image_column: str | None,
        label_column: str | None,
        *,
        unlabelled: bool = False,
    ) -> None:
        rows = _load(path, split)
        from datasets import ClassLabel, Image

        types = dict(rows.features)
        pictures = [name for name, kind in types.items() if isinstance(kind, Image)]
        labels = [name for name, kind in types.items() if isinstance(kind, ClassLabel)]
        for given, name in ((image_column, "image_column"), (label_column, "label_column")):
            if given is not None and given not in types:
                raise UserError(f"{name}={given}: must be one of {', '.join(types)}")
        image = image_column or _column(pictures, list(types), IMAGE_COLUMNS, "image_column")
        if unlabelled:
            label, self.labels, self.classes = "", np.zeros(len(rows), np.int64), []
        else:
            label = label_column or _label_column(labels, list(types), image)
            names = types[label].names if isinstance(types[label], ClassLabel) else []
            self.labels, self.classes = _labels(rows, label, list(names or []))
        try:
            self.rows = rows.select_columns([image]).cast_column(image, Image(decode=False))
        except (TypeError, ValueError, NotImplementedError) as error:
            raise UserError(
                f"image_column={image}: must hold images, not {types[image]}"
            ) from error
        self.column = image
        self.identity = {
            "source": "huggingface",
            "image_column": image,
            "label_column": label,
            "labels": digest([*self.classes, self.labels.tobytes().hex()]),
            "files": digest(f"{file.name} {file.stat().st_size}" for file in _files(path)),
        }
        self.notes = []
        if unlabelled:
            without_labels(self)

    def name(self, index: int) -> str:
        return f"row {index}"

    def content(self, index: int) -> bytes:
        stored = self.rows[index][self.column] or {}
        if stored.get("bytes") is not None:
            return stored["bytes"]
        if stored.get("path"):
            return Path(stored["path"]).read_bytes()
        raise OSError("no image")


def _labels(rows: Rows, column: str, names: list[str]) -> tuple[np.ndarray, list[str]]:
    """Labels (N,) int64, and the names of the classes: those given, or the texts in the column."""
    values = rows.select_columns([column]).with_format("arrow")[:][column].to_pylist()
    missing = next((i for i, value in enumerate(values) if value is None), None)
    if missing is not None:
        raise UserError(f"label_column={column}: must have no gaps, row {missing} has no label")
    if values and all(isinstance(value, str) for value in values):
        names = sorted(set(values))
        place = {name: i for i, name in enumerate(names)}
        values = [place[value] for value in values]
    if not all(type(value) in (int, bool) for value in values):
        raise UserError(f"label_column={column}: must hold whole numbers, truths or texts")
    _check_labels(values, names)
    if not values:
        raise UserError(f"label_column={column}: must hold rows, there are none")
    return np.array(values, np.int64), names


def _check_labels(labels: list[int], classes: list[str]) -> None:
    """Refuse labels that are no classes; of any size, and names of classes if they have some."""
    number = len(classes) or MOST_CLASSES
    for row, label in enumerate(labels):
        if not 0 <= label < number:
            allowed = "at least 0" if label < 0 else f"in [0, {number - 1}]"
            raise UserError(f"label={label}: must be {allowed} (row {row})")


# ---- torchvision

SPLITS = {
    "CIFAR10": ("train", "test"),
    "CIFAR100": ("train", "test"),
    "MNIST": ("train", "test"),
    "ImageNet": ("train", "val"),
}


def torchvision_images(name: str, root: Path, split: str, *, download: bool) -> Images:
    """A data set by its name.

    Args:
        name: One of ``SPLITS``.
        root: Folder that torchvision reads, and downloads to.
        split: One of its splits.
        download: Fetch it if it is missing; ImageNet has to be fetched by hand.
    """
    if split not in SPLITS[name]:
        raise UserError(f"split={split}: must be one of {', '.join(SPLITS[name])} for {name}")
    if name == "ImageNet" and download:
        raise UserError("download: not for ImageNet; put its archives, unpacked or not, in --root")
    from torchvision import datasets  # takes seconds to import

    try:
        if name == "ImageNet":
            return ImageFiles(datasets.ImageNet(root, split=split), split)
        kind = getattr(datasets, name)
        return ImageArrays(kind(root, train=split == "train", download=download), split)
    except (RuntimeError, OSError) as error:
        hint = "" if download or name == "ImageNet" else "; --download fetches it"
        reason = " ".join(str(error).split()).partition(". You can use")[0]
        raise UserError(f"root={root}: must hold {name}{hint} ({reason})") from error


class ImageArrays(Images):
    """A part of a data set that torchvision holds in memory: CIFAR-10, CIFAR-100, MNIST."""

    def __init__(self, dataset: Any, split: str) -> None:
        self.pixels = np.asarray(dataset.data)
        self.labels = np.asarray(dataset.targets, np.int64)
        self.classes, self.notes = list(dataset.classes), []
        files = digest([self.labels.tobytes().hex()])
        self.identity = {"source": type(dataset).__name__, "part": split, "files": files}

    def name(self, index: int) -> str:
        return f"image {index}"

    def content(self, index: int) -> bytes:
        # A format without compression, which no shard holds: `Conversion` encodes it, once.
        file = io.BytesIO()
        Image.fromarray(self.pixels[index]).save(file, "ppm")
        return file.getvalue()


class ImageFiles(Images):
    """A part of a data set of files: ImageNet."""

    def __init__(self, dataset: Any, split: str) -> None:
        self.folder = Path(dataset.split_folder)
        self.files = [str(Path(path).relative_to(self.folder)) for path, _ in dataset.samples]
        self.labels = np.array(dataset.targets, np.int64)
        self.classes, self.notes = [", ".join(names) for names in dataset.classes], []
        files = digest(self.files)
        self.identity = {"source": type(dataset).__name__, "part": split, "files": files}

    def name(self, index: int) -> str:
        return self.files[index]

    def content(self, index: int) -> bytes:
        return (self.folder / self.files[index]).read_bytes()


# ---- shards


class ShardSource(Source):
    """One shard per shard, with the same keys in the same order; fields but image and label go.

    Args:
        urls: Path, glob or brace pattern of the shards; ``classes.txt`` may lie beside them.
        unlabelled: Read no labels: all images are of one class without a name.

    Raises:
        UserError: It names no shard.
    """

    def __init__(self, urls: str, *, unlabelled: bool = False) -> None:
        self.paths, self.unlabelled = local_shards(urls, "shards"), unlabelled
        names = self.paths[0].parent / CLASSES
        self.classes = (
            names.read_text("utf-8", "surrogateescape").splitlines() if names.is_file() else []
        )
        files = [f"{path.name} {path.stat().st_size}" for path in self.paths]
        self.identity = {"source": "shards", "files": digest(files)}
        self.notes = []
        if unlabelled:
            self.classes, self.identity = [], self.identity | {"unlabelled": True}

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, shard: int) -> Iterator[Item]:
        path = self.paths[shard]
        for sample in read_shard(path):
            number = len(self.classes) or MOST_CLASSES
            content, label = encoded_image(sample, path, number, unlabelled=self.unlabelled)
            key = sample["__key__"]
            yield Item(key, label, f"{path.name} {key}", functools.partial(bytes, content))
