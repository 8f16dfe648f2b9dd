"""Configs that cannot be meant, and what to tell who wrote them."""

import inspect
import json
import math
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml

from w2s_train.errors import UserError, one_line

COUNTS = (
    "val_check_interval",
    "check_val_every_n_epoch",
    "log_every_n_steps",
    "accumulate_grad_batches",
)
ALIASES = 20  # of YAML, in one file
RATES = ("lr", "weight_decay", "gradient_clip_val")


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
    """Refuse numbers that no setting can mean.

    Raises:
        UserError: Not a number; or a rate that is negative or infinite.
    """
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
    """Only who types the command may let it run others; a config may come from anybody.

    Raises:
        UserError: ``data.allow_pipe`` is true, and the arguments themselves do not say so.
    """
    line = " ".join(args)
    if allowed and not re.search(r"(^| )--data\.allow_pipe[ =]true( |$)", line, re.IGNORECASE):
        raise UserError(
            "data.allow_pipe=true: must be given on the command line, --data.allow_pipe=true"
        )


def locate(message: str, config: Any) -> str:
    """A constructor's message ``name=value: rule`` with the name's full key, where it is found.

    Where a value may be one of several types, the parser lists an error for each, one a line.
    """
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
        return f"{line}; keys are {', '.join(parts)}, seed_everything, ckpt_path"
    return line


def _parameters(function: Any) -> str:
    return ", ".join(name for name in inspect.signature(function).parameters if name != "kwargs")


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a mapping with the same key twice, of which YAML would keep the last."""

    def compose_node(self, *where: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            self.aliases = getattr(self, "aliases", 0) + 1
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


def check_files(args: list[str]) -> None:
    """Refuse configs, and files that they name for a part, which are no YAML or have a key twice.

    Raises:
        UserError: One is.
    """
    for option, value in zip(args, [*args[1:], ""], strict=True):
        if option in ("-c", "--config"):
            _check_file(Path(value))
        elif option.startswith(("-c", "--config=")):
            _check_file(Path(option.removeprefix("--config=").removeprefix("-c")))


def _check_file(path: Path) -> None:
    if not path.is_file():
        return
    try:
        content = yaml.load(path.read_text("utf-8"), _UniqueKeys)
        json.dumps(content, default=str, skipkeys=True)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        # also: not UTF-8, lists as keys, a mapping that contains itself
        raise UserError(f"{path}: must be YAML; {one_line(error)}") from error
    for value in content.values() if isinstance(content, dict) else ():
        if isinstance(value, str) and value.endswith((".yaml", ".yml")):
            _check_file(path.parent / value)


def check_label_dropout(label_dropout: float, segments: Any, guidances: list[Any]) -> None:
    """Refuse what would compare with and without a label where one of the two is never trained.

    Raises:
        UserError: It names the weak source or the guidance.
    """
    sources = [segment.weak for segment in segments]
    users = [part for part in [*sources, *guidances] if part.needs_label]
    if label_dropout == 1 and users:
        raise UserError(
            f"label_dropout={label_dropout}: must be below 1 for {type(users[0]).__name__}, which "
            "compares with and without the label"
        )
    for weak in sources:
        if weak.needs_label and label_dropout == 0:
            raise UserError(
                f"label_dropout={label_dropout}: must be above 0 for {type(weak).__name__}: the "
                "null class would never be trained"
            )
