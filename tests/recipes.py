"""The recipes of configs/weak, and one of all weak sources that there are."""

import pkgutil
from importlib import import_module
from pathlib import Path

from conftest import ROOT

from w2s_train import weak

NEED_A_FILE = {"domain"}  # weights of another run
FOUND = {path.stem for path in (ROOT / "configs" / "weak").glob("*.yaml")}
OVERLAYS = sorted(FOUND - NEED_A_FILE)


def sources() -> list[str]:
    """Names of all classes in the files of `w2s_train.weak`."""
    files = [
        import_module(f"{weak.__name__}.{file.name}")
        for file in pkgutil.iter_modules(weak.__path__)
    ]
    found = [value for file in files for value in vars(file).values() if isinstance(value, type)]
    concrete = {c for c in found if issubclass(c, weak.WeakSource) and c is not weak.WeakSource}
    return sorted(c.__name__ for c in concrete if not c.__name__.startswith("_"))


LAW = "{class_path: w2s_train.inbuilt.UniformScale, init_args: {high: 0.75, plain: 0.6}}"


def every_source(early: Path, drawn: bool = False) -> str:
    """An option that gives each source a segment of tests/tiny.yaml's network, and a few more.

    Args:
        early: A checkpoint of the tiny network.
        drawn: All sources act at all times, with drawn scales.
    """
    arguments = {
        "EMA": "decay: 0.5, lag: 2",
        "Checkpoint": f"path: {early}",
        "Snapshot": "step: 2, refresh_every: 2",
        "CoTrained": "every: 2, lr: 0.01",
    }
    plain = "Extrapolation, init_args: {scale: 0.3, "
    kinds = [
        *((plain, name) for name in sources()),
        (f"{plain}from_average: true, schedule: {{start_step: 0.25}}, ", "NullClass"),
        ("Consistency, init_args: {weight: 0.2, ", "IntermediateHead"),
    ]
    if drawn:
        plain = f"Extrapolation, init_args: {{scale: {LAW}, "
        kinds = [(f"{plain}name: {name}, ", name) for name in sources()]
    ranges = [(0, 1) if drawn else (i, i + 1) for i in range(len(kinds))]
    number = 1 if drawn else len(kinds)
    segments = [
        f"{{class_path: w2s_train.segment.{segment}low: {low / number}, "
        f"high: {high / number}, weak: {{class_path: w2s_train.weak.{name}, "
        f"init_args: {{{arguments.get(name, '')}}}}}}}}}"
        for (segment, name), (low, high) in zip(kinds, ranges, strict=True)
    ]
    return f"--model.objective.init_args.segments=[{', '.join(segments)}]"
