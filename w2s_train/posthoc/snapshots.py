"""Files of averages, each written whole or not at all, and what can be made of them."""

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from w2s_train.errors import UserError
from w2s_train.files import atomic_write
from w2s_train.models.saved import made_of

FOLDER = "posthoc"  # of the run folder
NAME = re.compile(r"step-(\d+)-std-.*\.safetensors")


class Snapshot(NamedTuple):
    """An average as it was."""

    step: int  # optimizer steps
    images: int  # of those that were taken
    std: float
    path: Path | None = None


def fingerprint(network: Any) -> str:
    """Stands for an architecture, and the shapes of its weights."""
    shapes = [[name, list(p.shape)] for name, p in network.named_parameters()]
    text = json.dumps([made_of(network), shapes], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write(folder: Path, about: Snapshot, tensors: dict[str, Tensor], network: Any) -> None:
    """Write weights by the network's names, with what is known of them."""
    path = folder / f"step-{about.step:06d}-std-{about.std:g}.safetensors"
    known = {"step": str(about.step), "images": str(about.images), "std": repr(about.std)}
    with atomic_write(path) as file:
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        file.write(save(contiguous, known | {"network": fingerprint(network)}))


def forget(folder: Path, step: int) -> None:
    """Remove those after ``step``: the run goes on from there, and they are of a part given up."""
    for path in folder.glob("*.safetensors"):
        if (found := NAME.fullmatch(path.name)) and int(found[1]) > step:
            path.unlink()


def read(folder: Path, network: Any, step: int) -> list[Snapshot]:
    """Those up to a step, in its order.

    Raises:
        UserError: One cannot be read, or is of another network.
    """
    found = list[Snapshot]()
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                known = file.metadata() or {}
            about = Snapshot(int(known["step"]), int(known["images"]), float(known["std"]), path)
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise UserError(f"{path}: must be a whole snapshot; remove it ({error})") from error
        if known.get("network") != fingerprint(network):
            raise UserError(f"{path}: must be of the network of the run; remove it")
        if about.step <= step:
            found.append(about)
    return sorted(found)


Read = Callable[[str], Tensor]  # a tensor of an average, by name


def combined(parts: Sequence[tuple[float, Read]], names: Sequence[str]) -> dict[str, Tensor]:
    """Sums of averages, each times its coefficient, in float64; float32 of each name."""
    return {
        name: torch.stack([c * read(name).double() for c, read in parts]).sum(0).float()
        for name in names
    }
