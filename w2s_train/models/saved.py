"""Networks from the checkpoints of our own runs."""

from typing import Any, Literal

from w2s_train.checkpoint_file import read_file
from w2s_train.errors import UserError
from w2s_train.models.dit import DiT

PREFIX = {"ema": "ema.module.", "raw": "network."}


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
