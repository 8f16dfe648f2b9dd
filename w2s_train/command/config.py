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
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml

from w2s_train.errors import UserError, one_line

PARTS = "trainer model data checkpoint guard watch".split()
# The first word of every key, and the options that are no keys.
KEYS = """
    seed_everything ckpt_path start_from weights_only verbose return_predictions
    output format seeds classes columns scale urls dataset split keep_features statistics images
    guidance search minutes sets set_images name std points
    config print_config help allow_imports profile $schema
""".split()
# How the parser, or a package of ours, says that a class is missing.
NO_CLASS = r"module '([\w.]+)' has no attribute '(\w+)'|no file of ([\w.]+) defines (\w+)"
# How it says that a value is no number, where nothing else may stand.
NUMBER = r"\"[\w.]+\": - Expected a <class '(int|float)'> Given value: (\S+)"
WORDS = {"int": "whole number", "float": "number"}
CHOSEN = [
    f"w2s_train.{name}"
    for name in "models weak segment inbuilt sampler guidance interpolant timesteps".split()
]
SCORING = ("validate", "test", "predict", "sample", "tune", "ema")
CONTRACT = ("w2s_train.weak.base", "w2s_train.weak.randomness")  # no source is in there
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


def check_arguments(args: list[str], own: Sequence[str] = ()) -> None:
    """Refuse files, and first words of keys, that cannot be meant.

    Args:
        args: Options of the command line.
        own: Keys of a command that has none of a trainer's.

    Raises:
        UserError: There is one.
    """
    for option, name, value in _options(args):
        if name == "--config":
            _check_config(value, own)
        elif option.startswith("--") and len(option) > 2:
            _check_key(name[2:], f"unrecognized arguments: {option}", own)
            _check_part(Path(value))


def read_strictly(text: str) -> Any:
    """What a parser reads a config, and every value, with: YAML without what cannot be meant."""
    from jsonargparse import get_loader

    from w2s_train.loading import without_removed

    yaml.load(text, StrictLoader)
    return without_removed(get_loader("yaml")(text))


def tuning(args: list[str]) -> list[str]:
    """The arguments of ``tune RUN --search A --search B`` as the parser has them.

    A run or checkpoint may come first, without its option; each ``--search`` adds to those before.
    """
    command, *given = args
    if given and not given[0].startswith("-"):
        given[0] = f"--ckpt_path={given[0]}"
    return [command, *(re.sub(r"^--search(=|$)", r"--search+\1", each) for each in given)]


def with_own_config(args: list[str]) -> list[str]:
    """The arguments, with the config of the run whose checkpoint is asked for, where the configs
    that are given, if any, are overlays: without a network.

    It comes before all others, and may allow no more than any config.

    Args:
        args: The command line; the command first.

    Raises:
        UserError: There is none.
    """
    command, *given = args
    if command not in SCORING or _has_network(given):
        return args
    path = _last_value("--ckpt_path", given)
    whole = path is not None and os.path.isdir(path)
    # Links are not followed: they lead to the checkpoint of another run.
    folder = Path(os.path.abspath(path or "")).parent
    run = Path(path or "") if whole else folder.parent
    lone = path in (None, "last") or not (whole or folder.name == "checkpoints")
    if lone or not (run / "config.yaml").is_file():
        raise UserError(
            f"ckpt_path={path or 'null'}: must be a run folder, or a checkpoint in one, with its "
            f"config.yaml, or come with a config: lightning {command} -c CONFIG --ckpt_path FILE"
        )
    added = [f"--config={run / 'config.yaml'}", f"--trainer.default_root_dir={run}"]
    # The last one of the folder that is written to, unless that is another.
    last = whole and not _last_value("--trainer.default_root_dir", given)
    return [command, *added, *given, *(["--ckpt_path=last"] if last else [])]


def _has_network(given: list[str]) -> bool:
    """Whether options, or the configs among them, name a network; or help is asked for."""
    for option, name, value in _options(given):
        if option.startswith(("-h", "--help", "--model.network")) or name == "--model":
            return True
        if name == "--config":
            if not os.path.isfile(value):  # YAML itself
                return True
            model = _read(Path(value)).get("model")
            if isinstance(model, str) or "network" in (model or {}):
                return True
    return False


