"""One process per device; each takes the next shard of a common list when it has done one."""

import signal
from collections.abc import Iterator
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import NamedTuple

from w2s_train.errors import UserError
from w2s_train.latents.encode import Encoder, Facts, Settings, Task
from w2s_train.latents.locks import remove_leftovers


class Progress(NamedTuple):
    """Images done since the last message, and whether the shard is."""

    images: int
    finished: bool


def work(connection: Connection, settings: Settings, device: str) -> None:
    """What a process does: load, then encode the shards that it is sent.

    It sends `Facts` first, then `Progress`; a `UserError` or an OSError instead of either ends it.
    """
    try:
        encoder = Encoder(settings, device)
        connection.send(encoder.facts)
        while True:
            for images in encoder.encode_shard(connection.recv()):
                connection.send(Progress(images, finished=False))
            connection.send(Progress(0, finished=True))
    except (EOFError, ConnectionError):  # the command has ended
        return
    except (UserError, OSError) as error:
        connection.send(error)


class Worker:
    """A process, seen from the command."""

    def __init__(self, settings: Settings, device: str) -> None:
        context = get_context("spawn")  # CUDA cannot be used after a fork
        self.device = device
        self.connection, theirs = context.Pipe()
        self.process: BaseProcess = context.Process(
            target=work, args=(theirs, settings, device), daemon=True
        )
        self.process.start()
        theirs.close()  # so that the end of the process is the end of the stream
        self.task: Task | None = None

    def give(self, task: Task) -> None:
        """Send it a shard to encode."""
        self.task = task
        try:
            self.connection.send(task)
        except BrokenPipeError:
            raise self._death() from None

    def facts(self) -> Facts:
        """Wait until it has loaded the autoencoder."""
        facts = self._receive()
        assert isinstance(facts, Facts)
        return facts

    def progress(self) -> Progress:
        """Wait for its next batch, or the end of its shard."""
        progress = self._receive()
        assert isinstance(progress, Progress)
        return progress

    def _receive(self) -> Facts | Progress:
        """Wait for its next message.

        Raises:
            UserError: Its own, or it has died.
            OSError: Its own.
        """
        try:
            message = self.connection.recv()
        except (EOFError, OSError):
            raise self._death() from None
        if isinstance(message, (UserError, OSError)):
            raise message
        return message

    def _death(self) -> UserError:
        self.process.join()
        doing = self.task.source if self.task else "loading the autoencoder"
        return UserError(
            f"device={self.device}: its process must live, but ended with code "
            f"{self.process.exitcode} at {doing}; finished shards are kept"
        )

    def end(self) -> None:
        """End the process, and delete what it was writing."""
        self.process.terminate()
        self.process.join(10)
        if self.process.is_alive():  # a driver may hold it
            self.process.kill()
            self.process.join()
        self.connection.close()
        if self.task is not None:
            remove_leftovers(self.task.target)


class Workers:
    """A context manager: processes that encode, one per device, with `Encoder`'s ``run``.

    Args:
        settings: For each of them.
        devices: One name per process.

    Raises:
        UserError: Of any process, also that it has died.
        OSError: Of any process.
    """

    def __init__(self, settings: Settings, devices: list[str]) -> None:
        self.settings, self.devices = settings, devices
        self.workers: list[Worker] = []

    def __enter__(self) -> "Workers":
        # Ctrl-C reaches the processes as well; the command ends them, so they ignore it from birth.
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            self.workers = [Worker(self.settings, device) for device in self.devices]
        finally:
            signal.signal(signal.SIGINT, before)
        try:
            self.facts = [worker.facts() for worker in self.workers][0]
        except BaseException:
            self.end()
            raise
        return self

    def run(self, tasks: list[Task]) -> Iterator[int]:
        """Encode shards; yields the number of images of each batch that is done."""
        waiting = list(reversed(tasks))
        busy: dict[Connection, Worker] = {}
        for worker in self.workers[: len(tasks)]:
            worker.give(waiting.pop())
            busy[worker.connection] = worker
        while busy:
            for connection in wait(list(busy)):
                worker = busy[connection]  # type: ignore[index]
                progress = worker.progress()
                yield progress.images
                if progress.finished:
                    worker.task = None
                    if waiting:
                        worker.give(waiting.pop())
                    else:
                        del busy[connection]  # type: ignore[arg-type]

    def end(self) -> None:
        """End all processes."""
        for worker in self.workers:
            worker.end()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.end()
