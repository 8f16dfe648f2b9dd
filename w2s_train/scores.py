"""What runs leave for other tools: ``scores.json`` (docs/scores.md), and the names of grids.

The run folder: what it holds, and that one run owns it.
"""

import functools
import json
import re
import subprocess
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from filelock import FileLock

from w2s_train.errors import UserError
from w2s_train.files import atomic_write
from w2s_train.secrets import redacted

SCHEMA = 1
HIGHER = ("inception_score", "precision", "recall", "density", "coverage")
LOWER = ("fid", "fd_", "sfid", "kid", "outliers", "energy_distance", "velocity_error")
LARGEST = 1e100  # sums and squares of smaller numbers are finite


@dataclass(frozen=True)
class Kind:
    """What a key may hold.

    Args:
        types: JSON types that are accepted; bool counts as none of them.
        allowed: The same in words, for the message.
        optional: The key may be absent or null.
        least: Smallest number.
    """

    types: tuple[type, ...]
    allowed: str
    optional: bool = False
    least: float = -LARGEST

    def take(self, entry: dict[str, Any], key: str) -> Any:
        """The value of a key.

        Raises:
            UserError: Missing, of another type, not finite or too small.
        """
        value = entry.get(key)
        if value is None and self.optional:
            return None
        good = isinstance(value, self.types) and not isinstance(value, bool) and value != {}
        if isinstance(value, int | float):
            good = good and self.least <= value <= LARGEST
        if not good:
            text = json.dumps(value)
            text = text if len(text) <= 100 else f"{text[:100]}..."
            raise UserError(f"{key}={text}: must be {self.allowed}")
        return value


TEXT = Kind((str,), "a text")
NUMBER = Kind((int, float), "a finite number")
COUNT = Kind((int,), "a whole number of at least 0", least=0)
SECONDS = Kind((int, float), "seconds, at least 0", least=0)
MAYBE_SECONDS = replace(SECONDS, optional=True)
MAYBE_TEXT = replace(TEXT, optional=True)
MAYBE_COUNT = replace(COUNT, optional=True)
MAYBE_NUMBER = replace(NUMBER, optional=True)
REFERENCE = Kind((dict, str), 'a fingerprint: {"dataset": ..., ...}, or the name of a density')
RANGE = Kind((list,), "[first, last], whole numbers, last not below first")
PROTOCOL = Kind((dict,), "an object")


def _key(kind: Kind) -> Any:
    return field(metadata={"kind": kind})


@dataclass(frozen=True)
class Protocol:
    """How a score came about; keys that are not listed here are ignored."""

    sampler: str = _key(TEXT)
    steps: int = _key(COUNT)
    guidance: str = _key(TEXT)
    weights: str = _key(TEXT)
    ema_decay: float | None = _key(MAYBE_NUMBER)
    autoencoder: str = _key(TEXT)
    precision: str = _key(TEXT)
    step: int = _key(COUNT)
    images_seen: int = _key(COUNT)
    metric_settings: str | None = _key(MAYBE_TEXT)
    reference_features: int | None = _key(MAYBE_COUNT)
    extractor: str | None = _key(MAYBE_TEXT)
    reference: dict[str, Any] = _key(REFERENCE)
    n: int = _key(COUNT)
    seeds: tuple[int, int] = _key(RANGE)
    evaluation_seconds: float | None = _key(MAYBE_SECONDS)
    wall_clock_seconds: float = _key(SECONDS)
    training_seconds: float | None = _key(MAYBE_SECONDS)
    git_commit: str | None = _key(MAYBE_TEXT)

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> "Protocol":
        """Check and convert.

        Raises:
            UserError: A key that is missing or cannot be used.
        """
        values = {key.name: key.metadata["kind"].take(entry, key.name) for key in fields(cls)}
        reference, seeds = values["reference"], values["seeds"]
        if isinstance(reference, str):  # of the synthetic study, where the name says everything
            values["reference"] = reference = {"dataset": reference}
        if not reference.get("dataset"):
            raise UserError(f"reference={json.dumps(reference)}: must be {REFERENCE.allowed}")
        if len(seeds) != 2 or any(type(s) is not int for s in seeds) or seeds[0] > seeds[1]:
            raise UserError(f"seeds={json.dumps(seeds)}: must be {RANGE.allowed}")
        values["seeds"] = (seeds[0], seeds[1])
        return cls(**values)


