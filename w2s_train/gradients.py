"""What is done with gradients between the backward pass and the optimizer."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn


def norm_of(parameters: Sequence[nn.Parameter]) -> Tensor:
    """The norm () of all gradients together."""
    return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


def clip(
    parameters: Sequence[nn.Parameter], norm: Tensor, limit: float | None, algorithm: str | None
) -> None:
    """Clip gradients as Lightning's ``gradient_clip_val`` and ``gradient_clip_algorithm`` say."""
    if limit and algorithm in (None, "norm"):
        nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    elif limit:
        nn.utils.clip_grad_value_(parameters, limit)


def keep_fused(optimizer: Any, state: dict[str, Any]) -> None:
    """Before a state is loaded: whether steps are fused is said by the config, and not by a file.

    Args:
        optimizer: Which gets it.
        state: The optimizer's state dict.
    """
    for theirs, ours in zip(state["param_groups"], optimizer.param_groups, strict=False):
        if "fused" in ours:
            theirs["fused"] = ours["fused"]


def unscale(optimizer: Any, scaler: Any) -> None:
    """Undo float16's loss scaling, if there is one, before anyone looks at gradients.

    The trainer leaves that to fused optimizers themselves, in their step; for others it is done.
    """
    if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
        scaler.unscale_(optimizer)


def step_only_if(good: bool | Tensor, optimizer: Any) -> bool | Tensor:
    """Have the optimizer pass over its next step, states included, unless that is good.

    Fused optimizers can learn that on the device, for the sake of float16's loss scaling; for
    others the host has to wait until it knows.

    Args:
        good: Whether it is; () bool where the host does not know yet.
        optimizer: The optimizer.

    Returns:
        The same; a bool if the host knows now.
    """
    fused = all(group.get("fused") for group in optimizer.param_groups)
    if isinstance(good, Tensor) and not fused:
        good = bool(good)
    if fused:
        optimizer.found_inf = (~good).float() if isinstance(good, Tensor) else None
    if good is False:
        optimizer.zero_grad(set_to_none=True)
    return good
