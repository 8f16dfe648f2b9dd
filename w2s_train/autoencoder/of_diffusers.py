"""Autoencoders of images in diffusers' files: how they are found and read."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from w2s_train.errors import UserError, needed, one_line
from w2s_train.files import expanded

HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+(/[\w./-]+)?")
CONFIG = "config.json"
STABLE_DIFFUSION = 0.18215  # 1 / std of its latents (Rombach et al., 2022)
# Of images; the first has a posterior, the second (Chen et al., 2024: f32 and more) one latent.
KINDS = ("AutoencoderKL", "AutoencoderDC")


def place_of(path: str, name: str) -> tuple[str, str | None]:
    """Folder, or hub name, and the sub-folder there.

    Raises:
        UserError: Neither.
    """
    folder = expanded(name, path)
    if folder.is_dir():
        return str(folder), None
    if not HUB_NAME.fullmatch(path):
        raise UserError(f"{name}={path}: must be an existing folder, or OWNER/NAME of the hub")
    owner, repository, *inside = path.split("/")
    return f"{owner}/{repository}", "/".join(inside) or None


def read_config(path: str, name: str, revision: str | None = None) -> dict[str, Any]:
    """The config of an autoencoder; of its files no other is read.

    Args:
        path: A folder, or ``OWNER/NAME`` or ``OWNER/NAME/SUBFOLDER`` of the hub.
        name: What the user calls it.
        revision: Of the hub: a branch, a tag or a commit.

    Raises:
        UserError: It is not there, or is that of something else.
    """
    where, inside = place_of(path, name)
    local = Path(where).is_dir()
    try:
        if local:
            file = Path(where, CONFIG)
        else:
            from huggingface_hub import hf_hub_download  # brought by timm

            file = Path(hf_hub_download(where, CONFIG, subfolder=inside, revision=revision))
        config = dict(json.loads(file.read_text()))
    except (OSError, ValueError, TypeError) as error:
        kind = "folder" if local else "folder, or a name on the hub that can be reached,"
        raise UserError(
            f"{name}={path}: must be a {kind} with an {KINDS[0]} and its {CONFIG} "
            f"({one_line(error)})"
        ) from error
    if (found := config.get("_class_name")) not in KINDS:
        raise UserError(f"{name}={path}: must hold an {' or an '.join(KINDS)}, holds {found}")
    return config


def load_autoencoder(path: str, name: str, revision: str | None = None) -> Any:
    """One of diffusers' autoencoders in float32, frozen, from a folder or else from the hub.

    Args:
        path: The folder, or ``OWNER/NAME`` or ``OWNER/NAME/SUBFOLDER`` of the hub.
        name: What the user calls it.
        revision: Of the hub: a branch, a tag or a commit.

    Raises:
        UserError: diffusers or the weights are missing, or they do not fit.
    """
    where, inside = place_of(path, name)
    with needed("diffusers", f"{name}={path}"):
        import diffusers  # optional, and takes seconds to import
        from diffusers.utils import logging
    kind = read_config(path, name, revision)["_class_name"]
    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)  # what it would log is in the error
    try:
        vae, report = getattr(diffusers, kind).from_pretrained(
            where,
            subfolder=inside,
            revision=revision,
            local_files_only=Path(where).is_dir(),
            use_safetensors=True,  # and no pickle
            torch_dtype=torch.float32,
            low_cpu_mem_usage=False,  # the other way needs accelerate
            output_loading_info=True,
        )
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(
            f"{name}={path}: must be a folder with an {kind}, or one on the hub that can be "
            f"reached ({one_line(error)})"
        ) from error
    finally:
        logging.set_verbosity(before)
    if missing := sorted(report["missing_keys"]):  # they would stay random
        raise UserError(
            f"{name}={path}: must hold all weights of its {kind}; "
            f"{len(missing)} are missing, such as {missing[0]}"
        )
    return vae.requires_grad_(False).eval()


def normalization(config: dict[str, Any], name: str) -> tuple[list[float], list[float]]:
    """Mean and std, (C,) each, with which a latent z becomes (z - mean) / std.

    Of each channel where the makers have measured them (``latents_mean``, ``latents_std``), else
    ``shift_factor`` and 1 / ``scaling_factor``.

    Args:
        config: Of an autoencoder.
        name: ``key=value`` of what it is of, for the message.

    Raises:
        UserError: They do not fit the channels.
    """
    channels: int = config["latent_channels"]
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is None or std is None:
        usual = {"AutoencoderKL": STABLE_DIFFUSION, "AutoencoderDC": 1.0}[config["_class_name"]]
        scale = config.get("scaling_factor", usual)
        mean = [config.get("shift_factor") or 0.0] * channels
        std = [1 / scale] * channels
    mean, std = ([float(x) for x in torch.tensor(each).flatten()] for each in (mean, std))
    if not len(mean) == len(std) == channels:
        raise UserError(f"{name}: must have latents_mean and latents_std of {channels} channels")
    return mean, std


def shrinks_by(vae: Any) -> int:
    """Pixels to a latent cell, along each side."""
    config = vae.config
    levels = config.get("block_out_channels") or config.encoder_block_out_channels
    return int(2 ** (len(levels) - 1))


def encode_images(vae: Any, x: Tensor) -> Tensor:
    """Of images (B, 3 or 1, H, W) in [-1, 1], what is stored: see `posterior`."""
    found = vae.encode(x)
    return found.latent_dist.parameters if hasattr(found, "latent_dist") else found.latent


def posterior(stored: Tensor, channels: int) -> tuple[Tensor, Tensor | None]:
    """Mean and std (B, C, h, w) of what is stored; None where that is a latent itself.

    The limits of moments are those of diffusers' ``DiagonalGaussianDistribution``.

    Args:
        stored: Moments, mean and log-variance (B, 2C, h, w), or latents (B, C, h, w).
        channels: C.
    """
    if stored.shape[1] == channels:
        return stored, None
    mean, log_variance = stored.chunk(2, dim=1)
    return mean, (log_variance.clamp(-30, 20) / 2).exp()


def weights_digest(vae: nn.Module) -> str:
    """Hexadecimal sha256 of the state dict: names, in order, each with its values as float32."""
    sha256 = hashlib.sha256()
    for name, value in sorted(vae.state_dict().items()):
        sha256.update(f"{name} {tuple(value.shape)}\n".encode())
        sha256.update(value.float().cpu().contiguous().numpy().tobytes())
    return sha256.hexdigest()
