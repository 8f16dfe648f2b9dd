"""Writes shards in several processes that end when their parent does."""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool

from tqdm import tqdm

from w2s_train.errors import UserError

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
