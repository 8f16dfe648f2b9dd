"""Keys inside lists, which the parser does not take: ``--model.objective.segments.0.scale 0.4``.

They apply in their order, when all configs and all other options are merged: each list that they
change goes to the parser once more, as a last option. An item is named by its index, or by the
``name`` that it has; a class need not have its ``init_args`` spelled.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import yaml

from w2s_train.errors import UserError

ITEM = re.compile(r"\.(-?[0-9]+|callbacks\.[A-Z]\w*)(\.|$)")  # an index, or a class: refused


class ListKey(NamedTuple):
    """One of the command line, as it was given."""

    key: str
    value: str

    def __str__(self) -> str:
        return f"{self.key}={self.value}"


def split(args: list[str]) -> tuple[list[str], list[ListKey]]:
    """The other arguments, and those that set a key inside a list.

    Raises:
        UserError: One has no value.
    """
    rest, found = list[str](), list[ListKey]()
    given = iter(args)
    # What follows `--...segments+=` sets the item that it adds: the parser's own way.
    adds = any(arg.partition("=")[0].endswith(".segments+") for arg in args)
    for arg in given:
        key, equals, value = arg.partition("=")
        parts = key.removeprefix("--").split(".")
        inside = ITEM.search(key) or "segments" in parts[: -2 if adds else -1]
        if not (inside and key.startswith("--")):
            rest.append(arg)
            continue
        value = value if equals else next(given, "--")
        if not equals and value.startswith("--"):
            raise UserError(f"{key.removeprefix('--')}: must have a value")
        found.append(ListKey(key.removeprefix("--"), value))
    return rest, found


def options(config: dict[str, Any], given: list[ListKey], read: Callable[[str], Any]) -> list[str]:
    """Options that set the lists as the keys change them.

    Args:
        config: All else, as plain values; is changed.
        given: The keys.
        read: What a parser reads a value with.

    Raises:
        UserError: There is no such list, or no such item.
    """
    lists = dict[str, Any]()
    for each in given:
        try:
            value = read(each.value)
        except yaml.YAMLError:
            value = each.value
        lists |= _put(config, each, value)
    return [f"--{key}={_flow(value)}" for key, value in lists.items()]


def emptied(given: list[ListKey], message: str) -> ListKey | None:
    """Which key has set to null what the parser now misses."""
    missing = re.findall(r"\w+", message.partition("arguments are required: ")[2])
    empty = [each for each in given if each.value in ("", "null", "~")]
    return next((each for each in empty if each.key.rpartition(".")[2] in missing), None)


def _put(config: dict[str, Any], given: ListKey, value: Any) -> dict[str, Any]:
    """Set one; gives the outermost list that it lies in, with its key."""
    node: Any = config
    holder, last = node, ""
    done, outer = list[str](), dict[str, Any]()
    for part in given.key.split("."):
        if isinstance(node, list) and not outer:
            outer[".".join(done)] = node
        if outer and node is None:  # such as a schedule
            node = holder[last] = {}
        elif outer and isinstance(node, str):  # a class, as the key before has set it
            node = holder[last] = {"class_path": node}
        for step in _steps(node, part, given, ".".join(done)):
            holder, last = node, step
            if isinstance(node, dict):
                node = node.setdefault(step, {} if step == "init_args" else None)
            else:
                node = node[step]
            done.append(str(step))
    if not outer:
        raise UserError(f"{given}: must name an item of a list; {'.'.join(done)} is in none")
    if last == "class_path":
        holder.clear()  # arguments of another class
    holder[last] = value
    return outer


def _steps(node: Any, part: str, given: ListKey, where: str) -> list[Any]:
    """From a node of a config to what one part of a key names."""
    if isinstance(node, dict):
        own = part in node or "class_path" not in node or part in ("class_path", "init_args")
        return [part] if own else ["init_args", part]
    if not isinstance(node, list):
        found = "null" if node is None else node
        raise UserError(f"{given}: must name an item of a list; {where} is {found}")
    arguments = [(each.get("init_args") or {}) if isinstance(each, dict) else {} for each in node]
    names = [each.get("name") for each in arguments]
    if re.fullmatch("[0-9]+", part) and int(part) < len(node):
        return [int(part)]
    if part in names:
        return [names.index(part)]
    if arguments and (part in arguments[-1] or part in ("class_path", "init_args")):
        return [len(node) - 1, *_steps(node[-1], part, given, where)]  # as the parser has it
    items = [*map(str, range(len(node))), *filter(None, names)]
    raise UserError(f"{given}: {part} must be one of {', '.join(items) or 'none'}, as in {where}")


def _flow(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=float("inf"), sort_keys=False)
