"""``latents.json`` beside the shards: what made them, and their statistics."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from w2s_train.errors import UserError
from w2s_train.files import atomic_write
from w2s_train.secrets import redacted
from w2s_train.shards.storage import Storage
from w2s_train.shards.table import ShardTable
from w2s_train.shards.urls import is_pipe, is_remote, split_url
from w2s_train.shards.writer import table_path

LATENTS = "latents.json"


class Statistics(NamedTuple):
    """Of latents: mean and standard deviation (C,) per channel."""

    mean: Tensor
    std: Tensor


def read_latents(path: Path, name: str) -> dict[str, Any]:
    """What data/encode_latents.py wrote beside its shards when it had encoded all of them.

    Args:
        path: The ``latents.json``.
        name: What the user calls it.

    Raises:
        UserError: No such file, another file, or that of an encoding that has not ended.
    """
    if not path.is_file():
        raise UserError(f"{name}={path}: must be an existing file")
    return parse_latents(path.read_text(), str(path), name)


def parse_latents(text: str, path: str, name: str) -> dict[str, Any]:
    """As `read_latents`, for the contents of a file that is somewhere."""
    try:
        made = json.loads(text)
        about = made["autoencoder"], made["weights"], made["latent_shape"][0]
        complete = "statistics" in made
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(
            f"{name}={path}: must be a latents.json of data/encode_latents.py ({error!r})"
        ) from error
    if not complete:
        raise UserError(f"{name}={path}: must be of shards that are all encoded ({about[0]})")
    return made


def latents_beside(urls: Sequence[str], storage: Storage) -> dict[str, dict[str, Any]]:
    """Every ``latents.json`` beside some shards, by its place.

    Raises:
        UserError: One cannot be read, or is that of an encoding that has not ended.
    """
    found = {}
    for folder in sorted({split_url(url)[0] for url in urls if not is_pipe(url)}):
        place = f"{folder}/{LATENTS}" if folder else LATENTS
        if is_remote(place):
            text = storage.text(place)
        else:
            text = Path(place).read_text() if Path(place).is_file() else None
        if text is not None:
            found[place] = parse_latents(text, place, "train_urls")
    return found


def read_statistics(path: str, channels: int) -> Statistics:
    """Those of a ``latents.json``.

    Raises:
        UserError: It cannot be used, or is of another number of channels.
    """
    stored = read_latents(Path(path), "statistics")["statistics"]
    try:
        mean, std = [[float(value) for value in stored[key]] for key in ("mean", "std")]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"statistics={path}: must hold numbers, mean and std of each channel ({error!r})"
        ) from error
    if not len(mean) == len(std) == channels:
        raise UserError(f"statistics={path}: must be of {channels} channels, are of {len(mean)}")
    if not all(math.isfinite(value) for value in mean + std) or min(std) <= 0:
        raise UserError(f"statistics={path}: must be finite, and std above 0")
    return Statistics(torch.tensor(mean), torch.tensor(std))


class Recipe(NamedTuple):
    """What latents are made of and how; those of two recipes do not go into one folder."""

    autoencoder: str
    revision: str | None
    weights: str
    dtype: str
    flip: bool
    precision: str
    batch_size: int  # it decides about the last bits
    image_shape: tuple[int, ...]
    latent_shape: tuple[int, ...]
    source: str
    source_shards: int
    source_digest: str  # sha256 of the shards' names


# The same weights may be found under two names, and the same shards by two patterns.
NAMES = ("autoencoder", "revision", "source")


def begin(folder: Path, recipe: Recipe) -> None:
    """Write ``latents.json``, still without statistics, or agree with the one that is there.

    Raises:
        UserError: It is of another recipe, or shards are there without it.
    """
    path = folder / LATENTS
    if not path.is_file():
        if any(folder.glob("*.tar")):
            raise UserError(
                f"output={folder}: must be empty or hold a {LATENTS}; it holds other shards"
            )
        _write(path, recipe._asdict())
        return
    try:
        stored = json.loads(path.read_text())
        before = {name: stored[name] for name in Recipe._fields}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"output={folder}: must hold a {LATENTS} of this command ({error!r})"
        ) from error
    now = json.loads(json.dumps(recipe._asdict()))
    changed = [name for name in now if name not in NAMES and now[name] != before[name]]
    if changed:
        differ = "; ".join(f"{name} {before[name]}, now {now[name]}" for name in changed)
        raise UserError(
            f"output={folder}: must be a folder of its own, it holds latents of {differ} "
            f"(made by {before['autoencoder']} of {before['source']})"
        )


class Summary(NamedTuple):
    """Of all shards of a folder."""

    images: int
    broken: int
    bytes: int
    mean: list[float]  # per channel
    std: list[float]
    std_of_all: float  # over all channels; 1 over it is the one scale for all of them


def complete(folder: Path, stems: list[str], recipe: Recipe) -> Summary:
    """Add the statistics to ``latents.json`` when all shards are written.

    Over images (mirrored ones, too), height and width, exact for a posterior N(m, s^2):

        E[z] = E[m],    Var[z] = E[m^2] + E[s^2] - E[z]^2.
    """
    tables = [ShardTable.load(table_path(folder / f"{stem}.tar")) for stem in stems]
    first, second, count, broken = (
        np.sum([table.sums[name] for table in tables if name in table.sums], axis=0)
        for name in ("first", "second", "count", "broken")
    )
    mean, square = first / count, second / count
    std = np.sqrt(square - mean**2)
    std_of_all = float(np.sqrt(square.mean() - mean.mean() ** 2))
    images, size = sum(map(len, tables)), sum(table.bytes for table in tables)
    summary = Summary(images, int(broken), size, mean.tolist(), std.tolist(), std_of_all)
    statistics = {name: getattr(summary, name) for name in ("mean", "std", "std_of_all")}
    statistics["count"] = int(count)
    counts = {"images": images, "broken": summary.broken}
    _write(folder / LATENTS, recipe._asdict() | counts | {"statistics": statistics})
    return summary


def _write(path: Path, content: dict[str, Any]) -> None:
    with atomic_write(path) as file:
        file.write(json.dumps(redacted(content), indent=1).encode() + b"\n")
