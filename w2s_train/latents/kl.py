"""An ``AutoencoderKL`` of diffusers: loaded, named by its weights, and its posterior."""

import hashlib
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from w2s_train.errors import UserError, one_line

HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+(/[\w./-]+)?")


def load_autoencoder(path: str, name: str, revision: str | None = None) -> Any:
    """A diffusers ``AutoencoderKL`` in float32, frozen, from a folder or else from the hub.

    Args:
        path: The folder, or ``OWNER/NAME`` or ``OWNER/NAME/SUBFOLDER`` of the hub.
        name: What the user calls it.
        revision: Of the hub: a branch, a tag or a commit.

    Raises:
        UserError: diffusers or the weights are missing, or they do not fit.
    """
    local = Path(path).expanduser().is_dir()
    if not local and not HUB_NAME.fullmatch(path):
        raise UserError(f"{name}={path}: must be an existing folder, or OWNER/NAME of the hub")
    try:
        from diffusers import AutoencoderKL  # optional, and takes seconds to import
        from diffusers.utils import logging
    except (ImportError, RuntimeError) as error:  # it wraps errors of what it imports
        raise UserError(
            f"{name}={path}: needs diffusers, which cannot be imported ({one_line(error)}); "
            "pip install diffusers"
        ) from error
    folder = str(Path(path).expanduser()) if local else "/".join(path.split("/")[:2])
    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)  # what it would log is in the error
    try:
        vae, report = AutoencoderKL.from_pretrained(
            folder,
            subfolder=None if local else "/".join(path.split("/")[2:]) or None,
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


def split_moments(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and std (B, C, h, w) of the posterior, from its mean and log-variance (B, 2C, h, w).

    The limits are those of diffusers' ``DiagonalGaussianDistribution``.
    """
    mean, log_variance = moments.chunk(2, dim=1)
    return mean, (log_variance.clamp(-30, 20) / 2).exp()
