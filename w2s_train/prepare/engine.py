"""Writes shards: in processes, again after an interruption, and never one of them twice.

The scripts hand it their work: `w2s_train.prepare.images` makes shards of images, and
`w2s_train.prepare.latents` makes shards of latents of these. A shard appears when it is whole, with
its table beside it, and what it holds depends on its source alone, not on who writes it. A recipe,
a file beside the shards, says what made them; those of two recipes do not go together.
"""

import contextlib
import functools
import glob
import json
import multiprocessing
import os
import signal
import threading
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkContext, SpawnContext
from pathlib import Path
from typing import Any, NamedTuple

from filelock import Timeout

from w2s_train import files
from w2s_train.errors import UserError
from w2s_train.files import atomic_write
from w2s_train.secrets import redacted
from w2s_train.shards.format import ShardWriter

LOCKS = ".locks"  # folder, beside shards that several runs may write at once
STOP = (signal.SIGINT, signal.SIGTERM)

# ---- the recipe


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a file that describes shards, without secrets."""
    with atomic_write(path) as file:
        file.write(json.dumps(redacted(content), indent=1).encode() + b"\n")


def changed(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Names of the settings that are others now than in a recipe that has been read."""
    now = json.loads(json.dumps(redacted(now)))  # which has lists for tuples
    names = dict.fromkeys([*now, *before])
    return [name for name in names if before.get(name) != now.get(name)]


# ---- what is written


@contextlib.contextmanager
def locked(folder: Path, name: str, lock: str, seconds: float) -> Iterator[bool]:
    """Keep other runs from writing something; gives whether that can be done there.

    Args:
        folder: Where it is written.
        name: What it is called.
        lock: Name of a file in the folder that stands for it.
        seconds: How long to wait for another run that is writing it.
    """
    path = folder / lock
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            alone = stack.enter_context(files.locked(path, seconds))
        except Timeout:
            raise UserError(f"output={folder}: another run is writing {name}") from None
        yield alone


def remove_partials(folder: Path, *names: str) -> None:
    """Delete what killed runs left of files, given as patterns; the caller holds their lock."""
    for name in names:
        for path in folder.glob(f"{name}.*.partial"):
            path.unlink(missing_ok=True)


class Task(NamedTuple):
    """A shard to write."""

    source: Any  # what it is made of, as its work knows it: a number, a file
    target: Path
    shared: bool  # others may write into the folder: it has a lock of its own; else the caller has

    @contextlib.contextmanager
    def claimed(self) -> Iterator[None]:
        """Keep others from writing it, and delete what killed ones left of it."""
        folder, name = self.target.parent, self.target.name
        lock: Any = contextlib.nullcontext(True)
        if self.shared:
            lock = locked(folder, name, f"{LOCKS}/{name}.lock", seconds=0)
        with lock as alone:
            if alone:
                remove_partials(folder, glob.escape(self.target.stem))
            yield


class Work(ABC):
    """Writes shards, in the process that has made it."""

    @abstractmethod
    def write(self, source: Any, writer: ShardWriter) -> Iterator[int]:
        """Write what becomes of a source; yields now and then how many images have come since."""


class Progress(NamedTuple):
    """What has been written since the last message."""

    images: int
    shards: int


Written = contextlib.AbstractContextManager[Iterator[Progress]]

# ---- by whom: context managers that give the progress


def here(work: Work, tasks: list[Task]) -> Written:
    """Write shards in this process, one after another."""
    return contextlib.closing(_written(work, tasks))


def in_processes(work: Work, processes: int, tasks: list[Task]) -> Written:
    """Write shards in copies of this process, which has no threads; they share what it holds."""
    killed = (
        f"processes={processes}: one of them was killed, perhaps because memory ran out; the same "
        "command goes on, with fewer --processes if need be"
    )
    starts = [Start(lambda: work, killed)] * min(processes, len(tasks))
    return _processes(starts, multiprocessing.get_context("fork"), tasks)


