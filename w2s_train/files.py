"""Files that appear under their name when they are whole, or not at all, and locks."""

import contextlib
import errno
import fcntl
import hashlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from filelock import FileLock

from w2s_train.errors import UserError

# Errors that a user can mend: no room, no permission.
OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)
# What flock(2) says where a file system has no locks, such as some mounts of NFS and Lustre.
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOTTY)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Errors of reading or writing say which file it was: a full disk alone does not."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """A binary file to write to, which becomes ``path`` when the block ends without an error.

    It is kept in the same folder until then: a rename across file systems is a copy, which a kill
    can cut short.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with naming(path), open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        _sync_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(path: Path, seconds: float = -1) -> Iterator[bool]:
    """Keep others out for the length of a block; gives whether that could be done.

    Where the file system cannot lock, a warning says so, and the block goes on alone: what it
    writes is written whole or not at all. It must not delete what others may be writing.

    Args:
        path: A file that stands for what is locked; it stays.
        seconds: How long to wait for another holder; -1 is for ever.

    Raises:
        filelock.Timeout: Another one has held it all the time.
    """
    if reason := _no_locks(path):
        warnings.warn(
            f"{path.parent}: this file system cannot lock ({reason}); no lock was taken, so start "
            "nothing else that writes there",
            stacklevel=3,
        )
        yield False
        return
    with FileLock(path, timeout=seconds):
        yield True


def _no_locks(path: Path) -> str:
    """Why there are no locks; empty where there are, and where the lock itself will tell more.

    Versions of filelock differ in what they do then: they wait for ever, or leave a file behind
    that a killed process does not take away.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError:
        return ""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return os.strerror(error.errno) if error.errno in NO_LOCKS else ""
    finally:
        os.close(descriptor)
    return ""


def expanded(name: str, path: str | Path) -> Path:
    """A path whose ``~`` is the user's home.

    Args:
        name: Of the setting.
        path: Its value.

    Raises:
        UserError: There is no such home.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(
            f"{name}={path}: must do without ~: this user has no home folder"
        ) from error


def sha256_of(path: Path) -> str:
    """Of a file's content, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_folder(folder: Path) -> None:
    """Force a rename to the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
