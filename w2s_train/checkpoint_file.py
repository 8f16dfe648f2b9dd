"""Checkpoint files that a kill, a full disk or a flipped bit cannot pass off as good.

A file is written beside its place, forced to the disk and renamed; its SHA-256 stands in
``NAME.sha256`` (as `sha256sum -c` reads it) and is compared before anything of the file is used.
Only tensors and plain values are ever loaded: nothing in a file can run.
"""

import errno
import functools
import hashlib
import os
import shutil
import sys
import zipfile
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from w2s_train.errors import UserError
from w2s_train.files import atomic_write, sha256_of

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no room, as opposed to other errors


class _Hashed:
    """A file to `torch.save` into, which hashes what passes.

    The error of a full disk is kept and not raised into torch's C++ writer, which would write on
    while it is being torn down.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.digest = file, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        """Take ``data`` in."""
        if self.error is None:
            try:
                self.file.write(data)
                self.digest.update(data)
            except OSError as error:
                self.error = error
        return len(data)

    def flush(self) -> None:
        """Nothing: who opened the file flushes it."""


def digest_file(path: Path) -> Path:
    """Where the SHA-256 of a checkpoint stands."""
    return path.with_name(path.name + ".sha256")


@torch.no_grad()
def to_host(content: Any) -> Any:
    """A copy of nested values whose tensors are in host memory, and no longer change."""
    return tree_map_only(Tensor, lambda x: x.to("cpu", copy=True), content)


def write_checkpoint(content: Any, path: Path) -> None:
    """Write nested tensors and plain values under ``path``, whole or not at all.

    Raises:
        OSError: It cannot be written; of a full disk with the bytes that are needed. An earlier
            file of this name is intact then, and nothing else is left.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with atomic_write(path) as file:
            hashed = _Hashed(file)
            torch.save(content, cast(IO[bytes], hashed))
            if hashed.error is not None:
                raise hashed.error
            new = hashed.digest.hexdigest()
            # While the file is exchanged, both digests are good ones.
            _write_digests(path, {*_digests(path), new})
        _write_digests(path, {new})
    except OSError as error:
        if error.errno not in FULL:
            raise
        tensors = [x for x in tree_leaves(content) if isinstance(x, Tensor)]
        needed = sum(x.numel() * x.element_size() for x in tensors)
        free = shutil.disk_usage(path.parent).free
        reason = f"{error.strerror}: {needed:,} bytes are needed, {free:,} are free"
        raise OSError(error.errno, reason, str(path)) from error


def _write_digests(path: Path, digests: set[str]) -> None:
    with atomic_write(digest_file(path)) as file:
        file.write("".join(f"{digest}  {path.name}\n" for digest in sorted(digests)).encode())


def _digests(path: Path) -> set[str]:
    """The digests that stand beside a file; none if there is no such file."""
    beside = digest_file(path)
    if not beside.is_file():
        return set()
    return {
        line.split()[0] for line in beside.read_text(errors="replace").splitlines() if line.strip()
    }


def damage(path: Path) -> str:
    """What is wrong with a checkpoint file, "" if nothing is.

    One without a digest beside it, such as a copy, is judged by the checksums inside it.
    """
    path = path.resolve()
    if not path.is_file():
        return "it is missing"
    stat = path.stat()
    if stat.st_size == 0:
        return "it is empty"
    digests = frozenset(_digests(path)) if digest_file(path).is_file() else None
    return _damage(path, digests, stat.st_mtime_ns, stat.st_size, stat.st_ino)


@functools.lru_cache(maxsize=256)
def _damage(path: Path, digests: frozenset[str] | None, *state: int) -> str:
    """`damage` of a file in one state: files are large, and asked about more than once."""
    if digests is not None:
        return "" if sha256_of(path) in digests else "its SHA-256 is another"
    try:
        with zipfile.ZipFile(path) as archive:
            first = archive.testzip()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        return f"it is no whole file ({' '.join(str(error).split())})"
    return f"its part {first} is damaged" if first else ""


def check_local(path: str, name: str) -> None:
    """Refuse a checkpoint of the net: what a file holds is trusted as far as who can write it.

    Raises:
        UserError: It is a URL.
    """
    if "://" in path or path.startswith(("http:", "https:", "file:")):
        raise UserError(f"{name}={path}: must be a local file, and no URL")


def _is_foreign(path: Path) -> bool:
    """Whether a file holds no checksums at all, as those of other programs do."""
    return not digest_file(path.resolve()).is_file() and not zipfile.is_zipfile(path)


def read_file(path: str | Path, *, mmap: bool = False) -> dict[str, Any]:
    """The dict of a file: tensors, in host memory, and plain values; nothing else is loaded.

    Args:
        path: Of the file.
        mmap: Read tensors when they are looked at, for who wants the plain values.

    Raises:
        UserError: A URL, or a file that is missing, damaged, or something else.
    """
    check_local(str(path), "path")
    if not Path(path).is_file():
        raise UserError(f"path={path}: must be an existing file")
    if not _is_foreign(Path(path)) and (problem := damage(Path(path))):
        raise UserError(f"path={path}: must be a whole checkpoint; {problem}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # of many types: what a broken pickle raises depends on its bytes
        raise UserError(
            f"path={path}: cannot be read ({type(error).__name__}); must be a whole checkpoint"
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"path={path}: must hold a dict, such as a state dict")
    return content


def point_to(link: Path, target: Path) -> None:
    """Make ``link`` another name of ``target``, in the same folder, at once."""
    partial = link.with_name(f"{link.name}.{os.getpid()}.partial")
    partial.unlink(missing_ok=True)
    partial.symlink_to(target.name)
    os.replace(partial, link)


def remove(path: Path) -> None:
    """Delete a checkpoint and its digest."""
    path.unlink(missing_ok=True)
    digest_file(path).unlink(missing_ok=True)


def step_of(path: Path) -> int:
    """The step of ``step-NNNNNN.ckpt``; -1 for a file of another name."""
    number = path.stem.removeprefix("step-")
    return int(number) if number.isdecimal() and number != path.stem else -1


def newest_first(folder: Path) -> list[Path]:
    """The checkpoints of a folder: what ``last.ckpt`` is first, then by their steps.

    Steps beyond the last one come after those before it: they are of a part of the run that was
    given up. (Times of writing would say more, but a copied folder has those of the copy.)
    """
    files = [path for path in folder.glob("*.ckpt") if path.is_file() and not path.is_symlink()]
    last = (folder / "last.ckpt").resolve()
    limit = step_of(last) if last.name != "last.ckpt" else sys.maxsize

    def rank(path: Path) -> tuple[bool, bool, int, int]:
        step = step_of(path)
        return path.resolve() == last, step <= limit, step, path.stat().st_mtime_ns

    return sorted(files, key=rank, reverse=True)


def read_checkpoint(path: str) -> dict[str, Any]:
    """The content of a checkpoint of ours.

    Raises:
        UserError: A file that is missing, truncated, or no checkpoint of ours.
    """
    content = read_file(path)
    if not isinstance(content.get("state_dict"), dict) or "network" not in content:
        raise UserError(f"path={path}: must be a checkpoint of w2s_train")
    return content