def guided_config(given: Sequence[str]) -> str | None:
    """The first config among options that states guidance, if any does."""
    for _, name, value in _options([*given]):
        if name == "--config" and os.path.isfile(value):
            model = _read(Path(value)).get("model")
            if isinstance(model, dict) and model.get("guidance"):
                return value
    return None


def _options(args: list[str]) -> Iterator[tuple[str, str, str]]:
    """Each word, with name and value as if it were an option; ``-c`` is ``--config``."""
    for word, following in zip(args, [*args, ""][1:], strict=True):
        name, equals, value = word.partition("=")
        value = value if equals else following
        if name.startswith("-c"):
            name, value = "--config", value if name == "-c" else word[2:]
        yield word, name, value


def _last_value(name: str, args: list[str]) -> str | None:
    """What an option is set to last."""
    return dict(((option, value) for _, option, value in _options(args))).get(name)


def _check_config(value: str, own: Sequence[str]) -> None:
    if not os.path.isfile(value):
        if ": " in value:
            return  # no path, but YAML itself: the parser reads it
        raise UserError(f"config={value}: must be an existing file")
    content = _read(Path(value))
    if not isinstance(content, dict):
        raise UserError(f"config={value}: must hold keys with values")
    for key, part in content.items():
        _check_key(str(key), f"{value}: does not accept option '{key}'", own)
        if isinstance(part, str):
            _check_part(Path(value).parent / part)


def _check_part(path: Path) -> None:
    if path.suffix in (".yaml", ".yml") and os.path.isfile(path):
        _read(path)


def _check_key(key: str, message: str, own: Sequence[str]) -> None:
    if key.partition(".")[0].rstrip("+") not in (own or [*PARTS, *KEYS]):
        raise UserError(f"{message}; {keys_are(own)}")


def keys_are(own: Sequence[str] = ()) -> str:
    """What an unknown key could have been."""
    return (
        f"keys are {', '.join(own or [*PARTS, 'seed_everything', 'ckpt_path', 'those of --help'])}"
    )


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
        if key == "trainer.max_steps" and (value == 0 or value < -1):
            raise UserError(f"{key}={value}: must be at least 1, or -1 for no end")
        if name in COUNTS and (value < 1 or not float(value).is_integer()):
            raise UserError(f"{key}={value}: must be a whole number of steps, at least 1")
        if name in RATES and not 0 <= value < math.inf:
            raise UserError(f"{key}={value}: must be a finite number, at least 0")


def check_pipe(allowed: bool, args: list[str]) -> None:
    """Only who types the command may let it run others; a config may come from anybody."""
    if allowed and (_last_value("--data.allow_pipe", args) or "").lower() != "true":
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
    keys = [key for key, leaf in walk(config) if key.split(".")[-1] == name and str(leaf) == value]
    # What lies deeper is made first, and refused first.
    return max(keys, key=lambda key: key.count(".")).removesuffix(name) + line if keys else line


