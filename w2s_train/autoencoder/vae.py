"""Latents of diffusers' autoencoders, as the network sees them."""

import math
from typing import Any

import torch
from torch import Tensor

from w2s_train.autoencoder.base import Autoencoder, to_uint8
from w2s_train.autoencoder.latents import read_statistics
from w2s_train.autoencoder.of_diffusers import (
    STABLE_DIFFUSION,
    load_autoencoder,
    normalization,
    posterior,
    read_config,
    weights_digest,
)
from w2s_train.errors import UserError, require
from w2s_train.files import expanded
from w2s_train.shards.samples import to_float

FAR = 1.5  # from 1, for the std of scaled latents; Stable Diffusion's are at 0.8 to 1 of photos


class DiffusersVAE(Autoencoder):
    """Latents of an ``AutoencoderKL`` or ``AutoencoderDC``, by the name of diffusers' files.

    Shards hold moments of the posterior, mean and log-variance (B, 2C, h, w), or latents
    (B, C, h, w). A latent z becomes the network's input by (z - mean) / std, channel by channel.
    Needs ``pip install -e ".[latents]"`` to decode; training loads no weights.

    Args:
        path: Local folder of the autoencoder, or ``OWNER/NAME`` or ``OWNER/NAME/SUBFOLDER`` of the
            hub.
        mean: Of each of the C channels; None, as ``std``: of a fit, those in the ``latents.json``
            beside its shards, which ``data/encode_latents.py`` has measured; else what the
            autoencoder's config says, of each channel or by ``shift_factor`` and
            ``scaling_factor``.
        std: Of each channel.
        decode_batch: Images decoded at a time, cut or padded to it, so that they do not depend on
            how many are asked for, and fit in memory.

    Raises:
        UserError: One of ``mean`` and ``std`` without the other, or numbers that cannot be used.
    """

    def __init__(
        self,
        path: str,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        decode_batch: int = 16,
    ) -> None:
        super().__init__()
        if (mean is None) != (std is None):
            raise UserError(f"mean={mean}: must be given with std={std}, or neither")
        name, given = "autoencoder.path", mean
        if mean is None or std is None:
            mean, std = normalization(read_config(path, name), f"{name}={path}")
        if len(mean) != len(std) or not mean:
            raise UserError(f"mean={mean}: must have as many channels as std={std}")
        if not all(map(math.isfinite, mean + std)) or min(std) <= 0:
            raise UserError(f"std={std}: must be finite, as mean={mean}, and above 0")
        if given and expanded(name, path).is_dir():
            if (own := read_config(path, name)["latent_channels"]) != len(given):
                rule = f"must be {len(given)}, as mean and std have"
                raise UserError(f"{name}={path} ({own} channels): {rule}")
        self._take(path, torch.tensor(mean), 1 / torch.tensor(std), decode_batch)

    def _take(self, path: str, mean: Tensor, factor: Tensor, decode_batch: int) -> None:
        self.path, self.decode_batch = path, require("decode_batch", decode_batch, "[1, inf)")
        self.channels = len(mean)
        # Neither these nor the weights belong in state dicts or checkpoints, and neither may follow
        # the network to a precision below float32: no buffers, and a list.
        self._mean, self._factor = mean.view(-1, 1, 1), factor.view(-1, 1, 1)
        self._loaded: list[Any] = []

    @property
    def named(self) -> str:
        """The setting that says how many channels there are."""
        return f"autoencoder.path={self.path} ({self.channels} channels)"

    def encode(self, stored: Tensor) -> Tensor:
        wanted = f"{self.named}: the shards hold"
        if stored.dtype == torch.uint8:
            raise UserError(f"{wanted} images, must be latents; data/encode_latents.py makes them")
        if stored.shape[1] not in (self.channels, 2 * self.channels):
            raise UserError(
                f"{wanted} {stored.shape[1]} channels, must be {self.channels} (latents) or "
                f"{2 * self.channels} (moments)"
            )
        z, std = posterior(to_float(stored), self.channels)
        if std is not None:
            z = z + std * torch.randn_like(z)
        # Moved once: a copy at every step would have the host wait for the device.
        self._mean, self._factor = self._mean.to(z.device), self._factor.to(z.device)
        return (z - self._mean) * self._factor

    def load(self) -> None:
        if self._loaded:
            return
        vae = load_autoencoder(self.path, "autoencoder.path")
        if (theirs := vae.config.latent_channels) != self.channels:
            raise UserError(f"{self.named}: must be {theirs}, as {self.path} has")
        self._loaded.append(vae)

    @property
    def vae(self) -> Any:
        """Diffusers' model, once it is loaded."""
        return self._loaded[0]

    @property
    def latent_moments(self) -> tuple[Tensor, Tensor]:
        """Mean and std (C,) with which a latent z is made, (z - mean) / std."""
        return self._mean.flatten(), 1 / self._factor.flatten()

    def check(self, made: dict[str, Any], where: str) -> None:
        if (channels := made["latent_shape"][0]) != self.channels:
            raise UserError(f"{self.named}: must be {channels}, as {where} says of the shards")
        if self._loaded and (mine := weights_digest(self._loaded[0])) != made["weights"]:
            raise UserError(
                f"autoencoder.path={self.path}: must be the autoencoder that made the shards, "
                f"{made['autoencoder']} with weights {made['weights'][:12]}; these are {mine[:12]} "
                f"({where})"
            )

    def advice(self, made: dict[str, Any], where: str) -> str:
        scaled = torch.tensor(made["statistics"]["std"]) * self._factor.flatten().cpu()
        if 1 / FAR < (rms := scaled.square().mean().sqrt().item()) < FAR:
            return ""
        return (
            f"autoencoder.std: latents of {where} have std {rms:.2g} once scaled, and noise has 1: "
            "must be left out, as autoencoder.mean, so that each channel is scaled"
        )

    def describe(self) -> str:
        self.load()
        return f"{type(self.vae).__name__} {weights_digest(self.vae)[:12]}"

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


