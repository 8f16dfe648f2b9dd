"""Every score of a tuning, in ``state.jsonl``: the first line says what is searched."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import Timeout

from w2s_train.errors import UserError
from w2s_train.files import atomic_write, locked
from w2s_train.secrets import redacted
from w2s_train.tune.evaluator import Scored


def check_name(name: str) -> None:
    """Refuse one that is no folder's."""
    if Path(name).name != name or name in (".", ".."):
        raise UserError(f"name={name}: must be the name of a folder, without /")


@contextlib.contextmanager
def alone(trainer: Any, folder: Path, name: str) -> Iterator[None]:
    """Make a folder, and keep other commands out of it; UserError if there is one."""
    with contextlib.ExitStack() as stack:
        if trainer.is_global_zero:
            folder.mkdir(parents=True, exist_ok=True)
            try:
                stack.enter_context(locked(folder / ".lock", 0))
            except Timeout as error:
                raise UserError(f"name={name}: must not be tuned twice at a time") from error
        trainer.strategy.barrier("the folder of the tuning")
        yield


class Ledger:
    """Scores by candidate and seeds, so that a tuning that was stopped goes on.

    Args:
        path: The file; it is replaced whole or not at all.
        about: What all scores depend on, as plain values.
        writes: Whether this process does; the others only remember.

    Raises:
        UserError: The file is of another search, or cannot be read.
    """

    def __init__(self, path: Path, about: dict[str, Any], *, writes: bool) -> None:
        self.path, self.writes = path, writes
        self.about = json.loads(json.dumps(redacted(about)))
        self.lines = list[dict[str, Any]]()
        if not path.is_file():
            return
        try:
            before, *self.lines = map(json.loads, path.read_text("utf-8").splitlines())
            for line in self.lines:
                self._key(line["values"], line["seeds"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: must be a tuning's; remove it") from error
        for key, value in self.about.items():
            if before.get(key) != value:
                raise UserError(
                    f"{key}={_short(value)}: must be {_short(before.get(key))}, as in {path}; "
                    "another --name begins another search"
                )

    def find(self, values: dict[str, Any] | None, seeds: range) -> dict[str, Any] | None:
        """The score of a candidate (None: unguided) on some seeds, if there is one."""
        key = self._key(values, [seeds[0], seeds[-1]])
        return next((e for e in self.lines if self._key(e["values"], e["seeds"]) == key), None)

    def add(self, values: dict[str, Any] | None, seeds: range, score: Scored) -> dict[str, Any]:
        """One more score; gives its line."""
        new = {"values": values, "seeds": [seeds[0], seeds[-1]], **score._asdict()}
        self.lines.append(json.loads(json.dumps(new)))
        if self.writes:
            with atomic_write(self.path) as file:
                for line in (self.about, *self.lines):
                    file.write(json.dumps(line, allow_nan=False).encode() + b"\n")
        return self.lines[-1]

    @staticmethod
    def _key(values: dict[str, Any] | None, seeds: list[int]) -> str:
        return json.dumps([values, seeds], sort_keys=True)


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 100 else f"{text[:100]}..."
