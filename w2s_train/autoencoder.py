"""From what the shards hold to what the network sees, and back to images.

Training calls `Autoencoder.encode`, validation `Autoencoder.decode`. Both see the whole batch.
"""

import abc
from typing import Any

import torch
from torch import Tensor, nn

from w2s_train.errors import UserError


def to_uint8(x: Tensor) -> Tensor:
    """[-1, 1] to 0 ... 255, rounded to the nearest; what lies outside is clipped.

    Truncating instead darkens every image by half a grey level, which Fréchet distances see.
    """
    return (x * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)


class Autoencoder(nn.Module, abc.ABC):
    """A pair of maps between stored data and the network's space."""

    @abc.abstractmethod
    def encode(self, stored: Tensor) -> Tensor:
        """Data as in the shards (B, ., ., .) to the network's input (B, C, H, W)."""

    @abc.abstractmethod
    def decode(self, x: Tensor) -> Tensor:
        """The network's space (B, C, H, W) to images (B, 3 or 1, H', W') uint8, or to `Vectors`."""


class PixelSpace(Autoencoder):
    """The network works on pixels in [-1, 1]."""

    def encode(self, stored: Tensor) -> Tensor:
        return stored

    def decode(self, x: Tensor) -> Tensor:
        return to_uint8(x)


class Vectors(Autoencoder):
    """Data that is no image, such as points in the plane (B, 2, 1, 1): passed through."""

    def encode(self, stored: Tensor) -> Tensor:
        return stored

    def decode(self, x: Tensor) -> Tensor:
        return x.float()


class StableDiffusionVAE(Autoencoder):
    """Latents of a diffusers ``AutoencoderKL`` (Rombach et al., 2022).

    Shards hold the posterior's moments, mean and log-variance (B, 2C, h, w), or samples of it
    (B, C, h, w). Needs ``pip install w2s_train[latents]`` to decode; training does not load it.

    Args:
        path: Local folder or hub name of the autoencoder, read when first used.
        scale: Latents are multiplied by it, so that they have about unit variance.
        channels: Channels C of a latent.
    """

    def __init__(
        self,
        path: str = "stabilityai/sd-vae-ft-mse",
        scale: float = 0.18215,
        channels: int = 4,
    ) -> None:
        super().__init__()
        if not 0 < scale < float("inf"):
            raise UserError(f"scale={scale}: must be a finite number above 0")
        self.path, self.scale, self.channels = path, scale, channels
        # In a list, so that its weights stay out of state dicts and checkpoints.
        self._loaded: list[Any] = []

    def encode(self, stored: Tensor) -> Tensor:
        if stored.shape[1] == self.channels:
            return stored * self.scale
        if stored.shape[1] != 2 * self.channels:
            raise UserError(
                f"channels={self.channels}: the shards hold {stored.shape[1]} channels, "
                f"must be {self.channels} (latents) or {2 * self.channels} (moments)"
            )
        mean, log_variance = stored.chunk(2, dim=1)
        std = (log_variance.clamp(-30, 20) / 2).exp()
        return (mean + std * torch.randn_like(mean)) * self.scale

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        if not self._loaded:
            from diffusers import AutoencoderKL  # optional, and takes seconds to import

            vae = AutoencoderKL.from_pretrained(self.path)
            self._loaded.append(vae.requires_grad_(False).eval())
        vae = self._loaded[0].to(x.device)
        return to_uint8(vae.decode(x.float() / self.scale).sample)
