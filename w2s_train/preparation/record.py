"""What an output folder says of a preparation: its settings, the classes, what was skipped."""

import json
import os
from pathlib import Path
from typing import Any

from w2s_train.errors import UserError
from w2s_train.files import atomic_write
from w2s_train.shards.writer import CLASSES, INDEX

DIGESTS = ("files", "labels")  # settings whose values say nothing to a reader


def check_settings(output: Path, split: str, settings: dict[str, Any]) -> None:
    """Refuse a folder whose shards of this split come from elsewhere or from other settings.

    Raises:
        UserError: Says which, and how to go on.
    """
    path = output / f"{split}.preparation.json"
    ways = f"another --output or --split, or delete {output}/{split}-* and {path.name} there"
    made = sorted(output.glob(f"{split}-*.tar*"))
    if not made:
        return
    if not path.is_file():
        raise UserError(
            f"output={output}: holds {made[0].name}, which this command did not make; "
            f"must be {ways}"
        )
    try:
        there = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"output={output}: {path.name} cannot be read ({error})") from error
    names = sorted(name for name in {*there, *settings} if there.get(name) != settings.get(name))
    if names:
        differ = ", ".join(
            f"other {name}"
            if name in DIGESTS
            else f"{name} {there.get(name)}, not {settings.get(name)}"
            for name in names
        )
        raise UserError(
            f"output={output}: its {split} shards were made with {differ}; must be {ways}"
        )


def write_settings(output: Path, split: str, settings: dict[str, Any]) -> None:
    """Write what `check_settings` compares with."""
    with atomic_write(output / f"{split}.preparation.json") as file:
        file.write(json.dumps(settings, indent=1).encode() + b"\n")


def check_classes(output: Path, classes: list[str]) -> None:
    """Refuse a folder that has other classes, and names that are no lines.

    Raises:
        UserError: Says which.
    """
    for name in classes:
        if len(name.splitlines()) != 1:
            raise UserError(f"class={name!r}: must be one line, for {CLASSES}")
    path = output / CLASSES
    if classes and path.is_file():
        there = path.read_text("utf-8", "surrogateescape").splitlines()
        if there != classes:
            differ = _differing(there, classes)
            raise UserError(
                f"output={output}: {CLASSES} must name the same classes; it has {differ}"
            )


def _differing(there: list[str], now: list[str]) -> str:
    if len(there) != len(now):
        return f"{len(there)}, these are {len(now)}"
    place = next(i for i, (a, b) in enumerate(zip(there, now, strict=True)) if a != b)
    return f"{there[place]!r} where these have {now[place]!r}"


def write_classes(output: Path, classes: list[str]) -> None:
    """Write the names, one a line; none if they are not known."""
    if classes:
        with atomic_write(output / CLASSES) as file:
            file.write("".join(f"{name}\n" for name in classes).encode(errors="surrogateescape"))


def write_skipped(output: Path, split: str, lines: list[str]) -> Path:
    """List what was skipped, one image a line; without any there is no such file."""
    path = output / f"{split}.skipped.txt"
    if lines:
        with atomic_write(path) as file:
            file.write("".join(f"{line}\n" for line in lines).encode(errors="surrogateescape"))
    else:
        path.unlink(missing_ok=True)
    return path


def remove_partials(output: Path, split: str) -> None:
    """Remove what dead runs of this split left; the caller holds its lock."""
    found = [*output.glob(f"{split}-*.partial"), *output.glob(f"{split}.*.partial")]
    for name in (CLASSES, INDEX):  # a run of another split may be writing them
        found += [path for path in output.glob(f"{name}.*.partial") if not _runs(path)]
    for path in found:
        path.unlink(missing_ok=True)


def _runs(partial: Path) -> bool:
    """Whether the process that writes ``NAME.PROCESS.partial`` is there."""
    try:
        os.kill(int(partial.name.split(".")[-2]), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # somebody else's
    return True
