"""The guideability of a run against time t, from its ``metrics.csv``; see docs/guideability.md."""

import csv
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from w2s_train.compare.charts import RULE, SETTINGS, SOFT, Curve, chart, style
from w2s_train.compare.comparison import Point
from w2s_train.compare.numbers import Interval
from w2s_train.files import atomic_write

NAME = "guideability.png"
PLACES = {"held_out": "held-out rows", "train": "training rows"}
KEY = re.compile(rf"({'|'.join(PLACES)})/([\w.-]+)/tenth_([\d.]+)-[\d.]+/guideability")
STAGES = ("#c6dbef", "#6baed6", "#2171b5", "#08306b")  # of training, each a quarter of the steps
Z = 1.96  # standard errors on each side, 95 %
SEEN = 0.5  # what has a larger standard error does not stretch an axis


class Value(NamedTuple):
    """Of one tenth of time: t in its middle, gamma and its standard error."""

    t: float
    gamma: float
    error: float


class Entry(NamedTuple):
    """What was logged at a step."""

    step: int
    value: Value


Found = dict[tuple[str, str], list[Entry]]  # by place and segment


def read(folder: Path) -> Found:
    """What a run folder has; of a step that was taken twice, the last."""
    path, latest = folder / "metrics.csv", dict[tuple[str, int], Value]()
    if not path.is_file():
        return {}
    with open(path, newline="", encoding="utf-8") as file:
        table = csv.DictReader(file)
        names = [name for name in table.fieldnames or () if KEY.fullmatch(name)]
        for row in table:
            for name in names:
                gamma, error = row[name], row.get(f"{name}_error")
                if gamma and error:
                    t = float(name.split("/tenth_")[1].partition("-")[0]) + 0.05
                    latest[name, int(row["step"])] = Value(t, float(gamma), float(error))
    found: Found = {}
    for (name, step), value in latest.items():
        place, segment, _ = name.split("/", 2)
        found.setdefault((place, segment), []).append(Entry(step, value))
    return dict(sorted(found.items()))


def pooled(values: Sequence[Value]) -> list[Value]:
    """Means by t, weighted by the inverse squares of the errors."""
    by_t: dict[float, list[Value]] = {}
    for value in values:
        by_t.setdefault(value.t, []).append(value)
    means = []
    for t, some in sorted(by_t.items()):
        weights = [max(each.error, 1e-6) ** -2 for each in some]
        mean = sum(w * each.gamma for w, each in zip(weights, some, strict=True)) / sum(weights)
        means.append(Value(t, mean, sum(weights) ** -0.5))
    return means


def stages(entries: Sequence[Entry]) -> list[list[Value]]:
    """Of each quarter of the steps so far."""
    last = max(entry.step for entry in entries)
    quarters: list[list[Value]] = [[] for _ in STAGES]
    for step, value in entries:
        quarters[min(step * len(STAGES) // (last + 1), len(STAGES) - 1)].append(value)
    return [pooled(values) for values in quarters]


def write(folder: Path) -> None:
    """Draw ``guideability.png`` anew, if there is anything to draw."""
    if found := read(folder):
        with (
            matplotlib.rc_context({**matplotlib.rcParamsDefault, **SETTINGS, "font.size": 9}),
            atomic_write(folder / NAME) as file,
        ):
            figure(found).savefig(file, format="png", dpi=110)


def figure(found: Found) -> Figure:
    """A row per place, a column per segment; darker is later, the band belongs to the last."""
    places = [place for place in PLACES if any(place == there for there, _ in found)]
    segments = sorted({segment for _, segment in found})
    made = Figure((3.3 * len(segments) + 0.4, 2.7 * len(places)), layout="constrained")
    grid: Any = made.subplots(len(places), len(segments), squeeze=False, sharex=True)
    for i, place in enumerate(places):
        for k, segment in enumerate(segments):
            if entries := found.get((place, segment)):
                _panel(grid[i, k], entries, f"{segment}, {PLACES[place]}")
            else:
                grid[i, k].set_visible(False)
    for axes in grid[-1]:
        axes.set_xlabel("t (0 is data, 1 is noise)", color=SOFT)
    for axes in grid[:, 0]:
        axes.set_ylabel("γ of each source by itself", color=SOFT)
    handles, labels = next(axes for axes in grid.flat if axes.lines[1:]).get_legend_handles_labels()
    made.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=7)
    return made


def _panel(axes: Axes, entries: Sequence[Entry], title: str) -> None:
    axes.axhline(0, color=SOFT, linewidth=0.8)
    last, shown = max(entry.step for entry in entries), list[Value]()
    for k, (values, colour) in enumerate(zip(stages(entries), STAGES, strict=True)):
        if not values:
            continue
        label = f"steps to {last * (k + 1) // len(STAGES):,}"
        shown += values
        t, gamma, _ = zip(*values, strict=True)
        axes.plot(t, gamma, "o-", color=colour, markersize=3, label=label)
        low, high = ([g + Z * side * e for _, g, e in values] for side in (-1, 1))
        if colour == STAGES[-1]:
            axes.fill_between(t, low, high, color=colour, alpha=0.2, linewidth=0)
    seen = [each for each in shown if each.error < SEEN] or shown
    ends = [-0.1, 0.1, *(each.gamma for each in seen)]
    margin = 0.1 * (max(ends) - min(ends))
    axes.set(xlim=(0, 1), ylim=(min(ends) - margin, max(ends) + margin))
    axes.set_title(title, fontsize=9)
    axes.grid(axis="y", color=RULE)
    axes.spines[["right", "top"]].set_visible(False)


def charts(arms: Sequence[Sequence[Path]]) -> list[tuple[str, Markup]]:
    """A caption and a chart per segment and place: the last quarter of each arm, seeds pooled.

    Arms that are the same runs, sampled in other ways, are drawn once, as the first of them.
    """
    curves: dict[tuple[str, str], list[Curve]] = {}
    for i, folders in enumerate(arms):
        if folders in arms[:i]:
            continue
        values: dict[tuple[str, str], list[Value]] = {}
        for folder in folders:
            for key, entries in read(folder).items():
                values.setdefault(key, []).extend(stages(entries)[-1])
        for key, some in values.items():
            points = [(each.t, _point(each)) for each in pooled(some)]
            if points:
                curves.setdefault(key, []).append(Curve(style(i), points))
    return [
        (f"{segment}, {PLACES[place]}", chart(some, "t (0 is data, 1 is noise)", log=False))
        for (place, segment), some in sorted(curves.items())
    ]


def _point(value: Value) -> Point:
    ends = Interval(value.gamma - Z * value.error, value.gamma + Z * value.error)
    return Point(0, 0.0, None, value.gamma, None, ends)
