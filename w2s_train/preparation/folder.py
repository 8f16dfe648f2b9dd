"""A folder of images with one sub-folder per class."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from w2s_train.errors import UserError
from w2s_train.preparation.base import Images, digest

SUFFIXES = tuple(
    ".png .jpg .jpeg .jpe .jfif .webp .gif .bmp .dib .tif .tiff .ppm .pgm .pbm .pnm .jp2".split()
)


class _Bar(tqdm):
    monitor_interval = 0  # no thread: processes are forked later


class ImageFolder(Images):
    """The images below each sub-folder, however deep; its label is its place among the sorted ones.

    Args:
        path: The folder.

    Raises:
        UserError: It has no sub-folders, or no images in them.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_dir():
            raise UserError(f"folder={path}: must be an existing folder")
        self.path, self.ignored = path, 0
        entries = sorted(os.scandir(path), key=lambda entry: entry.name)
        visible = [entry for entry in entries if not entry.name.startswith(".")]
        self.classes = [entry.name for entry in visible if _is_folder(entry)]
        self.ignored = len(entries) - len(self.classes)
        if not self.classes:
            raise UserError(f"folder={path}: must hold one sub-folder per class, it holds none")
        bar = _Bar(self.classes, "listing", unit="class", delay=5, disable=None, leave=False)
        found = [self._images(name) for name in bar]
        self.files = [name for names in found for name, _ in names]
        if not self.files:
            raise UserError(
                f"folder={path}: must hold images ({' '.join(SUFFIXES)}) in its folders"
            )
        counts = [len(names) for names in found]
        self.labels = np.repeat(np.arange(len(counts)), counts)
        files = (f"{name} {size}" for names in found for name, size in names)
        self.identity = {"source": "folder", "files": digest([*self.classes, *files])}
        self.notes = [f"{self.ignored:,} ignored: hidden, of other types or in no class folder"]

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
            name, hidden = f"{folder}/{entry.name}", entry.name.startswith(".")
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
