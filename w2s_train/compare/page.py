"""The comparison as one HTML file that needs nothing else: no scripts, no network."""

import base64
from collections.abc import Callable
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup, escape

from w2s_train.compare import guideability, report, tuned
from w2s_train.compare.charts import Curve, chart, is_log, style, swatch
from w2s_train.compare.comparison import Comparison, Point, Result, Row
from w2s_train.compare.numbers import percent
from w2s_train.compare.reached import lines
from w2s_train.scores import higher_is_better

COLUMNS = 5  # arms beside each other in the table of settings
UNITS = ((2 * 3600.0, 3600.0, "hours"), (300.0, 60.0, "minutes"), (0.0, 1.0, "seconds"))


def page(comparison: Comparison) -> str:
    """The whole page; the template escapes every text of a run."""
    rows, points = comparison.rows, report.points(comparison)
    results = [[row.at_step, row.at_seconds][: len(points)] for row in rows]
    log = is_log([point for row in rows for point in row.curve])
    heads, settings = _settings(comparison)
    return template("page.html").render(
        comparison=comparison,
        report=report,
        direction="higher" if higher_is_better(comparison.selection.metric) else "lower",
        points=points,
        swatches=[swatch(style(i)) for i in range(len(rows))],
        cells=[[_cells(row, r) for r in some] for row, some in zip(rows, results, strict=True)],
        charts=_charts(rows, log),
        log=log,
        guideability=guideability.charts([[run.folder for run in row.runs] for row in rows]),
        heads=heads,
        settings=settings,
        guided=report.guided(comparison),
        tuned_heads=tuned.COLUMNS,
        reached=[
            (report.reach_title(each, comparison), report.reach_columns(each), lines(each))
            for each in comparison.reached
        ],
    )


def template(name: str) -> Template:
    """One of the files beside this one; it escapes every text that it is given."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["base64"] = lambda content: base64.b64encode(content).decode()
    environment.filters["breakable"] = lambda name: escape(name).replace("_", Markup("_<wbr>"))
    return environment.get_template(name)


def _cells(row: Row, result: Result | None) -> list[tuple[str, str]]:
    """Score, ratio and verdict, each with the lines that say what it rests on."""
    score, ratio, verdict = report.cells(row, result)
    if result is None:
        return [(score, ""), (ratio, ""), ("", verdict)]
    kind, _, reason = verdict.partition(": ")
    judged, ends, ratios = result.judgement, "one seed", ""
    if judged.gap is not None and judged.noise is not None and kind != "baseline":
        reason = f"gap {percent(judged.gap)},\nnoise {percent(judged.noise)}".replace("-", "−")
    if result.interval:
        ends = " to ".join(report.score(end, result.mean) for end in result.interval)
    if more := report.sampling(result):
        ends += f"\n{more}"
    if judged.interval and kind != "baseline":
        ratios = " to ".join(map(report.ratio, judged.interval))
    return [(score, ends), (ratio, ratios), (kind, reason)]


def _charts(rows: list[Row], log: bool) -> list[tuple[str, Markup | None]]:
    """Against steps, images seen and training time: a label each, and the chart, if any."""
    longest = max(point.training_seconds or 0.0 for row in rows for point in row.curve)
    _, unit, name = next(u for u in UNITS if longest >= u[0])
    costs: dict[str, Callable[[Point], float | None]] = {
        "optimizer steps": lambda point: float(point.step),
        "images seen": lambda point: point.images_seen,
        f"training time, {name}": lambda p: p.training_seconds and p.training_seconds / unit,
    }
    charts = []
    for label, cost in costs.items():
        curves = []
        for i, row in enumerate(rows):
            there = [(x, point) for point in row.curve if (x := cost(point)) is not None]
            curves += [Curve(style(i), there)] if there else []
        charts.append((label, chart(curves, label, log=log) if curves else None))
    return charts


def _settings(comparison: Comparison) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """A column per arm, or, where many would not fit, the arms that share a value; heads first."""
    names = [row.name for row in comparison.rows]
    rows = [(key, cells) for key, *cells in report.difference_rows(comparison)]
    if len(names) > COLUMNS:
        rows = [(key, [_shared(cells, names)]) for key, cells in rows]
        names = ["Value: arms"]
    return ["Setting", *names], rows


def _shared(cells: list[str], names: list[str]) -> str:
    arms: dict[str, list[str]] = {}
    for cell, name in zip(cells, names, strict=True):
        arms.setdefault(cell, []).append(name)
    return "; ".join(f"{value}: {', '.join(some)}" for value, some in arms.items())
