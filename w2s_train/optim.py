"""Around an optimizer step: the gradient's norm, clipping, steps that are passed over, and numbers
that the host reads without waiting for what the device has still to do.
"""

from typing import Any

import torch
from torch import Tensor, nn

Optimizer = torch.optim.Optimizer


def parameters_of(optimizer: Optimizer) -> list[nn.Parameter]:
    """Those that have a gradient."""
    groups = optimizer.param_groups
    return [p for group in groups for p in group["params"] if p.grad is not None]


def norm_of(optimizer: Optimizer) -> Tensor:
    """The norm () of all gradients together."""
    return nn.utils.get_total_norm([p.grad for p in parameters_of(optimizer)])  # type: ignore[misc]


def clip(optimizer: Optimizer, norm: Tensor, limit: float | None, algorithm: str | None) -> None:
    """Clip gradients as Lightning's ``gradient_clip_val`` and ``gradient_clip_algorithm`` say."""
    if limit and algorithm in (None, "norm"):
        nn.utils.clip_grads_with_norm_(parameters_of(optimizer), limit, norm)
    elif limit:
        nn.utils.clip_grad_value_(parameters_of(optimizer), limit)


def keep_fused(optimizer: Any, state: dict[str, Any]) -> None:
    """Before ``state`` is loaded: whether steps are fused is said by the config, not by a file."""
    for theirs, ours in zip(state["param_groups"], optimizer.param_groups, strict=False):
        if "fused" in ours:
            theirs["fused"] = ours["fused"]


def unscale(optimizer: Optimizer, scaler: Any) -> None:
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
        ``good``; a bool if the host knows now.
    """
    fused = all(group.get("fused") for group in optimizer.param_groups)
    if isinstance(good, Tensor) and not fused:
        good = bool(good)
    if fused:
        optimizer.found_inf = (~good).float() if isinstance(good, Tensor) else None
    if good is False:
        optimizer.zero_grad(set_to_none=True)
    return good


class Readback:
    """Numbers on their way from a device to the host.

    An accelerator works behind the host's back; to look at a result as soon as it is asked for
    stops both. The copy that begins here waits in the device's queue, and who takes the numbers a
    step later finds them there. On the CPU they are there at once.

    Args:
        values: (n,), or () for one.
    """

    def __init__(self, values: Tensor) -> None:
        self.values, self.arrival = values.reshape(-1), None
        if values.is_cuda:
            source, self.values = self.values, torch.empty(values.numel(), pin_memory=True)
            self.values.copy_(source, non_blocking=True)
            self.arrival = torch.cuda.Event()
            self.arrival.record()

    @property
    def there(self) -> bool:
        """Whether `take` would not wait."""
        return self.arrival is None or self.arrival.query()

    def take(self) -> list[float]:
        """The numbers."""
        if self.arrival is not None:
            self.arrival.synchronize()
        return self.values.tolist()


def send(numbers: list[float], device: torch.device) -> Tensor:
    """Numbers of the host as a tensor (n,) float32 on ``device``."""
    pinned = torch.tensor(numbers, dtype=torch.float32, pin_memory=device.type == "cuda")
    return pinned.to(device, non_blocking=True)