@dataclass(frozen=True)
class Score:
    """One element of ``scores.json``."""

    schema: int = _key(COUNT)
    metric: str = _key(TEXT)
    value: float = _key(NUMBER)
    step: int = _key(COUNT)
    weights: str = _key(TEXT)
    guidance: str = _key(TEXT)
    protocol: Protocol = _key(PROTOCOL)

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> "Score":
        """Check and convert.

        Raises:
            UserError: Another schema; a key that is missing or cannot be used.
        """
        if not isinstance(entry, dict):
            raise UserError(f"entry={json.dumps(entry)}: must be an object")
        values = {key.name: key.metadata["kind"].take(entry, key.name) for key in fields(cls)}
        if values["schema"] != SCHEMA:
            raise UserError(f"schema={values['schema']}: must be {SCHEMA}, for this w2s_train")
        protocol = Protocol.from_json(values["protocol"])
        for key in ("step", "weights", "guidance"):
            if values[key] != getattr(protocol, key):
                raise UserError(f"{key}={values[key]}: must equal protocol.{key}")
        return cls(**values | {"protocol": protocol})


@dataclass(frozen=True)
class Fault:
    """An entry that cannot be used, as it stands, and why."""

    entry: Any
    message: str

    def may_be_of(self, metric: str, weights: str, guidance: str) -> bool:
        """Whether it is, or does not say that it is not, of this kind."""
        kind = {"metric": metric, "weights": weights, "guidance": guidance}
        entry = self.entry if isinstance(self.entry, dict) else {}
        return all(entry.get(key, value) == value for key, value in kind.items())


@dataclass(frozen=True)
class Record:
    """What a ``scores.json`` holds: at least one score, oldest first, and unusable entries."""

    scores: list[Score]
    faults: list[Fault]


def read_scores(folder: Path) -> list[Score]:
    """The scores of a run, oldest first.

    Raises:
        UserError: No file, none with scores, one that cannot be read, or an entry that cannot.
    """
    record = read_record(folder)
    if record.faults:
        raise UserError(record.faults[0].message)
    return record.scores


def read_record(folder: Path) -> Record:
    """As `read_scores`, but entries that cannot be used are returned beside the others.

    Raises:
        UserError: No file, none with a usable score, or one that cannot be read.
    """
    path = folder / "scores.json"
    if not path.is_file():
        raise UserError("scores.json: there is none; the run was not scored yet")
    try:
        entries = json.loads(path.read_text(encoding="utf-8"), parse_constant=str)
    except (ValueError, RecursionError) as error:
        raise UserError(f"scores.json: cannot be read; {error}") from error
    if not isinstance(entries, list) or not entries:
        raise UserError("scores.json: must be a list with at least one score")
    scores, faults = [], []
    for i, entry in enumerate(entries):
        try:
            scores.append(Score.from_json(entry))
        except UserError as error:
            faults.append(Fault(entry, f"scores.json[{i}]: {error}"))
    if not scores:
        raise UserError(faults[0].message)
    return Record(scores, faults)


def higher_is_better(metric: str) -> bool:
    """The direction of a metric, by the beginning of its name.

    Raises:
        UserError: A name that says nothing about the direction.
    """
    if not metric.startswith(HIGHER + LOWER):
        raise UserError(f"metric={metric}: must begin with one of {', '.join(HIGHER + LOWER)}")
    return metric.startswith(HIGHER)


def grid_name(step: int, weights: str | None = None, guidance: str = "none") -> str:
    """The file of a sample grid; that of the main setting has no weights in its name."""
    setting = ", ".join(text for text in (weights, guidance) if text and text != "none")
    slug = re.sub(r"[^\w.]+", "-", setting).strip("-") if weights else ""
    return f"{'-'.join(filter(None, (f'step-{step:06d}', slug)))}.png"


def append_scores(folder: Path, entries: list[dict[str, Any]]) -> None:
    """Append to ``scores.json``, a JSON list; the file is replaced whole or not at all.

    Raises:
        ValueError: A number that is not finite.
    """
    path = folder / "scores.json"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".scores.lock"):  # a fit and a validate may score at the same time
        earlier = json.loads(path.read_text()) if path.is_file() else []
        scores = json.dumps(earlier + redacted(entries), indent=1, allow_nan=False)
        with atomic_write(path) as file:
            file.write(scores.encode() + b"\n")


@functools.cache
def git_commit() -> str | None:
    """The commit of the code, with "-dirty" if files differ from it; None outside a checkout.

    A copy that ``launch/submit`` made says it in a file: git would speak of the checkout around it.
    """
    copied = Path(__file__).parent.parent / "COMMIT"
    if copied.is_file():
        return copied.read_text().strip()
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    command += ["--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