def explain(message: str, parts: dict[str, Any], own: Sequence[str] = ()) -> str:
    """An error of the parser as one line, with what would have been accepted.

    Args:
        message: The error, of any number of lines.
        parts: The classes behind the top-level keys.
        own: Keys of a command that has none of a trainer's.
    """
    line = " ".join(message.replace("Parser key ", "").split())
    if denied := re.search(r"Importing '([\w.]+)' is not allowed", line):
        return (
            f"class_path={denied[1]}: must be a class of w2s_train, torch.optim, Lightning's "
            f"trainer or diffusers' guiders; --allow_imports={denied[1].split('.')[0]} allows it, "
            "if you trust its code"
        )
    if other := re.search(r"Import path ([\w.]+) does not implement protocol Network", line):
        return (
            f"class_path={other[1]}: must be a network, with null_class and forward(x_t, t, y) "
            "(docs/networks.md)"
        )
    key = ".".join(re.findall(r'"([\w.]+)": ', line))
    if both := re.search(r"Expected a <class 'float'>.* a dot import path string: (\w+)", line):
        return f"{key}={both[1]}: must be a number, or a class by its class_path and init_args"
    if named := re.search(r"Expected a dot import path string: (\w+)( |$)", line):
        found = [f"{m}.{n}" for m in CHOSEN for n in _like(named[1], _classes_of(m), 1)]
        if like := difflib.get_close_matches(named[1], found, n=3, cutoff=0.0):
            return f"{key}={named[1]}: must have its module, such as {' or '.join(like)}"
    lost = re.search(r"class_path '([\w.]+)'.*No module named '([\w.]+)'", line)
    if lost and f"{lost[1]}.".startswith(f"{lost[2]}."):
        return (
            f"class_path={lost[1]}: there is no module {lost[2]}; PYTHONPATH=FOLDER before the "
            "command names the folder that it lies in"
        )
    if missing := re.search(NO_CLASS, line):
        module, name = missing[1] or missing[3], missing[2] or missing[4]
        return f"class_path={module}.{name}: there is no such class; {_classes(module, name)}"
    if several := re.search(r"<class 'list'>.* Given value: ([\w.-]+(?:, ?[\w.-]+)+)$", line):
        return f"{key}={several[1]}: must be a list in brackets, [{several[1]}]"
    if wrong := re.search(r"Not a valid subclass of (\w+)\. Got value: ([\w.+-]+) Subclass", line):
        return f"{key}={wrong[2]}: must be a {wrong[1]}, by its class_path and init_args"
    # Of a value that may have one of several types, the reasons are enough; lists are long.
    line = re.sub(r" Given value: (\[|\{|Namespace).*", "", line)
    line = re.sub(r"Does not validate against any of the Union subtypes .*?Errors: ", "", line)
    line = re.sub(r" - Expected a <class 'NoneType'>| Given value type: <class '[^']*'>", "", line)
    if alone := re.fullmatch(NUMBER, line):
        return f"{key}={alone[2]}: must be a {WORDS[alone[1]]}"
    if unknown := re.search(r"class_path '([\w.]+)': Option '[\w.]+' is not accepted", line):
        module, _, name = unknown[1].rpartition(".")
        return f"{line}; {name} accepts {_parameters(getattr(import_module(module), name))}"
    if unknown := re.search(r"(?:option '|unrecognized arguments: --)([\w.]+)", line):
        part = unknown[1].split(".")[0]
        if part in parts:
            return f"{line}; {part} accepts {_parameters(parts[part])}"
        return f"{line}; {keys_are(own)}"
    return line


def innermost(line: str) -> str:
    """What `explain` says about a value, without its key and the classes around it."""
    return re.sub(r"""^(.*("\w+"|class_path '[\w.]+'): (- )*|[\w.]+=\S*: )""", "", line)


def _classes(module: str, name: str) -> str:
    """Which classes a module has, or all files of ours; those like one that is missing first."""
    like = _like(name, _classes_of(module), 0 if module.startswith("w2s_train") else 3)
    return f"{module} has {', '.join(like)}" if like else f"{module} has none of a similar name"


def _like(name: str, names: list[str], number: int) -> list[str]:
    """The most similar of them; 0 is all."""
    cutoff = 0.5 if number else 0.0
    return difflib.get_close_matches(name, names, n=number or len(names) or 1, cutoff=cutoff)


def _classes_of(module: str) -> list[str]:
    """Names of the classes in a module; in one of ours, of those that a config may choose."""
    found = import_module(module)
    if not module.startswith("w2s_train"):
        return sorted(name for name, value in vars(found).items() if isinstance(value, type))
    under = pkgutil.iter_modules(getattr(found, "__path__", []))
    files = [found, *(import_module(f"{module}.{file.name}") for file in under)]
    classes = {each for file in files for each in vars(file).values() if isinstance(each, type)}
    return sorted(
        each.__name__
        for each in classes
        if each.__module__.startswith(module)
        and not (inspect.isabstract(each) or getattr(each, "_is_protocol", False))
        and not (issubclass(each, tuple) or each.__module__ in CONTRACT)
    )


def _parameters(function: Any) -> str:
    return ", ".join(name for name in inspect.signature(function).parameters if name != "kwargs")
