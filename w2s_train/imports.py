"""What configs and checkpoints may name: classes of this project, and what trainers are made of.

A class path is an order to import and to call. Of everything that is installed, few things are safe
to call with arguments of a stranger's choice; those stand here. The switch ``--allow_imports`` adds
packages, on the command line and nowhere else: a config cannot allow itself anything. A module is
built from its checkpoint, which may come from a stranger, by the same rules.
"""

import inspect
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from w2s_train.errors import UserError

SWITCH = "--allow_imports"
OURS = """
    align autoencoder callbacks consistency features guidance inbuilt interpolant look_on metrics
    models muon objective sampler schedule segment text2image time_shift timesteps weak
"""
TRAINERS = "accelerators callbacks loggers plugins profilers strategies cli.ReduceLROnPlateau"
ALLOWED = [
    *(f"w2s_train.{name}" for name in OURS.split()),
    *(f"lightning.pytorch.{name}" for name in TRAINERS.split()),
    "lightning.fabric.plugins",  # where environments and the writing of checkpoints are defined
    "torch.optim",
    "diffusers.guiders",
]
trusted = list[str]()  # packages that the switch adds


def within(path: str, packages: list[str]) -> bool:
    """Whether an import path is one of these packages, or in one."""
    return any(f"{path}.".startswith(f"{package}.") for package in packages)


def found(path: str) -> Any:
    """What an import path names; None if there is no such thing."""
    value: Any = None
    done = ""
    for part in path.split("."):
        done += f".{part}" if done else part
        value = getattr(value, part, None)
        if value is None:
            try:
                value = import_module(done)
            except ImportError:
                return None
    return value


def network_class(path: str, more: Sequence[str] = ()) -> Any:
    """The class of a network that a checkpoint names, of ours or of a package that is trusted.

    Args:
        path: Where it is defined.
        more: Packages that are trusted this time, beside those of the switch.

    Raises:
        UserError: It may not be imported, or is no class.
    """
    if not within(path, ["w2s_train.models", *trusted, *more]):
        package = path.partition(".")[0]
        raise UserError(
            f"class_path={path}: may not be imported; {SWITCH}={package} allows it, if you trust "
            "its code; in Python, allow_imports, or give the network"
        )
    cls = found(path)
    if not inspect.isclass(cls):
        raise UserError(f"class_path={path}: must be the class of a network that can be imported")
    return cls
