"""What is searched: one guidance, and the values that its arguments may take.

An argument is named by the keys that lead to it: ``scale``; ``low_noise.scale`` in a guidance
within a guidance; ``head.scale``, where ``head`` is no argument, but a key of the one that is a
dictionary.
"""

import copy
import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_origin, get_type_hints

import yaml

from w2s_train.errors import UserError, one_line
from w2s_train.guidance import Guidance
from w2s_train.imports import ALLOWED, SWITCH, found, trusted, within

OVERLAYS = Path(__file__).resolve().parents[2] / "configs"
INTERVAL = ("low=0:0.5", "high=0.5:1")
DEFAULTS: dict[str, tuple[str, ...]] = {  # what is searched where nothing is said, by class
    "ClassifierFree": ("scale=1:4", *INTERVAL),
    "Autoguidance": ("scale=1:4", *INTERVAL),
    "AngleDomain": ("scale=1:4",),
    "StageWise": ("scale=1:4",),
    "Segmented": ("border=0.1:0.9", "low_noise.scale=1:4", "high_noise.scale=1:4"),
}
EMA_STD = "ema_std"  # of the weights, and no argument: where a run can make averages (posthoc)
WIDTHS = f"{EMA_STD}=0.05:0.2"

Values = dict[str, Any]  # of one candidate, by the names of parameters


@dataclass(frozen=True)
class Parameter:
    """An argument, and what it may be: a number in [low, high], or one of ``choices``."""

    name: str
    low: float = 0.0
    high: float = 0.0
    choices: tuple[Any, ...] = ()

    @classmethod
    def parse(cls, text: str) -> "Parameter":
        """Of ``NAME=LOW:HIGH``, or ``NAME=VALUE,VALUE,...``.

        Raises:
            UserError: It is neither, or the range is empty.
        """
        name, equals, value = text.partition("=")
        rule = f"search={text}: must be NAME=LOW:HIGH with LOW < HIGH, or NAME=VALUE,VALUE,..."
        number = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
        ends = re.fullmatch(f"({number}):({number})", value)
        clocks = ":" in value and "{" not in value and not ends  # which YAML takes for times
        if not (name and equals and value) or clocks:
            raise UserError(rule)
        if ends:
            low, high = map(float, ends.groups())
            if not low < high:
                raise UserError(rule)
            return cls(name, low, high)
        try:
            choices = yaml.safe_load(f"[{value}]")
        except yaml.YAMLError as error:
            raise UserError(rule) from error
        return cls(name, choices=tuple(choices))

    def __str__(self) -> str:
        ends = f"{self.low:g}:{self.high:g}"
        return f"{self.name}={','.join(map(str, self.choices)) or ends}"

    def at(self, place: float) -> Any:
        """The value at a place in [0, 1]; numbers have four significant digits."""
        if self.choices:
            return self.choices[min(int(place * len(self.choices)), len(self.choices) - 1)]
        return float(f"{self.low + place * (self.high - self.low):.4g}")

    @property
    def middles(self) -> list[float]:
        """A place for each of ``choices``."""
        return [(i + 0.5) / len(self.choices) for i in range(len(self.choices))]


@dataclass(frozen=True)
class Space:
    """A guidance as a config spells it, and the parameters that are searched."""

    guidance: dict[str, Any]
    parameters: tuple[Parameter, ...]

    @classmethod
    def of(
        cls,
        guidance: str,
        search: Sequence[str],
        objective: Any = None,
        *,
        averages: bool = False,
    ) -> "Space":
        """Of what the command line says.

        Args:
            guidance: Name of an overlay in ``configs/guidance`` or ``configs/inbuilt``, a YAML file
                with a ``model.guidance``, or a class path.
            search: A text per parameter; empty for those that go with the class.
            objective: Of the run, whose drawn scales `Inbuilt` chooses.
            averages: Whether the run has snapshots of averages; then the std of the one that is
                sampled goes with every guidance.

        Raises:
            UserError: There is no such guidance, or it has no such argument.
        """
        spec = read_guidance(guidance)
        kind = spec["class_path"].rpartition(".")[2]
        texts = list(search) or list(DEFAULTS.get(kind, ()))
        if kind == "Inbuilt" and objective is not None:
            known = inputs(objective)
            if not known:
                raise UserError(
                    f"guidance={guidance}: must be of a run whose segments draw their scales "
                    "(configs/weak/drawn.yaml); this one has none"
                )
            texts = texts or known
            keys = sorted({text.partition("=")[0] for text in known})
            if wrong := [t for t in texts if t.partition("=")[0] not in keys]:
                raise UserError(f"search={wrong[0]}: must be of {', '.join(keys)}")
            _check_scales(texts, spec)
        if not texts:
            names = ", ".join(_arguments(spec)) or "none"
            raise UserError(
                f"search=null: must be given for {kind}, as NAME=LOW:HIGH; its arguments: {names}"
            )
        texts += [WIDTHS] if averages and not search else []
        parameters = tuple(map(Parameter.parse, texts))
        given = [each.name for each in parameters]
        if twice := next((name for name in given if given.count(name) > 1), None):
            raise UserError(f"search={twice}: must stand once")
        space = cls(spec, parameters)
        space.settings(space.values([0.5] * len(parameters)))
        return space

    def values(self, places: Sequence[float]) -> Values:
        """The candidate at a point of the unit cube."""
        return {p.name: p.at(x) for p, x in zip(self.parameters, places, strict=True)}

    def settings(self, values: Values) -> dict[str, Any]:
        """The guidance of a candidate as a config spells it."""
        spec = copy.deepcopy(self.guidance)
        for name, value in values.items():
            if name != EMA_STD:
                _put(spec, name, value)
        return spec


