"""From what the shards hold to what the network sees, and back to images.

Training calls `Autoencoder.encode`, validation `Autoencoder.decode`. Both see the whole batch.
"""

import abc
from typing import Any

import torch
from torch import Tensor, nn

from w2s_train.errors import UserError
from w2s_train.latents.kl import load_autoencoder, split_moments, weights_digest
from w2s_train.latents.record import read_statistics
from w2s_train.shards.samples import to_float

STABLE_DIFFUSION = 0.18215  # 1 / std of its latents (Rombach et al., 2022)


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
        return None

    def check(self, made: dict[str, Any], where: str) -> None:
        """Refuse shards of latents that are not this autoencoder's.

        Args:
            made: The ``latents.json`` beside the shards, as data/encode_latents.py writes it.
            where: Its place, for the message.

        Raises:
            UserError: Of another number of channels or other statistics; or, once the weights are
                loaded, of other weights.
        """
        return None

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


class StableDiffusionVAE(Autoencoder):
    """Latents of a diffusers ``AutoencoderKL`` (Rombach et al., 2022).

    Shards hold the posterior's moments, mean and log-variance (B, 2C, h, w), or samples of it
    (B, C, h, w). A latent z becomes the network's input by z ``scale``, or channel by channel by
    (z - mean) / std. Needs ``pip install -e ".[latents]"`` to decode; training does not load it.

    Args:
        path: Local folder of the autoencoder, or its hub name, ``OWNER/NAME`` or
            ``OWNER/NAME/SUBFOLDER``.
        scale: Latents are multiplied by it, so that they have about unit variance; 0.18215, that of
            Stable Diffusion, if neither it nor ``statistics`` is given.
        channels: Channels C of a latent.
        statistics: The ``latents.json`` beside the shards, to use its mean and std per channel
            instead of ``scale``.
        decode_batch: Images decoded at a time, cut or padded to it, so that they do not depend on
            how many are asked for, and fit in memory.

    Raises:
        UserError: Both ``scale`` and ``statistics``, or one that cannot be used.
    """

    def __init__(
        self,
        path: str = "stabilityai/sd-vae-ft-mse",
        scale: float | None = None,
        channels: int = 4,
        statistics: str | None = None,
        decode_batch: int = 16,
    ) -> None:
        super().__init__()
        if scale is not None and statistics is not None:
            raise UserError(f"scale={scale}: must be left out where statistics={statistics} are")
        if scale is not None and not 0 < scale < float("inf"):
            raise UserError(f"scale={scale}: must be a finite number above 0")
        for name, value in dict(channels=channels, decode_batch=decode_batch).items():
            if value < 1:
                raise UserError(f"{name}={value}: must be at least 1")
        self.path, self.channels, self.decode_batch = path, channels, decode_batch
        self.statistics_path, self.statistics = statistics, tuple[Tensor, ...]()
        mean = torch.zeros(channels)
        factor = torch.full((channels,), STABLE_DIFFUSION if scale is None else scale)
        if statistics is not None:
            mean, std = self.statistics = read_statistics(statistics, channels)
            factor = 1 / std
        # Neither these nor the weights belong in state dicts or checkpoints, and neither may follow
        # the network to a precision below float32: no buffers, and a list.
        self._mean, self._factor = mean.view(-1, 1, 1), factor.view(-1, 1, 1)
        self._loaded: list[Any] = []

    def encode(self, stored: Tensor) -> Tensor:
        if stored.dtype == torch.uint8:
            raise UserError(
                f"channels={self.channels}: the shards hold images, must be latents; "
                "data/encode_latents.py makes them"
            )
        if stored.shape[1] not in (self.channels, 2 * self.channels):
            raise UserError(
                f"channels={self.channels}: the shards hold {stored.shape[1]} channels, "
                f"must be {self.channels} (latents) or {2 * self.channels} (moments)"
            )
        z = to_float(stored)
        if stored.shape[1] == 2 * self.channels:
            mean, std = split_moments(z)
            z = mean + std * torch.randn_like(mean)
        # Moved once: a copy at every step would have the host wait for the device.
        self._mean, self._factor = self._mean.to(z.device), self._factor.to(z.device)
        return (z - self._mean) * self._factor

    def load(self) -> None:
        if not self._loaded:
            vae = load_autoencoder(self.path, "autoencoder.path")
            if vae.config.latent_channels != self.channels:
                raise UserError(
                    f"channels={self.channels}: must be {vae.config.latent_channels}, as "
                    f"{self.path} has"
                )
            self._loaded.append(vae)

    def check(self, made: dict[str, Any], where: str) -> None:
        if made["latent_shape"][0] != self.channels:
            raise UserError(
                f"channels={self.channels}: must be {made['latent_shape'][0]}, as {where} "
                "says of the shards"
            )
        theirs = [torch.tensor(made["statistics"][name]) for name in ("mean", "std")]
        if not all(map(torch.equal, self.statistics, theirs)):
            raise UserError(f"statistics={self.statistics_path}: must be those of {where}")
        if self._loaded and (mine := weights_digest(self._loaded[0])) != made["weights"]:
            raise UserError(
                f"autoencoder.path={self.path}: must be the autoencoder that made the shards, "
                f"{made['autoencoder']} with weights {made['weights'][:12]}; these are {mine[:12]} "
                f"({where})"
            )

    def describe(self) -> str:
        self.load()
        return f"AutoencoderKL {weights_digest(self._loaded[0])[:12]}"

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        self.load()
        vae = self._loaded[0].to(x.device)
        z = x.float() / self._factor.to(x.device) + self._mean.to(x.device)
        images = []
        # Validation may run under a mixed precision that is meant for the network alone.
        with torch.autocast(x.device.type, enabled=False):
            for part in z.split(self.decode_batch):
                padding = part[:1].expand(self.decode_batch - len(part), -1, -1, -1)
                image = vae.decode(torch.cat([part, padding])).sample
                images.append(to_uint8(image[: len(part)]))
        return torch.cat(images)
