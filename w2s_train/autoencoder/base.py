"""From what the shards hold to what the network sees, and back to images.

Training calls `Autoencoder.encode`, validation `Autoencoder.decode`. Both see the whole batch.
"""

import abc
from typing import Any

import torch
from torch import Tensor, nn

from w2s_train.shards.samples import to_float


def to_uint8(x: Tensor) -> Tensor:
    """[-1, 1] to 0 ... 255, rounded to the nearest; what lies outside is clipped.

    Truncating instead darkens every image by half a grey level, which Fréchet distances see.
    """
    return (x * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)


class Autoencoder(nn.Module, abc.ABC):
    """A pair of maps between stored data and the network's space."""

    def load(self) -> None:
        """Read the weights that `decode` needs; a fit that will decode calls it before it starts.

        Raises:
            UserError: They are missing, or the library that reads them is.
        """

    def check(self, made: dict[str, Any], where: str) -> None:
        """Refuse shards of latents that are not this autoencoder's.

        Args:
            made: The ``latents.json`` beside the shards.
            where: Its place, for the message.

        Raises:
            UserError: Of another number of channels or other statistics; or, once the weights are
                loaded, of other weights.
        """

    def advice(self, made: dict[str, Any], where: str) -> str:
        """What is unwise about training on such shards, as `check` takes them; empty if nothing."""
        return ""

    def describe(self) -> str:
        """What the images of a score were decoded with."""
        return type(self).__name__

    @abc.abstractmethod
    def encode(self, stored: Tensor) -> Tensor:
        """Data as in the shards (B, ., ., .) to the network's input (B, C, H, W) float32."""

    @abc.abstractmethod
    def decode(self, x: Tensor) -> Tensor:
        """The network's space (B, C, H, W) to images (B, 3 or 1, H', W') uint8, or to `Vectors`."""


class PixelSpace(Autoencoder):
    """The network works on pixels in [-1, 1]."""

    def encode(self, stored: Tensor) -> Tensor:
        return to_float(stored)

    def decode(self, x: Tensor) -> Tensor:
        return to_uint8(x)


class Vectors(Autoencoder):
    """Data that is no image, such as points in the plane (B, 2, 1, 1): passed through."""

    def encode(self, stored: Tensor) -> Tensor:
        return to_float(stored)

    def decode(self, x: Tensor) -> Tensor:
        return x.float()
