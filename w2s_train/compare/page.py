"""The comparison as one HTML file that needs nothing else: no scripts, no network."""

import base64
from collections.abc import Callable
from html import escape
from pathlib import Path
from string import Template

from w2s_train.compare import report
from w2s_train.compare.charts import Line, Style, chart, style, swatch
from w2s_train.compare.comparison import Comparison, Grid, Point, Result, Row
from w2s_train.compare.numbers import percent
from w2s_train.scores import higher_is_better

COLUMNS = 5  # arms beside each other in the table of settings
UNITS = ((2 * 3600.0, 3600.0, "hours"), (300.0, 60.0, "minutes"), (0.0, 1.0, "seconds"))


def page(comparison: Comparison) -> str:
    """The whole page. Every text of a run passes `html.escape` on its way into it."""
    looks = {row.name: style(i) for i, row in enumerate(comparison.rows)}
    direction = "higher" if higher_is_better(comparison.selection.metric) else "lower"
    runs = sum(len(row.runs) for row in comparison.rows)
    template = Template(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    return template.substitute(
        title=escape(f"Comparison: {comparison.selection.metric}"),
        heading=escape(f"{comparison.selection.metric}, {direction} is better"),
        subtitle=escape(
            f"{runs} runs in {len(comparison.rows)} arms against {comparison.baseline}; weights "
            f"{comparison.selection.weights}, guidance {comparison.selection.guidance}"
        ),
        results=_results(comparison, looks),
        method=escape(report.METHOD),
        boxes=_box("Left out of the comparison", comparison.refused, "box left")
        + _box("Notes", comparison.notes, "box"),
        legend=_legend(looks),
        charts="\n".join(_charts(comparison, looks)),
        chart_note="Lines are means over training and sampling seeds, bands their bootstrap "
        "intervals; an arm with one seed has none.",
        grids=_grids(comparison.grids),
        differences=_differences(comparison),
        protocol=_protocol(comparison),
    )


def _results(comparison: Comparison, looks: dict[str, Style]) -> str:
    points = report.points(comparison)
    spans = "".join(f'<th colspan="3" class="first">At {escape(p)}</th>' for p in points)
    last = '<th class="first">Time per step</th>'
    heads = '<th class="first">Score ± std</th><th>Ratio</th><th>Verdict</th>' * len(points)
    body = "".join(
        f'<tr><th scope="row" class="arm">{swatch(looks[row.name])}{_arm(row.name)}</th>'
        f'<td class="seeds">{escape(", ".join(map(str, row.at_step.seeds)))}</td>'
        + "".join(_result(row, r) for r in (row.at_step, row.at_seconds)[: len(points)])
        + f'<td class="num first">{escape(report.seconds(row.seconds_per_step))}'
        f"<small>× {escape(report.ratio(row.time_ratio))}</small></td></tr>"
        for row in comparison.rows
    )
    return (
        f'<table class="results"><thead><tr><th colspan="2"></th>{spans}<th class="first"></th>'
        f"</tr><tr><th>Arm</th><th>Seeds</th>{heads}{last}</tr></thead>"
        f"<tbody>{body}</tbody></table>"
    )


def _arm(name: str) -> str:
    """A name that may be broken after an underscore."""
    return escape(name).replace("_", "_<wbr>")


def _result(row: Row, result: Result | None) -> str:
    """Three cells: score, ratio, verdict, each with what it rests on."""
    score, ratio, verdict = report.cells(row, result)
    if result is None:
        return f'<td class="first">{score}</td><td>{ratio}</td><td>{escape(verdict)}</td>'
    kind, _, reason = verdict.partition(": ")
    judged = result.judgement
    if judged.gap is not None and judged.noise is not None and kind != "baseline":
        reason = f"gap {percent(judged.gap)},\nnoise {percent(judged.noise)}".replace("-", "−")
    notes = [
        f"{report.score(i.low, result.mean)} to {report.score(i.high, result.mean)}"
        if (i := result.interval)
        else "one seed",
        f"{report.ratio(i.low)} to {report.ratio(i.high)}"
        if (i := judged.interval) and kind != "baseline"
        else "",
        reason,
    ]
    if result.sampling_std is not None:
        notes[0] += f"\n{report.sampling(result)}"
    badge = f'<span class="badge {escape(kind)}">{escape(kind)}</span>'
    cells = [escape(score), escape(ratio), badge]
    classes = ("num first", "num", "num")
    return "".join(
        f'<td class="{name}">{cell}<small>{_lines(note)}</small></td>'
        for name, cell, note in zip(classes, cells, notes, strict=True)
    )


def _lines(note: str) -> str:
    return "<br>".join(escape(line) for line in note.splitlines())


def _box(title: str, lines: list[str], classes: str) -> str:
    if not lines:
        return ""
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f'<section class="{classes}"><b>{escape(title)}</b><ul>{items}</ul></section>'


def _legend(looks: dict[str, Style]) -> str:
    items = "".join(f"<li>{swatch(look)}{escape(name)}</li>" for name, look in looks.items())
    return f'<ul class="legend">{items}</ul>'


def _charts(comparison: Comparison, looks: dict[str, Style]) -> list[str]:
    """Against steps, images seen and training time."""
    times = [p.training_seconds or 0.0 for row in comparison.rows for p in row.curve]
    _, unit, name = next(u for u in UNITS if max(times) >= u[0])
    metric = comparison.selection.metric
    charts = []
    columns: list[tuple[str, Callable[[Point], float | None]]] = [
        ("optimizer steps", lambda point: float(point.step)),
        ("images seen", lambda point: point.images_seen),
        (f"training time, {name}", lambda point: _divided(point.training_seconds, unit)),
    ]
    for label, value in columns:
        lines = [_line(row, looks[row.name], value) for row in comparison.rows]
        drawn = chart([line for line in lines if line.x], label, metric)
        charts.append(f'<figure class="chart">{drawn}</figure>')
    return charts


def _divided(value: float | None, unit: float) -> float | None:
    return None if value is None else value / unit


def _line(row: Row, look: Style, value: Callable[[Point], float | None]) -> Line:
    points = [(x, point) for point in row.curve if (x := value(point)) is not None]
    low = [p.interval.low if p.interval else None for _, p in points]
    high = [p.interval.high if p.interval else None for _, p in points]
    return Line(row.name, look, [x for x, _ in points], [p.mean for _, p in points], low, high)


def _grids(grids: list[Grid]) -> str:
    if not grids:
        return ""
    figures = []
    for grid in grids:
        png = base64.b64encode(grid.png).decode()
        text = f"step {grid.step:,}, training seed {grid.run.seed}"
        figures.append(
            f'<figure><img alt="Samples of {escape(grid.arm)}, {escape(text)}" '
            f'src="data:image/png;base64,{png}"><figcaption><b>{escape(grid.arm)}</b><br>'
            f"{escape(text)}</figcaption></figure>"
        )
    return (
        '<section aria-labelledby="grids"><h2 id="grids">Samples</h2>'
        f'<div class="grids">{"".join(figures)}</div></section>'
    )


def _differences(comparison: Comparison) -> str:
    """A column per arm, or, where many would not fit, the arms that share a value."""
    names = [row.name for row in comparison.rows]
    rows = report.difference_rows(comparison)
    if len(names) > COLUMNS:
        rows = [[key, *_shared(cells, names)] for key, *cells in rows]
        names = ["Value: arms"]
    body = "".join(
        f'<tr><th scope="row">{escape(key)}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        + "</tr>"
        for key, *cells in rows
    )
    heads = "".join(f"<th>{_arm(name)}</th>" for name in ["Setting", *names])
    return f'<table class="settings"><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>'


def _shared(cells: list[str], names: list[str]) -> list[str]:
    values = dict.fromkeys(cells)
    arms = {v: [name for name, cell in zip(names, cells, strict=True) if cell == v] for v in values}
    return ["; ".join(f"{value}: {', '.join(some)}" for value, some in arms.items())]


def _protocol(comparison: Comparison) -> str:
    pairs = "".join(
        f"<div><dt>{escape(key)}</dt><dd>{escape(value)}</dd></div>"
        for key, value in report.protocol_lines(comparison)
    )
    return f'<dl class="protocol">{pairs}</dl>'
