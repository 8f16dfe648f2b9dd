"""What a score of images for their prompts has: weights on disk, a fingerprint, a number each."""

import abc
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from w2s_train.errors import UserError, one_line
from w2s_train.features.base import digest
from w2s_train.text2image.device import computing_device


class Judge(abc.ABC):
    """Images and their prompts to scores; higher is better.

    The weights are read when the first image is scored. Images are scored one at a time, in
    float32, so that a score depends on its own image and prompt alone, bit for bit; networks of
    this size keep a device busy with one image.

    Args:
        weights: The file that the score comes from.
        device: Where the networks compute, as torch names it.

    Raises:
        UserError: There is no such device.
    """

    name: str = ""  # of the score, in tables and files

    def __init__(self, weights: Path, device: str) -> None:
        self.weights, self.device = weights, computing_device(device)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Of all weights that the score comes from; equal only if they are."""
        return digest(self.weights)

    @torch.no_grad()
    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """Scores (N,) of N images for N prompts, float32, in host memory.

        Raises:
            UserError: There are not as many prompts as images, or the weights are others.
        """
        if len(images) != len(prompts):
            raise UserError(
                f"prompts={len(prompts)}: must be as many as the images, which are {len(images)}"
            )
        with torch.autocast(self.device.type, enabled=False):
            pairs = zip(images, prompts, strict=True)
            return torch.tensor([float(self.one(x.convert("RGB"), text)) for x, text in pairs])

    @abc.abstractmethod
    def one(self, image: Image.Image, prompt: str) -> Tensor:
        """The score, a single number, of an RGB image of any size."""


def existing(name: str, path: Path, source: str) -> Path:
    """``path``, if it is a file.

    Args:
        name: Of the argument.
        path: Its value.
        source: Which file it is to be, and where it is published.

    Raises:
        UserError: It is missing.
    """
    if not path.is_file():
        raise UserError(f"{name}={path}: must be an existing file, {source}")
    return path


def filled(
    build: Callable[[], nn.Module], state: Mapping[str, Any], place: str, source: str
) -> nn.Module:
    """A network with weights of a file, in float32, for evaluation without gradients.

    Args:
        build: Makes the network; its random weights leave torch's generator as it was.
        state: Tensors by their names. Those that end in position_ids, which old files have, count
            upwards and are left out.
        place: ``name=value`` of the argument that names the file.
        source: What it is to hold.

    Raises:
        UserError: Names or shapes differ from the network's.
    """
    with torch.random.fork_rng(devices=[]):
        network = build().float()
    found = {key: x for key, x in state.items() if not key.endswith("position_ids")}
    own = network.state_dict()
    wrong = [
        key
        for key in sorted({*own, *found}, key=str)
        if getattr(own.get(key), "shape", None) != getattr(found.get(key), "shape", None)
    ]
    if wrong:
        raise UserError(
            f"{place}: must hold {source}; {len(wrong)} tensors are missing, unknown or of "
            f"another shape, first {wrong[0]}"
        )
    network.load_state_dict(found)
    return network.eval().requires_grad_(False)


def unreadable(place: str, source: str, error: Exception) -> UserError:
    """What to say of a file that a library cannot read.

    Args:
        place: ``name=value`` of the argument that names it.
        source: What it is to hold.
        error: Of the library.
    """
    return UserError(f"{place}: must hold {source}; it cannot be read ({one_line(error)})")
