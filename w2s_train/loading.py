"""Settings of configs and checkpoints: which of them are gone, and modules built by them.

What they may name is decided in `imports`.
"""

import argparse
import inspect
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar, get_type_hints

import torch
from jsonargparse import ArgumentParser, Namespace, set_parsing_settings
from torch import nn

from w2s_train.checkpoint_file import read_checkpoint
from w2s_train.errors import UserError, one_line
from w2s_train.imports import ALLOWED, SWITCH, found, trusted, within

# What old configs and checkpoints name and nothing has any more, with the last commit that had it.
REMOVED: dict[str, dict[str, tuple[Any, str]]] = {  # class -> argument -> its default, the commit
    "w2s_train.segment.Extrapolation": {"share": (1.0, "b8536ed")},
}
LEAVES = (
    "must be leaves.LeavesScores, with PYTHONPATH=experiments/leaves and --allow_imports leaves "
    "(experiments/leaves/README.md); commit b8536ed ran it last"
)
MOVED = {  # class -> what to do instead
    "w2s_train.callbacks.LeavesScores": LEAVES,
    "w2s_train.callbacks.leaves.LeavesScores": LEAVES,
}
Made = TypeVar("Made")
Module = TypeVar("Module", bound=nn.Module)


def without_removed(node: Any, key: str = "") -> Any:
    """A config or settings, as plain values, less arguments that are gone and say nothing.

    Args:
        node: All of it, or a part; is changed in place.
        key: The dotted key of that part.

    Raises:
        UserError: Such an argument is not at its default, or a class has moved away.
    """
    if isinstance(node, dict):
        if isinstance(arguments := node.get("init_args"), dict):
            _remove(arguments, str(node.get("class_path")), key)
        for name, value in node.items():
            without_removed(value, f"{key}.{name}" if key else str(name))
    elif isinstance(node, list):
        for i, value in enumerate(node):
            without_removed(value, f"{key}[{i}]")
    elif isinstance(node, str) and node in MOVED:
        raise UserError(f"{key or 'class_path'}={node}: {MOVED[node]}")
    return node


def _remove(arguments: dict[str, Any], path: str, key: str) -> None:
    for name, (default, commit) in REMOVED.get(path, {}).items():
        value = arguments.pop(name, default)
        if value != default:
            raise UserError(
                f"{key}.init_args.{name}={value}: is gone, must be {default} or left out; commit "
                f"{commit} ran it last".removeprefix(".")
            )


def restrict_imports(args: list[str]) -> list[str]:
    """Let the parser import what is listed here, and what the switch in ``args`` adds.

    Returns:
        The arguments without the switch, of which the parser knows nothing.

    Raises:
        UserError: The switch names no package.
    """
    rest, more = list[str](), list[str]()
    given = iter(args)
    for arg in given:
        name, equals, value = arg.partition("=")
        if name == SWITCH:
            more += (value if equals else next(given, "")).split(",")
        else:
            rest.append(arg)
    for package in more:
        parts = package.split(".")
        if parts[0] == "jsonargparse" or not all(part.isidentifier() for part in parts):
            raise UserError(
                f"{SWITCH[2:]}={','.join(more)}: must name packages, such as my_package,other.part"
            )
    trusted[:] = more
    set_parsing_settings(
        config_read_mode_urls_enabled=False,
        config_read_mode_fsspec_enabled=False,  # which Lightning has switched on
        import_path_denylist=["*"],
        import_path_allowlist=ALLOWED + more,
        instantiate_subclass_spec_in_any=False,
    )
    return rest


