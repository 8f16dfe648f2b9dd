"""Configs that cannot be meant, and what to tell who wrote them.

What `check_arguments` finds is said before torch is loaded, so nothing heavy is imported here.
"""

import difflib
import inspect
import json
import math
import os
import pkgutil
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml

from w2s_train.errors import UserError, one_line

PARTS = "trainer model data checkpoint guard watch".split()
# The first word of every key, and the options that are no keys.
KEYS = """
    seed_everything ckpt_path weights_only verbose return_predictions
    output format seeds classes columns scale urls dataset split keep_features statistics images
    config print_config help allow_imports profile $schema
""".split()
# How the parser, or a package of ours, says that a class is missing.
NO_CLASS = r"module '([\w.]+)' has no attribute '(\w+)'|no file of ([\w.]+) defines (\w+)"
ALIASES = 20  # of YAML, in one file
COUNTS = (
    "val_check_interval",
    "check_val_every_n_epoch",
    "log_every_n_steps",
    "accumulate_grad_batches",
)
RATES = ("lr", "weight_decay", "gradient_clip_val")


class StrictLoader(yaml.SafeLoader):
    """Refuses a mapping with the same key twice, of which YAML would keep the last, and bombs."""

    aliases = 0

    def compose_node(self, *where: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            self.aliases += 1
            if self.aliases > ALIASES:
                raise UserError(f"*: must stand at most {ALIASES} times: aliases grow like powers")
        return super().compose_node(*where)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                line = key.start_mark.line + 1
                raise UserError(f"{key.value}: stands twice, again in line {line}; must stand once")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def check_arguments(args: list[str]) -> None:
    """Refuse files, and first words of keys, that cannot be meant."""
    for option, following in zip(args, [*args[1:], ""], strict=True):
        name, equals, value = option.partition("=")
        value = value if equals else following
        if name in ("-c", "--config"):
            _check_config(value)
        elif option.startswith("-c"):
            _check_config(option[2:])
        elif option.startswith("--") and len(option) > 2:
            _check_key(name[2:], f"unrecognized arguments: {option}")
            _check_part(Path(value))


def _check_config(value: str) -> None:
    if not os.path.isfile(value):
        if ": " in value:
            return  # no path, but YAML itself: the parser reads it
        raise UserError(f"config={value}: must be an existing file")
    content = _read(Path(value))
    if not isinstance(content, dict):
        raise UserError(f"config={value}: must hold keys with values")
    for key, part in content.items():
        _check_key(str(key), f"{value}: does not accept option '{key}'")
        if isinstance(part, str):
            _check_part(Path(value).parent / part)


def _check_part(path: Path) -> None:
    if path.suffix in (".yaml", ".yml") and os.path.isfile(path):
        _read(path)


def _check_key(key: str, message: str) -> None:
    if key.partition(".")[0].rstrip("+") not in [*PARTS, *KEYS]:
        raise UserError(f"{message}; {_keys()}")


def _keys() -> str:
    return f"keys are {', '.join(PARTS)}, seed_everything, ckpt_path"


def _read(path: Path) -> Any:
    try:
        content = yaml.load(path.read_text("utf-8"), StrictLoader)
        json.dumps(content, default=str, skipkeys=True)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except (OSError, yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        # also: not UTF-8, lists as keys, a mapping that contains itself
        raise UserError(f"{path}: must be YAML; {one_line(error)}") from error
    return content


def walk(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """All leaves and lists of a parsed config with their dotted keys."""
    if hasattr(node, "as_dict"):
        node = vars(node)
    if isinstance(node, dict):
        for key, value in node.items():
            yield from walk(value, f"{path}.{key}" if path else key)
    elif isinstance(node, list | tuple):
        yield path, list(node)
        for i, value in enumerate(node):
            yield from walk(value, f"{path}[{i}]")
    else:
        yield path, node


def check_numbers(config: Any) -> None:
    """Refuse numbers that no setting can mean."""
    for key, value in walk(config):
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if math.isnan(value):
            raise UserError(f"{key}={value}: must be a number")
        name = key.split(".")[-1]
        if key == "seed_everything" and not 0 <= value < 2**32:
            raise UserError(f"{key}={value}: must be in [0, {2**32 - 1}]")
        if key == "trainer.max_steps" and value == 0:
            raise UserError(f"{key}={value}: must be at least 1, or -1 for no end")
        if name in COUNTS and (value < 1 or value != int(value)):
            raise UserError(f"{key}={value}: must be a whole number of steps, at least 1")
        if name in RATES and not 0 <= value < math.inf:
            raise UserError(f"{key}={value}: must be a finite number, at least 0")


def check_pipe(allowed: bool, args: list[str]) -> None:
    """Only who types the command may let it run others; a config may come from anybody."""
    line = " ".join(args)
    if allowed and not re.search(r"(^| )--data\.allow_pipe[ =]true( |$)", line, re.IGNORECASE):
        raise UserError(
            "data.allow_pipe=true: must be given on the command line, --data.allow_pipe=true"
        )


def locate(message: str, config: Any) -> str:
    """A constructor's message ``name=value: rule`` with the name's full key, where it is found.

    Where a value may be one of several types, the parser lists an error for each, one a line.
    """
    if missing := re.search(r"class_path '([\w.]+)':\s+Requirement '([\w-]+)", message):
        return f"class_path={missing[1]}: needs a package; pip install {missing[2]}"
    found = re.search(r"^(?:- )?\s*(?:- )?((\w+)=(.*?): .*)$", message, re.MULTILINE)
    if not found:
        return " ".join(message.split())
    line, name, value = found.groups()
    for key, leaf in walk(config):
        if key.split(".")[-1] == name and str(leaf) == value:
            return key.removesuffix(name) + line
    return line


def explain(message: str, parts: dict[str, Any]) -> str:
    """An error of the parser as one line, with what would have been accepted.

    Args:
        message: The error, of any number of lines.
        parts: The classes behind the top-level keys.
    """
    line = " ".join(message.replace("Parser key ", "").split())
    if denied := re.search(r"Importing '([\w.]+)' is not allowed", line):
        return (
            f"class_path={denied[1]}: must be a class of w2s_train, torch.optim or Lightning's "
            f"trainer; --allow_imports={denied[1].split('.')[0]} allows it, if you trust its code"
        )
    if missing := re.search(NO_CLASS, line):
        module, name = missing[1] or missing[3], missing[2] or missing[4]
        return f"class_path={module}.{name}: there is no such class; {_classes(module, name)}"
    # Of a value that may have one of several types, the reasons are enough.
    line = re.sub(r"Does not validate against any of the Union subtypes .*?Errors: ", "", line)
    line = re.sub(r" - Expected a <class 'NoneType'>| Given value type: <class '[^']*'>", "", line)
    if unknown := re.search(r"class_path '([\w.]+)': Option '[\w.]+' is not accepted", line):
        module, _, name = unknown[1].rpartition(".")
        return f"{line}; {name} accepts {_parameters(getattr(import_module(module), name))}"
    if unknown := re.search(r"(?:option '|unrecognized arguments: --)([\w.]+)", line):
        part = unknown[1].split(".")[0]
        if part in parts:
            return f"{line}; {part} accepts {_parameters(parts[part])}"
        return f"{line}; {_keys()}"
    return line


def _classes(module: str, name: str) -> str:
    """Which classes of a module, or of the files of ours, have names like one that is missing."""
    found = import_module(module)
    files = [found]
    if module.startswith("w2s_train"):
        under = pkgutil.iter_modules(getattr(found, "__path__", []))
        files += [import_module(f"{module}.{file.name}") for file in under]
    names = {
        each for file in files for each, value in vars(file).items() if isinstance(value, type)
    }
    like = difflib.get_close_matches(name, sorted(names), n=3, cutoff=0.5)
    return f"{module} has {', '.join(like)}" if like else f"{module} has none of a similar name"


def _parameters(function: Any) -> str:
    return ", ".join(name for name in inspect.signature(function).parameters if name != "kwargs")
