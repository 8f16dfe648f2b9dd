"""One process writes a shard at a time, also where the same command runs twice."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from w2s_train.errors import UserError

LOCKS = ".locks"  # folder, beside the shards
SECONDS = 60  # more than writing the files that describe the whole takes


@contextlib.contextmanager
def claim(target: Path) -> Iterator[None]:
    """Keep others from writing a shard, and delete what killed ones left of it.

    Raises:
        UserError: Another run is writing it.
    """
    with _locked(target, seconds=0):
        remove_partials(target)
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


def remove_partials(target: Path) -> None:
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
