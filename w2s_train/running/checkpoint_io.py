"""Lightning's way to our checkpoint files: written by a thread, verified when read."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lightning.fabric.plugins import CheckpointIO

from w2s_train.checkpoint_file import read_file, remove, to_host, write_checkpoint

# Parts of `Run` that were callbacks of their own, and had states of their own.
ONCE = {"Guard": "guard", "SkippedSamples": "samples"}


class CheckpointFiles(CheckpointIO):
    """Training waits for the copy to host memory, and the disk for nobody.

    One checkpoint is written at a time: a save that comes before the last one is on the disk waits
    for it. Errors of writing are what `finished` gives.
    """

    def __init__(self) -> None:
        self.executor: ThreadPoolExecutor | None = None
        self.writing: Future[None] | None = None

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """Copy ``checkpoint`` to host memory, and have it written.

        Args:
            checkpoint: Nested tensors and plain values.
            path: Where to.
            storage_options: Called without arguments when the file is there, by the thread.
        """
        if self.writing is not None:
            self.writing.exception()
        if self.executor is None:
            self.executor = ThreadPoolExecutor(1, "checkpoint")
        after: Callable[[], None] | None = storage_options
        content = to_host(checkpoint)
        self.writing = self.executor.submit(_write, content, Path(path), after)

    def finished(self, *, wait: bool = False) -> BaseException | None:
        """The error of the last write, once; None if there was none, or it is still under way."""
        if self.writing is None or not (wait or self.writing.done()):
            return None
        error, self.writing = self.writing.exception(), None
        return error

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """The content, in host memory and in today's form, if nothing is wrong with the file."""
        content = read_file(path)
        states = content.get("callbacks", {})
        if old := {part: states.pop(name) for name, part in ONCE.items() if name in states}:
            states["Run"] = old
        return content

    def remove_checkpoint(self, path: Any) -> None:
        """Delete it."""
        remove(Path(path))

    def teardown(self) -> None:
        """Wait for what is being written."""
        if self.executor is not None:
            self.executor.shutdown()
            self.executor = None
        if error := self.finished(wait=True):
            raise error


def _write(content: dict[str, Any], path: Path, after: Callable[[], None] | None) -> None:
    write_checkpoint(content, path)
    if after is not None:
        after()
