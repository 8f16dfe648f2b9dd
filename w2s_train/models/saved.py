"""Networks from the checkpoints of our own runs."""

from collections.abc import Sequence
from typing import Any, Literal

from w2s_train.checkpoint_file import read_checkpoint
from w2s_train.errors import UserError, one_line
from w2s_train.imports import network_class
from w2s_train.models.dit import DiT
from w2s_train.models.network import Network

PREFIX = {"ema": "ema.module.", "raw": "network."}


def made_of(network: Network) -> dict[str, Any] | None:
    """What rebuilds a network, ``class_path`` and ``init_args``; None of one without arguments."""
    arguments = getattr(network, "arguments", None)
    if arguments is None:
        return None
    return {"class_path": class_path(network), "init_args": dict(arguments)}


def check_scales(made: dict[str, Any] | None, network: Network) -> None:
    """Refuse weights whose scales have other names, or another order, than those of a network.

    Args:
        made: `made_of` the network that had the weights.
        network: What takes them.

    Raises:
        UserError: They have.
    """
    ours, theirs = (
        getattr(network, "scales", []),
        ((made or {}).get("init_args") or {}).get("scales"),
    )
    if ours and theirs and ours != theirs:
        raise UserError(
            f"network.scales={ours}: must be {theirs}, as in the checkpoint: name and order the "
            "segments alike"
        )


def class_path(network: Any) -> str:
    """Where its class is defined."""
    return f"{type(network).__module__}.{type(network).__qualname__}"


def saved_network(
    path: str,
    weights: Literal["ema", "raw"] = "ema",
    network: Network | None = None,
    allow_imports: Sequence[str] = (),
) -> Network:
    """The network of a run.

    Args:
        path: A checkpoint (``runs/NAME/checkpoints/*.ckpt``).
        weights: Its running average ("ema") or its live weights ("raw").
        network: What takes the weights; None builds it, as its ``arguments`` say.
        allow_imports: Packages of yours that its class may lie in, for this call.

    Raises:
        UserError: A file that is missing, truncated, or no checkpoint of ours; a network that is
            not given and cannot be built, or one given whose scales are others.
    """
    content, prefix = read_checkpoint(path), PREFIX[weights]
    state = {
        key.removeprefix(prefix): value
        for key, value in content["state_dict"].items()
        if key.startswith(prefix)
    }
    try:
        network = network or _rebuilt(content["network"], path, allow_imports)
        check_scales(content.get("network"), network)
        network.load_state_dict(state)
    except (TypeError, RuntimeError) as error:
        raise UserError(
            f"path={path}: must hold {weights} weights of its own network ({one_line(error)[:200]})"
        ) from error
    return network


def _rebuilt(made: dict[str, Any] | None, path: str, allow_imports: Sequence[str]) -> Network:
    if made is None:
        raise UserError(f"path={path}: its network has no arguments to build it by; must be given")
    if "class_path" not in made:  # of an older version
        return DiT(**made)
    return network_class(made["class_path"], allow_imports)(**made["init_args"])
