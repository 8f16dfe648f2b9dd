"""Files of averages, each written whole or not at all, and what can be made of them."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from w2s_train.errors import UserError
from w2s_train.files import atomic_write

FOLDER = "posthoc"  # of the run folder
NAME = re.compile(r"step-(\d+)-std-.*\.safetensors")


class Snapshot(NamedTuple):
    """An average as it was."""

    step: int  # optimizer steps
    images: int  # of those that were taken
    std: float
    path: Path | None = None


def write(folder: Path, about: Snapshot, tensors: dict[str, Tensor]) -> None:
    """Write weights by the network's names, with what is known of them."""
    path = folder / f"step-{about.step:06d}-std-{about.std:g}.safetensors"
    known = {"step": str(about.step), "images": str(about.images), "std": repr(about.std)}
    with atomic_write(path) as file:
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        file.write(save(contiguous, known))


def forget(folder: Path, step: int) -> None:
    """Remove those after ``step``: the run goes on from there, and they are of a part given up.

    So is what a kill has left half written.
    """
    for path in folder.glob("step-*.partial"):
        path.unlink()
    for path in folder.glob("*.safetensors"):
        if (found := NAME.fullmatch(path.name)) and int(found[1]) > step:
            path.unlink()


def read(folder: Path, weights: Mapping[str, Tensor], step: int) -> list[Snapshot]:
    """Those up to a step, in its order.

    Args:
        folder: Where they lie.
        weights: Of the network, by the names that each must have.
        step: Of a checkpoint.

    Raises:
        UserError: One cannot be read, or is of another network.
    """
    found = list[Snapshot]()
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                known = file.metadata() or {}
                shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}
            about = Snapshot(int(known["step"]), int(known["images"]), float(known["std"]), path)
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise UserError(f"{path}: must be a whole snapshot; remove it ({error})") from error
        if shapes != {name: list(weight.shape) for name, weight in weights.items()}:
            raise UserError(f"{path}: must hold the weights of the run's network; it is of another")
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
