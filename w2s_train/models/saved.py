"""Networks from the checkpoints of our own runs."""

from pathlib import Path
from typing import Any, Literal

import torch

from w2s_train.errors import UserError
from w2s_train.models.dit import DiT

PREFIX = {"ema": "ema.module.", "raw": "network."}


def check_local(path: str, name: str) -> None:
    """Refuse a checkpoint of the net: what a file holds is trusted as far as who can write it.

    Raises:
        UserError: It is a URL.
    """
    if "://" in path or path.startswith(("http:", "https:", "file:")):
        raise UserError(f"{name}={path}: must be a local file, and no URL")


def read_file(path: str) -> dict[str, Any]:
    """What `torch.save` wrote as a dict: tensors and plain values only.

    Raises:
        UserError: A file that is missing, truncated, or something else.
    """
    check_local(path, "path")
    if not Path(path).is_file():
        raise UserError(f"path={path}: must be an existing file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of many types: what a broken pickle raises depends on its bytes
        raise UserError(
            f"path={path}: cannot be read ({type(error).__name__}); must be a whole checkpoint"
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"path={path}: must hold a dict, such as a state dict")
    return content


def read_checkpoint(path: str) -> dict[str, Any]:
    """The content of a checkpoint of ours.

    Raises:
        UserError: A file that is missing, truncated, or no checkpoint of ours.
    """
    content = read_file(path)
    if not all(isinstance(content.get(key), dict) for key in ("state_dict", "network")):
        raise UserError(f"path={path}: must be a checkpoint of w2s_train")
    return content


def saved_network(path: str, weights: Literal["ema", "raw"] = "ema") -> DiT:
    """The network of a run.

    Args:
        path: A checkpoint (``runs/NAME/checkpoints/*.ckpt``).
        weights: Its running average ("ema") or its live weights ("raw").

    Raises:
        UserError: A file that is missing, truncated, or no checkpoint of ours.
    """
    content, prefix = read_checkpoint(path), PREFIX[weights]
    state = {
        key.removeprefix(prefix): value
        for key, value in content["state_dict"].items()
        if key.startswith(prefix)
    }
    try:
        network = DiT(**content["network"])
        network.load_state_dict(state)
    except (TypeError, RuntimeError) as error:
        raise UserError(f"path={path}: must hold {weights} weights of its own network") from error
    return network
