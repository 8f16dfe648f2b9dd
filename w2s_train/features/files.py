"""Weights on disk: found, fetched once, and named by their content."""

import os
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from w2s_train.errors import UserError
from w2s_train.files import sha256_of


def require_file(weights: Path) -> None:
    """Refuse a path that is no file.

    Raises:
        UserError: No such file.
    """
    if not weights.is_file():
        raise UserError(f"weights={weights}: must be an existing file")


def fetched(target: Path, download: Callable[[Path], object]) -> Path:
    """``target``, downloaded first where it is missing; whole or not at all.

    Args:
        target: Where the file is kept.
        download: Writes the file ``target.name`` into the folder that it is given.

    Raises:
        UserError: The download failed.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):  # one process of several fetches
        if not target.is_file():
            folder = target.parent / "partial"
            folder.mkdir(exist_ok=True)
            (folder / target.name).unlink(missing_ok=True)
            try:
                download(folder)
            except (OSError, RuntimeError) as error:  # of network or disk; a wrong hash
                raise UserError(
                    f"weights=None: must be a local {target.name} where it cannot be fetched "
                    f"({error})"
                ) from error
            os.replace(folder / target.name, target)
    return target


def digest(weights: Path) -> str:
    """The first 12 hexadecimal digits of the file's sha256."""
    return sha256_of(weights)[:12]
