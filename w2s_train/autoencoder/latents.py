"""What lies beside shards of latents.

A ``latents.json``, which ``data/encode_latents.py`` writes: what made them, and their mean and std
per channel.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from w2s_train.errors import UserError
from w2s_train.shards.storage import Storage, is_pipe, is_remote, split_url

LATENTS = "latents.json"


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
            found[place] = _parse(text, place, "train_urls")
    return found


def read_statistics(path: str, channels: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (C,) per channel, of a ``latents.json``.

    Raises:
        UserError: It cannot be used, or is of another number of channels.
    """
    if not Path(path).is_file():
        raise UserError(f"statistics={path}: must be an existing file")
    stored = _parse(Path(path).read_text(), path, "statistics")["statistics"]
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
    return torch.tensor(mean), torch.tensor(std)


def _parse(text: str, path: str, name: str) -> dict[str, Any]:
    """A ``latents.json``; refuses other files, and that of an encoding that has not ended."""
    try:
        made = json.loads(text)
        autoencoder, _, _ = made["autoencoder"], made["weights"], made["latent_shape"][0]
        complete = "statistics" in made
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(
            f"{name}={path}: must be a latents.json of data/encode_latents.py ({error!r})"
        ) from error
    if not complete:
        raise UserError(f"{name}={path}: must be of shards that are all encoded ({autoencoder})")
    return made