def on_devices(begin: Callable[[str], Work], devices: list[str], tasks: list[Task]) -> Written:
    """Write shards in one process for each device, spawned: CUDA cannot be used after a fork.

    Args:
        begin: Makes the work of a process, in it, from the name of its device.
        devices: The names.
        tasks: The shards.
    """
    lost = "its process must live, but ended with code {code} at {at}; finished shards are kept"
    starts = [Start(functools.partial(begin, each), f"device={each}: {lost}") for each in devices]
    resource_tracker.ensure_running()  # else the first start does that, and lets signals through
    return _processes(starts[: len(tasks)], multiprocessing.get_context("spawn"), tasks)


def _written(work: Work, tasks: list[Task]) -> Generator[Progress, None, None]:
    for task in tasks:
        with task.claimed(), ShardWriter(task.target) as writer:
            for images in work.write(task.source, writer):
                yield Progress(images, 0)
        yield Progress(0, 1)


class Start(NamedTuple):
    """How a process begins."""

    begin: Callable[[], Work]  # in it
    lost: str  # message if it dies, with {code} for its status and {at} for where it was


class _Worker:
    """A process, seen from the command."""

    def __init__(self, start: Start, context: ForkContext | SpawnContext) -> None:
        self.lost = start.lost
        self.task: Task | None = None
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, start.begin), daemon=True)
        self.process.start()
        theirs.close()  # so that the end of the process is the end of the stream

    def give(self, task: Task) -> None:
        """Send it a shard to write."""
        self.task = task
        try:
            self.connection.send(task)
        except ConnectionError:
            raise self._death() from None

    def receive(self) -> Progress:
        """Wait for its next message; raises what the process has raised, or that it has died."""
        try:
            message = self.connection.recv()
        except (EOFError, OSError):
            raise self._death() from None
        if isinstance(message, Exception):
            raise message
        return message

    def _death(self) -> UserError:
        self.process.join()
        at = self.task.source if self.task else "loading"
        return UserError(self.lost.format(code=self.process.exitcode, at=at))

    def end(self) -> None:
        """End it, and delete what it was writing unless another run writes that now."""
        self.process.kill()  # finished shards are on the disk, and nothing else needs care
        self.process.join()
        self.connection.close()
        if self.task is not None:
            with contextlib.suppress(UserError), self.task.claimed():
                pass


@contextlib.contextmanager
def _processes(
    starts: list[Start], context: ForkContext | SpawnContext, tasks: list[Task]
) -> Iterator[Iterator[Progress]]:
    workers: list[_Worker] = []
    try:
        with _signals_wait():
            for start in starts:
                workers.append(_Worker(start, context))
        for worker in workers:
            worker.receive()  # it has made its work
        yield _dealt(tasks, workers)
    finally:  # on an interrupt, too: nobody waits for shards that are half done
        for worker in workers:
            worker.end()


def _dealt(tasks: list[Task], workers: list[_Worker]) -> Iterator[Progress]:
    """Each process is given the next shard when it has done one."""
    waiting, idle, busy = tasks[::-1], workers[::-1], dict[Any, _Worker]()
    while waiting or busy:
        while waiting and idle:
            worker = idle.pop()
            busy[worker.connection] = worker
            worker.give(waiting.pop())
        for connection in wait(list(busy)):
            progress = busy[connection].receive()
            if progress.shards:
                idle.append(busy.pop(connection))
                idle[-1].task = None
            yield progress


@contextlib.contextmanager
def _signals_wait() -> Iterator[None]:
    """Signals that end the command do so when the block has ended.

    During a fork, Python prints what a handler raises, and goes on. Here handlers only take note:
    blocking signals is not enough, since any other thread may receive them. Processes are born with
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


def _serve(connection: Connection, begin: Callable[[], Work]) -> None:
    """What a process does: it makes its work, and writes the shards that it is sent.

    It sends `Progress`, none when it is ready; an exception instead is its last message.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C; the command decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP)
    threading.Thread(target=_end_with_command, daemon=True).start()
    try:
        work = begin()
        connection.send(Progress(0, 0))
        while True:
            for progress in _written(work, [connection.recv()]):
                connection.send(progress)
    except Exception as error:
        error.add_note(f"in a process of its own: {traceback.format_exc()}")
        with contextlib.suppress(ConnectionError):  # the command has ended
            connection.send(error)


def _end_with_command() -> None:
    """Without this, a process whose command was killed goes on, or waits for work forever."""
    command = multiprocessing.parent_process()
    assert command is not None
    command.join()
    os._exit(1)
