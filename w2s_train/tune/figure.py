"""Scores over the parameters: a curve of one, a map of two, else one panel a parameter."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

from w2s_train.files import atomic_write
from w2s_train.tune.outcome import Outcome
from w2s_train.tune.search import Trial

BEST, REST, LINE = "#d55e00", "#0072b2", "#59636e"
WIDTH, HEIGHT = 4.2, 3.4  # inches of a panel
COLUMNS = 3
PLAIN = StrMethodFormatter("{x:.3g}")


def draw(outcome: Outcome, path: Path) -> None:
    """Write the figure as PNG: scores on the first set of tuning seeds, which all candidates have.

    The winner, by the mean over all sets, is marked, and finalists are larger.
    """
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, "text.parse_math": False}):
        names = list(outcome.trials[0].values)
        figure = _map(outcome, names) if _is_map(outcome.trials, names) else _panels(outcome, names)
        with atomic_write(path) as file:
            figure.savefig(file, format="png", dpi=120, metadata={"Software": None})


def draw_curve(
    curve: Sequence[tuple[float, float, float]], own: float, metric: str, path: Path
) -> None:
    """Write scores over stds, from triples (std, score, ...), with that of the run's own."""
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, "text.parse_math": False}):
        figure = Figure((1.4 * WIDTH, HEIGHT), layout="constrained")
        axes = figure.add_subplot()
        stds, values = ([each[i] for each in curve] for i in (0, 1))
        best = min(range(len(values)), key=values.__getitem__)
        axes.plot(stds, values, "o-", color=REST, lw=1, label="made after training")
        axes.plot(stds[best], values[best], "o", color=BEST)
        axes.axhline(own, color=LINE, ls="--", lw=1, label="the run's own average")
        axes.set(xlabel="std of the average, as a part of the run", ylabel=metric, xscale="log")
        axes.xaxis.set(major_formatter=PLAIN, minor_formatter=PLAIN)
        axes.legend(frameon=False)
        with atomic_write(path) as file:
            figure.savefig(file, format="png", dpi=120, metadata={"Software": None})


def _is_map(trials: Sequence[Trial], names: Sequence[str]) -> bool:
    return len(names) == 2 and all(isinstance(t.values[n], float) for t in trials for n in names)


def _map(outcome: Outcome, names: Sequence[str]) -> Figure:
    figure = Figure((1.4 * WIDTH, HEIGHT), layout="constrained")
    axes = figure.add_subplot()
    x, y = ([each.values[name] for each in outcome.trials] for name in names)
    means = [each.scores[0] for each in outcome.trials]
    norm = LogNorm() if min(means) > 0 else None
    drawn = axes.scatter(x, y, c=means, s=_sizes(outcome), norm=norm, cmap="viridis_r")
    axes.scatter(x[:1], y[:1], s=140, facecolors="none", edgecolors=BEST, linewidths=2)
    bar = figure.colorbar(drawn, label=_label(outcome))
    bar.ax.yaxis.set(major_formatter=PLAIN, minor_formatter=PLAIN)
    axes.set(xlabel=names[0], ylabel=names[1])
    return figure


def _panels(outcome: Outcome, names: Sequence[str]) -> Figure:
    columns = min(COLUMNS, len(names))
    rows = -(-len(names) // columns)
    size = (WIDTH * columns * (1.4 if columns == 1 else 1), HEIGHT * rows)
    figure = Figure(size, layout="constrained")
    for i, name in enumerate(names, 1):
        axes = figure.add_subplot(rows, columns, i)
        values = [_shown(each.values[name]) for each in outcome.trials]
        means = [each.scores[0] for each in outcome.trials]
        if len(names) == 1:
            axes.plot(*zip(*sorted(zip(values, means, strict=True)), strict=True), color=LINE, lw=1)
        axes.scatter(values, means, s=_sizes(outcome), color=REST)
        axes.scatter(values[:1], means[:1], s=140, facecolors="none", edgecolors=BEST, linewidths=2)
        axes.set(xlabel=name, ylabel=_label(outcome))
        if min(means) > 0:
            axes.set_yscale("log")
            axes.yaxis.set(major_formatter=PLAIN, minor_formatter=PLAIN)
    return figure


def _label(outcome: Outcome) -> str:
    return f"{outcome.metric}\nfirst set of seeds"


def _shown(value: Any) -> Any:
    return value if isinstance(value, int | float) else str(value)


def _sizes(outcome: Outcome) -> list[int]:
    last = max(len(each.scores) for each in outcome.trials)
    return [60 if len(each.scores) == last else 22 for each in outcome.trials]
