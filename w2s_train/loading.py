"""A module from one of its checkpoints, which may come from a stranger."""

import argparse
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from w2s_train.errors import UserError, one_line
from w2s_train.imports import instantiate
from w2s_train.models.saved import read_checkpoint

Module = TypeVar("Module", bound=nn.Module)


def load_module(cls: type[Module], path: str) -> Module:
    """The module as its checkpoint's settings and weights say.

    Which function builds it is decided here: the one that a checkpoint may name is ignored.

    Args:
        cls: Its class.
        path: A local checkpoint; tensors and plain values are read, and nothing else.

    Raises:
        UserError: It is missing, of the net, no checkpoint of ours, or names what may not be
            imported.
    """
    content: dict[str, Any] = read_checkpoint(path)
    settings = content.get("hyper_parameters")
    if not isinstance(settings, dict):
        raise UserError(f"path={path}: must be a checkpoint with the settings of its module")
    settings = {key: value for key, value in settings.items() if key != "_instantiator"}
    try:
        module: Any = instantiate(cls, settings)
        module.on_load_checkpoint(content)
        module.load_state_dict(content["state_dict"])
    except (argparse.ArgumentError, TypeError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"path={path}: must fit its own settings ({one_line(error)})") from error
    return module


def check_optimizer(optimizer: Callable[[Iterable[Tensor]], torch.optim.Optimizer]) -> None:
    """Optimizers check their arguments when they are built; do it before any work starts.

    Raises:
        UserError: It refuses them, or is none.
    """
    try:
        optimizer([nn.Parameter(torch.zeros(1))])
    except (TypeError, ValueError) as error:
        raise UserError(
            f"optimizer: {error}; it must be callable, and its rates must be finite and at least 0"
        ) from error
