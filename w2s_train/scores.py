"""What runs leave for other tools: ``scores.json`` (docs/scores.md), and the names of grids."""

import functools
import json
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, get_args

from w2s_train.errors import UserError
from w2s_train.files import atomic_write, locked
from w2s_train.secrets import redacted

SCHEMA = 1
HIGHER = ("inception_score", "precision", "recall", "density", "coverage", "agreement")
LOWER = ("fid", "fd_", "sfid", "kid", "outliers", "energy_distance", "velocity_error")
LARGEST = 1e100  # sums and squares of smaller numbers are finite

Seconds = Annotated[float, "at least 0"]


@dataclass(frozen=True)
class Protocol:
    """How a score came about; ``| None`` says that a key may be absent, others are ignored."""

    sampler: str
    steps: int
    guidance: str
    weights: str
    ema_decay: float | None
    autoencoder: str
    precision: str
    step: int
    images_seen: int
    training_samples: int | None
    metric_settings: str | None
    reference_features: int | None
    extractor: str | None
    reference: dict[str, Any]
    n: int
    seeds: tuple[int, int]
    labels: str | None
    evaluation_seconds: Seconds | None
    wall_clock_seconds: Seconds
    training_seconds: Seconds | None
    git_commit: str | None

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> "Protocol":
        """Checked; a UserError names a key that is missing or cannot be used."""
        if isinstance(name := entry.get("reference"), str):  # a density, of which that says all
            entry = entry | {"reference": {"dataset": name}}
        values = _values(cls, entry)
        return cls(**values | {"seeds": tuple(values["seeds"])})


@dataclass(frozen=True)
class Score:
    """One element of ``scores.json``."""

    schema: int
    metric: str
    value: float
    step: int
    weights: str
    guidance: str
    protocol: Protocol

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> "Score":
        """Checked; a UserError names another schema, or a key as above."""
        if not isinstance(entry, dict):
            raise UserError(f"entry={json.dumps(entry)}: must be an object")
        values = _values(cls, entry)
        if values["schema"] != SCHEMA:
            raise UserError(f"schema={values['schema']}: must be {SCHEMA}, for this w2s_train")
        protocol = Protocol.from_json(values["protocol"])
        for key in ("step", "weights", "guidance"):
            if values[key] != getattr(protocol, key):
                raise UserError(f"{key}={values[key]}: must equal protocol.{key}")
        return cls(**values | {"protocol": protocol})


# What a key may hold, by its annotation, and in words; JSON's true and false are no numbers.
KINDS: dict[Any, tuple[Callable[[Any], bool], str]] = {
    str: (lambda v: isinstance(v, str), "a text"),
    int: (lambda v: type(v) is int and 0 <= v <= LARGEST, "a whole number of at least 0"),
    float: (lambda v: type(v) in (int, float) and abs(v) <= LARGEST, "a finite number"),
    Seconds: (lambda v: type(v) in (int, float) and 0 <= v <= LARGEST, "seconds, at least 0"),
    dict[str, Any]: (
        lambda v: isinstance(v, dict) and bool(v.get("dataset")),
        'a fingerprint: {"dataset": ..., ...}, or the name of a density',
    ),
    tuple[int, int]: (
        lambda v: isinstance(v, list) and [*map(type, v)] == [int, int] and v[0] <= v[1],
        "[first, last], whole numbers, last not below first",
    ),
    Protocol: (lambda v: isinstance(v, dict) and bool(v), "an object"),
}


def _values(cls: type, entry: dict[str, Any]) -> dict[str, Any]:
    """The checked values of the keys of a class; a UserError names one that cannot be used."""
    values = {}
    for key in fields(cls):
        value, options = entry.get(key.name), get_args(key.type)
        optional = type(None) in options
        fits, allowed = KINDS[options[0] if optional else key.type]
        if not fits(value) and not (optional and value is None):
            text = json.dumps(value)
            text = text if len(text) <= 100 else f"{text[:100]}..."
            raise UserError(f"{key.name}={text}: must be {allowed}")
        values[key.name] = value
    return values


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
    """What a ``scores.json`` holds: scores, oldest first, and entries that cannot be used."""

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
        UserError: No file, none with an entry, or one that cannot be read.
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
    """The file of a sample grid; that of averaged weights, unguided, has no setting in its name."""
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
    with locked(folder / ".scores.lock"):  # a fit and a validate may score at the same time
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
