"""Devices by name."""

import torch

from w2s_train.errors import UserError


def computing_device(name: str) -> torch.device:
    """A device that is there.

    Args:
        name: As torch has it, such as cuda:1.

    Raises:
        UserError: There is none of that name on this machine, or it has no memory.
    """
    if name.startswith("meta"):
        raise UserError(f"device={name}: must be a device that computes")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device={name}: must be a device of torch that is there") from error
