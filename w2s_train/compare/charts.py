"""Score against cost: a line and a band per arm, drawn by matplotlib as SVG elements of a page.

No text of a run gets in here: matplotlib reads formulas, and lacks the letters of many scripts.
"""

import io
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from w2s_train.compare.comparison import Point

WIDTH, HEIGHT = 490, 310  # of a chart, in points; the page scales it
LEFT, RIGHT, TOP, BOTTOM = 58, 22, 10, 48  # margins
LOG_FROM = 10  # a logarithmic axis where the largest value is more than this times the smallest
POWERS_FROM = 1000  # and from here on labels at powers of ten alone, not at 2 and 5 times them
# Okabe and Ito's colours, which colour-blind readers can tell apart, without the pale yellow.
COLOURS = ("#000000", "#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
DASHES = ("-", (0, (7, 3)), (0, (2, 3)), (0, (9, 3, 2, 3)))
MARKERS = "osD^P"
SOFT, RULE = "#59636e", "#e6e9ec"
SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text, in the page's font
    "svg.hashsalt": "w2s_train",  # equal charts are equal text
    "font.family": ["DejaVu Sans"],  # which matplotlib brings
    "font.size": 12.5,
    "lines.scale_dashes": False,
}


class Curve(NamedTuple):
    """One arm: its `style`, and its points, at least one, by ascending x."""

    style: dict[str, Any]
    points: list[tuple[float, Point]]


def style(i: int) -> dict[str, Any]:
    """Of the i-th arm's line: no two of 140 agree in colour, dashes and marker."""
    look = {"color": COLOURS, "linestyle": DASHES, "marker": MARKERS}
    sizes = {"linewidth": 2, "markersize": 7.5, "markeredgewidth": 0}
    return sizes | {key: choices[i % len(choices)] for key, choices in look.items()}


def swatch(look: dict[str, Any]) -> Markup:
    """A piece of an arm's line for legends."""
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **SETTINGS}):
        figure = Figure((34 / 72, 14 / 72))
        figure.add_artist(Line2D((0.03, 0.5, 0.97), (0.5, 0.5, 0.5), markevery=[1], **look))
        return _svg(figure)


def is_log(points: Sequence[Point]) -> bool:
    """Whether the scores are positive and far apart: then their axis is logarithmic."""
    ends = [end for p in points if p.interval for end in p.interval]
    values = [*ends, *(point.mean for point in points)]
    return min(values) > 0 and max(values) / min(values) > LOG_FROM


def chart(curves: Sequence[Curve], x_label: str, *, log: bool) -> Markup:
    """Scores with their intervals, of at least one arm; the x axis begins at 0."""
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **SETTINGS}):
        figure = Figure((WIDTH / 72, HEIGHT / 72))
        width, height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
        axes = figure.add_axes((LEFT / WIDTH, BOTTOM / HEIGHT, width / WIDTH, height / HEIGHT))
        for look, points in curves:
            x, y = zip(*((x, point.mean) for x, point in points), strict=True)
            axes.plot(x, y, clip_on=False, **look)
            if ends := [(x, p.interval.low, p.interval.high) for x, p in points if p.interval]:
                x, low, high = zip(*ends, strict=True)
                axes.fill_between(x, low, high, color=look["color"], alpha=0.16, linewidth=0)
                if len(ends) == 1:  # a band without width
                    axes.vlines(x, low, high, color=look["color"], linewidth=1.5)
        axes.set_xlim(0, max(curve.points[-1][0] for curve in curves) or 1)
        axes.set_xlabel(x_label, color=SOFT)
        axes.set_yscale("log" if log else "linear")
        bottom, top = axes.get_ylim()
        for axis, count in ((axes.xaxis, 4), (axes.yaxis, 5)):
            axis.set_major_locator(MaxNLocator(count, steps=[1, 2, 2.5, 5, 10]))
            axis.set_major_formatter(lambda value, _: number(value))
        if log:
            labelled = (1,) if top > POWERS_FROM * bottom else (1, 2, 5)
            axes.yaxis.set_major_locator(LogLocator(subs=labelled))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.grid(axis="y", color=RULE)
        axes.tick_params("x", color=SOFT, length=5)
        axes.tick_params("y", length=0, pad=7)
        axes.spines[["left", "right", "top"]].set_visible(False)
        axes.spines["bottom"].set_color(SOFT)
        return _svg(figure)


def number(value: float) -> str:
    """Short text of a tick: 1,500, 40K, 2.5M."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= 10 * size or (abs(value) >= size and unit != "K"):
            return f"{value / size:.4g}{unit}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _svg(figure: Figure) -> Markup:
    """The figure as an element; only what is referred to keeps a name, for a page has several."""
    file = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    _, start, rest = file.getvalue().partition("<svg")
    return Markup(re.sub(r'<g id="\w+">', "<g>", start + rest.rstrip()))