class StableDiffusionVAE(DiffusersVAE):
    """Latents of Stable Diffusion's autoencoder (Rombach et al., 2022), scaled by one number.

    Args:
        path: See `DiffusersVAE`.
        scale: Latents are multiplied by it, so that they have about unit variance; 0.18215, that of
            Stable Diffusion, if neither it nor ``statistics`` is given.
        channels: Channels C of a latent.
        statistics: The ``latents.json`` beside the shards, whose mean and std are used instead.
        decode_batch: See `DiffusersVAE`.

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
        Autoencoder.__init__(self)
        if scale is not None and statistics is not None:
            raise UserError(f"scale={scale}: must be left out where statistics={statistics} are")
        if scale is not None:
            require("scale", scale, "(0, inf)")
        require("channels", channels, "[1, inf)")
        self.statistics_path, self.statistics = statistics, tuple[Tensor, ...]()
        mean = torch.zeros(channels)
        factor = torch.full((channels,), STABLE_DIFFUSION if scale is None else scale)
        if statistics is not None:
            mean, std = self.statistics = read_statistics(statistics, channels)
            factor = 1 / std
        self._take(path, mean, factor, decode_batch)

    @property
    def named(self) -> str:
        return f"channels={self.channels}"

    def check(self, made: dict[str, Any], where: str) -> None:
        theirs = [torch.tensor(made["statistics"][name]) for name in ("mean", "std")]
        if len(theirs[0]) == self.channels and not all(map(torch.equal, self.statistics, theirs)):
            raise UserError(f"statistics={self.statistics_path}: must be those of {where}")
        super().check(made, where)

    def advice(self, made: dict[str, Any], where: str) -> str:
        std = made["statistics"].get("std_of_all")
        if self.statistics or not isinstance(std, int | float) or not std > 0:
            return ""
        scale = float(self._factor.flatten()[0])
        if 1 / FAR < scale * std < FAR:
            return ""
        return (
            f"autoencoder.scale={scale:.5g}: latents of {where} have std {std:.3g}, "
            f"{scale * std:.2g} once scaled, and noise has 1: must be about {1 / std:.4g}; or give "
            f"autoencoder.statistics={where} instead, which scales each channel"
        )
