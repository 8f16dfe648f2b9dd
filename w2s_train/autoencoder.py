"""From what the shards hold to what the network sees, and back to images.

Training calls `Autoencoder.encode`, validation `Autoencoder.decode`. Both see the whole batch.
Beside shards of latents lies a ``latents.json``, which ``data/encode_latents.py`` writes: what made
them, and their mean and std per channel.
"""

import abc
import hashlib
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from w2s_train.errors import UserError, needed, one_line, require
from w2s_train.files import expanded
from w2s_train.shards.samples import to_float
from w2s_train.shards.storage import Storage, is_pipe, is_remote, split_url

LATENTS = "latents.json"
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+(/[\w./-]+)?")
FAR = 1.5  # from 1, for the std of scaled latents; Stable Diffusion's are at 0.8 to 1 of photos
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


class StableDiffusionVAE(Autoencoder):
    """Latents of a diffusers ``AutoencoderKL`` (Rombach et al., 2022).

    Shards hold the posterior's moments, mean and log-variance (B, 2C, h, w), or samples of it
    (B, C, h, w). A latent z becomes the network's input by z ``scale``, or channel by channel by
    (z - mean) / std. Needs ``pip install -e ".[latents]"`` to decode; training does not load it.

    Args:
        path: Local folder of the autoencoder, or ``OWNER/NAME`` or ``OWNER/NAME/SUBFOLDER`` of the
            hub.
        scale: Latents are multiplied by it, so that they have about unit variance; 0.18215, that of
            Stable Diffusion, if neither it nor ``statistics`` is given.
        channels: Channels C of a latent.
        statistics: The ``latents.json`` beside the shards, whose mean and std are used instead.
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
        if scale is not None:
            require("scale", scale, "(0, inf)")
        for name, value in dict(channels=channels, decode_batch=decode_batch).items():
            require(name, value, "[1, inf)")
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
        wanted = f"channels={self.channels}: the shards hold"
        if stored.dtype == torch.uint8:
            raise UserError(f"{wanted} images, must be latents; data/encode_latents.py makes them")
        if stored.shape[1] not in (self.channels, 2 * self.channels):
            raise UserError(
                f"{wanted} {stored.shape[1]} channels, must be {self.channels} (latents) or "
                f"{2 * self.channels} (moments)"
            )
        z = to_float(stored)
        if stored.shape[1] == 2 * self.channels:
            mean, std = split_moments(z)
            z = mean + std * torch.randn_like(mean)
        # Moved once: a copy at every step would have the host wait for the device.
        self._mean, self._factor = self._mean.to(z.device), self._factor.to(z.device)
        return (z - self._mean) * self._factor

    def load(self) -> None:
        if self._loaded:
            return
        vae = load_autoencoder(self.path, "autoencoder.path")
        if (theirs := vae.config.latent_channels) != self.channels:
            raise UserError(f"channels={self.channels}: must be {theirs}, as {self.path} has")
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
            raise UserError(
                f"channels={self.channels}: must be {channels}, as {where} says of the shards"
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


def split_moments(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and std (B, C, h, w) of the posterior, from its mean and log-variance (B, 2C, h, w).

    The limits are those of diffusers' ``DiagonalGaussianDistribution``.
    """
    mean, log_variance = moments.chunk(2, dim=1)
    return mean, (log_variance.clamp(-30, 20) / 2).exp()


def load_autoencoder(path: str, name: str, revision: str | None = None) -> Any:
    """A diffusers ``AutoencoderKL`` in float32, frozen, from a folder or else from the hub.

    Args:
        path: The folder, or ``OWNER/NAME`` or ``OWNER/NAME/SUBFOLDER`` of the hub.
        name: What the user calls it.
        revision: Of the hub: a branch, a tag or a commit.

    Raises:
        UserError: diffusers or the weights are missing, or they do not fit.
    """
    folder = expanded(name, path)
    local = folder.is_dir()
    if not local and not HUB_NAME.fullmatch(path):
        raise UserError(f"{name}={path}: must be an existing folder, or OWNER/NAME of the hub")
    with needed("diffusers", f"{name}={path}"):
        from diffusers import AutoencoderKL  # optional, and takes seconds to import
        from diffusers.utils import logging
    parts = path.split("/")
    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)  # what it would log is in the error
    try:
        vae, report = AutoencoderKL.from_pretrained(
            str(folder) if local else "/".join(parts[:2]),
            subfolder=None if local else "/".join(parts[2:]) or None,
            revision=revision,
            local_files_only=local,
            use_safetensors=True,  # and no pickle
            torch_dtype=torch.float32,
            low_cpu_mem_usage=False,  # the other way needs accelerate
            output_loading_info=True,
        )
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        where = "folder" if local else "folder, or a name on the hub that can be reached,"
        raise UserError(
            f"{name}={path}: must be a {where} with an AutoencoderKL ({one_line(error)})"
        ) from error
    finally:
        logging.set_verbosity(before)
    if missing := sorted(report["missing_keys"]):  # they would stay random
        raise UserError(
            f"{name}={path}: must hold all weights of its AutoencoderKL; "
            f"{len(missing)} are missing, such as {missing[0]}"
        )
    return vae.requires_grad_(False).eval()


def weights_digest(vae: nn.Module) -> str:
    """Hexadecimal sha256 of the state dict: names, in order, each with its values as float32."""
    sha256 = hashlib.sha256()
    for name, value in sorted(vae.state_dict().items()):
        sha256.update(f"{name} {tuple(value.shape)}\n".encode())
        sha256.update(value.float().cpu().contiguous().numpy().tobytes())
    return sha256.hexdigest()


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
