"""Worker processes that read shards: the memory through which they pass batches on, and an end of
waiting for them.

A batch comes from a worker as a file in ``/dev/shm``. Where there is no room for it, torch prints a
traceback in the worker, drops the batch, and waits for it for ever. Here the room is looked at
first, a batch that cannot be passed on comes as a `Lost` one, and the waiting has a limit and hears
signals.
"""

import math
import multiprocessing
import multiprocessing.queues
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from w2s_train.errors import INTERRUPTED, PREEMPTED, Stopped, UserError, one_line
from w2s_train.signals import PREEMPTION, REQUESTS

SHARED = "/dev/shm"
PREFETCH = 2  # batches that each worker is asked for ahead
PAGE, MARGIN = 4096, 2**20  # bytes: of which files have a multiple; beside all batches
POLL = 1.0  # seconds between two looks at signals and workers
GRACE = 5.0  # seconds that a batch may still take when a run is to stop, as one process can save
GRACE_OF_SEVERAL = 15.0  # those of several, of which none can
LARGER = "`docker run --shm-size` makes it larger"


class Lost(NamedTuple):
    """In place of a batch that a worker could not pass on."""

    reason: str


class Late(Stopped):
    """Told to stop while the next batch did not come: the run is between two steps."""


def check_room(batch: int, workers: int, processes: int) -> None:
    """Refuse workers for whose batches there is no room; before any process has started its own.

    Args:
        batch: Bytes of one.
        workers: Of each process.
        processes: Of the run, on this machine.
    """
    if not workers or sys.platform != "linux":
        return
    try:
        free = _free()
        if not os.access(SHARED, os.W_OK):
            raise PermissionError("it cannot be written")
    except OSError as error:
        raise UserError(
            f"data.num_workers={workers}: must be 0 without {SHARED}, through which workers pass "
            f"batches on ({one_line(error)})"
        ) from error
    batch = (batch // PAGE + 2) * PAGE  # a file for images, and one for labels
    needed = processes * ((workers * PREFETCH + 2) * batch + MARGIN)  # one more is used, one comes
    if needed > free:
        most = ((free // processes - MARGIN) // batch - 2) // PREFETCH
        raise UserError(
            f"data.num_workers={workers}: must be {f'at most {most}' if most > 0 else 0}; "
            f"{SHARED}, through which workers pass batches on, has {free:,} bytes free, and "
            f"{processes} x {workers} workers need {needed:,}; {LARGER}"
        )


def _free() -> int:
    state = os.statvfs(SHARED)
    return state.f_bavail * state.f_frsize


def lost_worker(error: RuntimeError, workers: int) -> UserError | None:
    """What torch says when a worker has died, for the user; None of another error."""
    reason = " ".join(str(error).split())
    if "DataLoader worker (pid" not in reason:
        return None
    reason = reason.removesuffix(".").partition(". It is possible")[0]
    rule = "must be fewer, or 0, if memory ran out"
    return UserError(f"data.num_workers={workers}: {rule} ({reason}); {_room()}")


def _room() -> str:
    try:
        return f"{SHARED} has {_free():,} bytes free; {LARGER}"
    except OSError as error:
        return f"{SHARED}: {one_line(error)}"


@dataclass(frozen=True)
class Start:
    """How a worker begins.

    Args:
        patience: Seconds for which its batch is waited for.
    """

    patience: float

    def __call__(self, worker: int) -> None:
        """In the worker."""
        # What is sent to a whole job reaches workers, too; the main process decides when they end.
        for each in (signal.SIGINT, *PREEMPTION):
            signal.signal(each, signal.SIG_IGN)
        multiprocessing.queues.Queue._on_queue_feeder_error = _lose  # type: ignore[attr-defined]


def _lose(queue: Any, error: Exception, item: Any) -> None:
    """In place of what Python does when an item cannot be sent: it says so, and drops it."""
    number, _ = item  # of the batch, and the batch
    queue.put((number, Lost(one_line(error))))


class Batches(DataLoader[Any]):
    """A loader of batches that are items of a data set; see `batches`."""

    waited = 0.0  # seconds in which the loop had no batch

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """The batches; workers start here."""
        try:
            found = super().__iter__()
        except OSError as error:  # of the system, whose processes, files or semaphores are limited
            raise UserError(
                f"data.num_workers={self.num_workers}: must be fewer, or 0; they cannot be started "
                f"({one_line(error)})"
            ) from error
        return self._timed(self._awaited(found) if self.num_workers else found)

    def _timed(self, found: Iterator[Any]) -> Iterator[Any]:
        """The batches; the time in which they are waited for is added up."""
        while True:
            began = time.monotonic()
            batch = next(found, None)
            self.waited += time.monotonic() - began
            if batch is None:
                return
            yield batch

    def _awaited(self, found: Iterator[Any]) -> Iterator[Any]:
        workers = multiprocessing.active_children()
        try:
            while True:
                try:
                    batch = self._next(found)
                except StopIteration:
                    return
                if isinstance(batch, Lost):
                    raise UserError(
                        f"data.num_workers={self.num_workers}: must be fewer, or 0; a worker could "
                        f"not pass a batch on ({batch.reason}); {_room()}"
                    )
                yield batch
        except (UserError, Stopped):
            _kill(workers)  # else each that is stuck is waited for
            raise

    def _next(self, found: Iterator[Any]) -> Any:
        began, asked = time.monotonic(), math.inf
        grace = GRACE_OF_SEVERAL if torch.distributed.is_initialized() else GRACE
        patience = self.worker_init_fn.patience  # type: ignore[union-attr]
        while True:
            try:
                return next(found)
            except RuntimeError as error:
                if lost := lost_worker(error, self.num_workers):
                    raise lost from error
                if not str(error).startswith("DataLoader timed out"):
                    raise
            now = time.monotonic()
            if REQUESTS.preempted or REQUESTS.interrupted:
                asked = min(asked, now)
            if now - asked > grace:
                status = PREEMPTED if REQUESTS.preempted else INTERRUPTED
                raise Late(f"told to stop; no batch came for {now - began:.0f} s", status)
            if now - began > patience:
                raise UserError(
                    f"data.batch_timeout_minutes={patience / 60:g}: no batch came for so long from "
                    f"the workers; must be longer if the data are so slow to come; "
                    f"data.num_workers=0 does without workers; {_room()}"
                )


def _kill(workers: Sequence[Any]) -> None:
    """End workers that may be stuck; no signal but this one reaches them."""
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise an error
    for worker in workers:
        worker.kill()
    for worker in workers:
        worker.join(1)
    signal.signal(signal.SIGCHLD, before)


def batches(
    items: Dataset[Any],
    places: Sampler[Any] | Sequence[Any],
    workers: int,
    *,
    minutes: float,
    pin: bool = False,
) -> Batches:
    """A loader of items that are batches.

    Args:
        items: Whole batches, by their places.
        places: Of the batches, in their order.
        workers: Processes that read them; 0 reads in this one.
        minutes: After which a batch that workers should bring is no longer waited for.
        pin: In memory that a CUDA device reads by itself.
    """
    return Batches(
        items,
        batch_size=None,
        sampler=places,
        num_workers=workers,
        prefetch_factor=PREFETCH if workers else None,
        timeout=POLL if workers else 0,
        pin_memory=pin,
        worker_init_fn=Start(60 * minutes),
    )