def _check_scales(texts: Sequence[str], spec: dict[str, Any]) -> None:
    """Refuse the range of a source whose scale is neither searched nor stated."""
    stated = [f"{name}.scale" for name in (spec["init_args"].get("scales") or {})]
    known = [*stated, *(text.partition("=")[0] for text in texts)]
    for text in texts:
        scale = f"{text.partition('=')[0].rpartition('.')[0]}.scale"
        if scale not in known:
            raise UserError(
                f"search={text}: must come with one of {scale}, such as {scale}=0.3, or no scale "
                "acts there"
            )


def inputs(objective: Any) -> list[str]:
    """Scale and range of every segment that has drawn its scale, as far as it was trained."""
    texts = list[str]()
    for each in objective.segments if objective is not None else ():
        if drawn := getattr(each, "drawn", None):
            middle = (each.low + each.high) / 2
            texts.append(f"{each.name}.scale=0:{drawn.high:g}")
            texts.append(f"{each.name}.low={each.low:g}:{middle:g}")
            texts.append(f"{each.name}.high={middle:g}:{each.high:g}")
    return texts


def read_guidance(name: str) -> dict[str, Any]:
    """``class_path`` and ``init_args`` of an overlay, a file or a class; see `Space.of`."""
    folders = [OVERLAYS / "guidance", OVERLAYS / "inbuilt"]
    known = {path.stem: path for folder in folders for path in sorted(folder.glob("*.yaml"))}
    path = known.get(name, Path(name))
    if path.suffix in (".yaml", ".yml"):
        spec = _from_file(path)
    else:
        short = f"w2s_train.guidance.{name.capitalize()}"  # such as inbuilt, which has no overlay
        spec = {"class_path": name if "." in name or found(short) is None else short}
    if "." not in spec["class_path"]:
        raise UserError(
            f"guidance={name}: must be one of {', '.join(known)}, a YAML file, or a class path"
        )
    if not within(spec["class_path"], ALLOWED + trusted):
        package = spec["class_path"].partition(".")[0]
        raise UserError(f"guidance={name}: may not be imported; {SWITCH}={package} allows it")
    cls = found(spec["class_path"])
    if not (inspect.isclass(cls) and issubclass(cls, Guidance)):
        raise UserError(
            f"guidance={name}: must be a class of guidance; {spec['class_path']} is none"
        )
    return {"class_path": spec["class_path"], "init_args": spec.get("init_args") or {}}


def _from_file(path: Path) -> dict[str, Any]:
    rule = f"guidance={path}: must be a YAML file with one model.guidance, by its class_path"
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
        spec = content["model"]["guidance"]
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{rule} ({one_line(error)})") from error
    spec = {"class_path": spec} if isinstance(spec, str) else spec
    if not isinstance(spec, dict) or not isinstance(spec.get("class_path"), str):
        raise UserError(rule)
    return spec


def _arguments(spec: dict[str, Any]) -> dict[str, Any]:
    """Of a class, with their types."""
    cls = found(spec["class_path"])
    hints = get_type_hints(cls.__init__)
    return {name: hints.get(name) for name in list(inspect.signature(cls).parameters)}


def _put(spec: dict[str, Any], name: str, value: Any) -> None:
    """Set an argument; dictionaries on the way are made."""
    *path, last = name.split(".")
    node = spec
    for i, part in enumerate([*path, last]):
        if "class_path" in node:
            arguments = _arguments(node)
            tables = [key for key, kind in arguments.items() if get_origin(kind) is dict]
            node = node.setdefault("init_args", {})
            if part not in arguments and (len(tables) != 1 or i == len(path)):
                names = ", ".join(arguments) or "none"
                raise UserError(f"search={name}: {part} must be one of {names}")
            if part not in arguments:  # a key that may hold dots itself, such as t_0.2-1
                node.setdefault(tables[0], {}).setdefault(".".join(path[i:]), {})[last] = value
                return
        if i == len(path):
            node[last] = value
            return
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            raise UserError(f"search={name}: {part} must be a class or a dictionary, is {node}")