def check_functions(config: Any) -> None:
    """Refuse class paths of functions, which would be called; only makers of networks may be.

    The list holds classes for what their constructors do, but functions stand beside them, such as
    one that opens a connection to wherever its arguments say.

    Args:
        config: As it was parsed.

    Raises:
        UserError: It names one.
    """
    for path in _class_paths(config):
        # What is not on the list is text that only looks like a class path; none is built of it.
        if within(path, trusted) or not within(path, ALLOWED):
            continue
        value = found(path)
        if value is None or inspect.isclass(value):
            continue
        made = get_type_hints(value).get("return") if inspect.isfunction(value) else None
        if not inspect.isclass(made) or not (
            issubclass(made, nn.Module) or hasattr(made, "null_class")  # of the protocol
        ):
            raise UserError(
                f"class_path={path}: must be a class, or a function that makes a network; "
                f"--allow_imports={path} allows it, if you trust its code"
            )


def same_class(one: Any, other: Any) -> bool:
    """Whether two class paths, of those that may be imported, name the same."""
    if one == other or not (isinstance(one, str) and isinstance(other, str)):
        return bool(one == other)
    if not all(within(path, ALLOWED + trusted) for path in (one, other)):
        return False
    return found(one) is not None and found(one) is found(other)


def _class_paths(node: Any) -> Iterator[str]:
    if isinstance(node, Namespace | dict):
        node = vars(node) if isinstance(node, Namespace) else node
        if isinstance(node.get("class_path"), str):
            yield node["class_path"]
        node = list(node.values())
    for value in node if isinstance(node, list | tuple) else ():
        yield from _class_paths(value)


def instantiate(
    cls: type[Made], settings: dict[str, Any], allow_imports: Iterable[str] = ()
) -> Made:
    """The class with its constructor's arguments as a config spells them.

    Args:
        cls: The class.
        settings: The arguments.
        allow_imports: Packages that they may name beside those of `imports`.

    Raises:
        UserError: They do not fit, or name what may not be imported.
    """
    restrict_imports([f"{SWITCH}={','.join(allow_imports)}"] if allow_imports else [])
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, "module", fail_untyped=False)
    config = parser.parse_object({"module": settings})
    check_functions(config)
    return parser.instantiate_classes(config).module


def load_module(cls: type[Module], path: str, allow_imports: Iterable[str] = ()) -> Module:
    """The module as its checkpoint's settings and weights say.

    Which function builds it is decided here: the one that a checkpoint may name is ignored.

    Args:
        cls: Its class.
        path: A local checkpoint; tensors and plain values are read, and nothing else.
        allow_imports: Packages of yours that its settings may name.

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
        module: Any = instantiate(cls, without_removed(settings), allow_imports)
        module.on_load_checkpoint(content)
        module.load_state_dict(content["state_dict"])
    except (argparse.ArgumentError, TypeError, ValueError, KeyError, RuntimeError) as error:
        if denied := re.search(r"Importing '(\w+)([\w.]*)' is not allowed", str(error)):
            raise UserError(
                f"path={path}: must fit its own settings, which name {denied[1]}{denied[2]}; "
                f"allow_imports=['{denied[1]}'] lets it be imported, if you trust its code"
            ) from error
        raise UserError(f"path={path}: must fit its own settings ({one_line(error)})") from error
    return module


def check_optimizer(
    optimizer: Callable[[Iterable[Any]], torch.optim.Optimizer],
) -> torch.optim.Optimizer:
    """Optimizers check their arguments when they are built; do it before any work starts.

    Returns:
        One of a parameter of its own.

    Raises:
        UserError: It refuses them, or is none.
    """
    try:
        return optimizer([nn.Parameter(torch.zeros(1))])
    except UserError as error:
        raise UserError(f"model.optimizer.init_args.{error}") from error
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"optimizer: {error}; it must be callable, and its rates must be finite and at least 0"
        ) from error


def optimizer_over(module: Any) -> torch.optim.Optimizer:
    """A module's ``optimizer`` over all that needs gradients, by name if it ``takes_names``."""
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    if getattr(check_optimizer(module.optimizer), "takes_names", False):
        return module.optimizer(named)
    return module.optimizer([p for _, p in named])
