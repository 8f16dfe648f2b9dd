"""The comparison as a table in the terminal, as Markdown and as JSON (docs/scores.md)."""

import json
import math
import statistics
from dataclasses import asdict
from typing import Any

from rich.table import Table
from rich.text import Text

from w2s_train.compare import reached, tuned
from w2s_train.compare.comparison import Comparison, Point, Result, Row
from w2s_train.compare.numbers import CONFIDENCE, FLOOR, percent
from w2s_train.compare.protocol import short
from w2s_train.scores import higher_is_better

SCHEMA = 1
COLUMNS = ["arm", "seeds", "score", "ratio", "verdict", "time per step", "time ratio"]
GUIDED = "guided"  # a further column, where guidance at sampling was tuned
STYLES = {"better": "green", "worse": "red"}
METHOD = (
    f"A verdict needs a gap of the means over training seeds that exceeds both the "
    f"{percent(CONFIDENCE)} t interval of the scores' logarithms (Welch's, with the cautious n − 1 "
    f"degrees of freedom of the smaller arm) and {percent(FLOOR)}; each arm is tested by itself, "
    "so of twenty arms without an effect one may pass. ± is the deviation over training seeds, and "
    "over sampling seeds where there are several. Beside the means are bootstrap intervals "
    "(training seeds, and sampling seeds for all runs alike), which are too narrow for two or "
    "three seeds and decide nothing. Equal time is training time without evaluation; scores there "
    "are interpolated between neighbouring steps, linear in the logarithm of the score."
)


def score(value: float, like: float | None = None) -> str:
    """A number with the decimals of another, by default with four significant digits."""
    size = abs(value if like is None else like)
    if 0 < size < 1e-4:
        return f"{value:.3e}"
    digits = 3 - math.floor(math.log10(size)) if size else 3
    return f"{value:.{max(0, digits)}f}"


def sampling(result: Result) -> str:
    """The deviation over sampling seeds, or nothing."""
    std = result.sampling_std
    return "" if std is None else f"sampling ± {score(std, result.mean)}"


def ratio(value: float | None) -> str:
    """A ratio, or a dash."""
    return "–" if value is None else f"{value:.3f}" if abs(value) >= 0.1 else f"{value:.3g}"


def seconds(value: float | None) -> str:
    """A time, or a dash."""
    return "–" if value is None else f"{value:,.4g} s"


def points(comparison: Comparison) -> list[str]:
    """What the two parts of the table are headed with."""
    timed = comparison.seconds is not None
    at_time = [f"{seconds(comparison.seconds)} of training"] if timed else []
    return [f"step {comparison.step:,}", *at_time]


def cells(row: Row, result: Result | None) -> list[str]:
    """Score, ratio to the baseline and verdict of one arm at one point."""
    if result is None:
        return ["–", "–", "no times" if row.seconds_per_step is None else "not scored by then"]
    judgement, std = result.judgement, result.std
    mean = score(result.mean) + ("" if std is None else f" ± {score(std, result.mean)}")
    return [mean, ratio(judgement.ratio), judgement.verdict]


def guided(comparison: Comparison) -> dict[str, str]:
    """What arms score guided, by their names."""
    texts = {}
    for arm, found in comparison.guided.items():
        mean, count = statistics.fmean(found.scores), len(found.scores)
        spread = f" ± {score(statistics.stdev(found.scores), mean)}" if count > 1 else ""
        part = f", {count} of {found.runs} runs" if count < found.runs else ""
        texts[arm] = f"{score(mean)}{spread}{part}"
    return texts


def tables(comparison: Comparison) -> list[tuple[str, list[str], list[list[str]]]]:
    """Title, columns and lines, at equal steps and at equal time."""
    titles, with_guidance = points(comparison), guided(comparison)
    at_step = [_line(row, row.at_step) for row in comparison.rows]
    if with_guidance:
        for line in at_step:
            line.append(with_guidance.get(line[0], "–"))
    at_time = [_line(row, row.at_seconds) for row in comparison.rows]
    heads = [[*COLUMNS, GUIDED] if with_guidance else COLUMNS, COLUMNS]
    return list(zip(titles, heads, [at_step, at_time], strict=False))


def reach_title(threshold: reached.Threshold, comparison: Comparison) -> str:
    """What the table of a threshold shows."""
    rises = higher_is_better(comparison.selection.metric)
    way = "rises to" if rises else "falls to"
    unit = "Epochs" if threshold.unit == "epochs" else "Training images"
    return f"{unit} until {comparison.selection.metric} {way} {score(threshold.score)}"


def reach_columns(threshold: reached.Threshold) -> list[str]:
    """Of that table."""
    return ["arm", threshold.unit, "ratio", "verdict"]


def _line(row: Row, result: Result | None) -> list[str]:
    seeds = ", ".join(map(str, result.seeds if result else []))
    mean, *rest = cells(row, result)
    if result and (more := sampling(result)):
        mean += f", {more}"
    return [row.name, seeds, mean, *rest, seconds(row.seconds_per_step), ratio(row.time_ratio)]


def protocol_lines(comparison: Comparison) -> list[tuple[str, str]]:
    """Name and value of everything that the scores share."""
    chosen = comparison.selection
    seeds = ", ".join(f"{first}–{last}" for first, last in comparison.sampling_seeds)
    shared = {"metric": chosen.metric, "weights": chosen.weights, "guidance": chosen.guidance}
    everything = shared | comparison.protocol | {"sampling seeds": seeds}
    return [(key, short(value)) for key, value in everything.items() if value is not None]


def files(comparison: Comparison) -> dict[str, str]:
    """The reports by the names of their files, without the page."""
    return {"comparison.md": markdown(comparison), "comparison.json": to_json(comparison)}


def terminal(comparison: Comparison) -> list[Table]:
    """Tables; verdicts are coloured."""
    made = [
        (f"{comparison.selection}, {title}", heads, lines)
        for title, heads, lines in tables(comparison)
    ]
    for each in comparison.reached:
        title = reach_title(each, comparison)
        made.append((title, reach_columns(each), reached.lines(each)))
    return [_printed(*each) for each in made]


def _printed(title: str, heads: list[str], lines: list[list[str]]) -> Table:
    table = Table(title=Text(title), title_justify="left")
    for i, heading in enumerate(heads):
        table.add_column(heading, justify="left" if i < 2 else "right", overflow="fold")
    for line in lines:
        table.add_row(*(Text(text, style=STYLES.get(text, "")) for text in line))
    return table


def markdown(comparison: Comparison) -> str:
    """The whole report without curves and grids."""
    text = [f"# {comparison.selection}", ""]
    for title, heads, lines in tables(comparison):
        text += [f"## At {title}", "", *markdown_table(heads, lines), ""]
    for threshold in comparison.reached:
        text += [f"## {reach_title(threshold, comparison)}", ""]
        text += [*markdown_table(reach_columns(threshold), reached.lines(threshold)), ""]
    text += [METHOD, "", "## Protocol", ""]
    text += markdown_table(["key", "value"], [list(pair) for pair in protocol_lines(comparison)])
    names = [row.name for row in comparison.rows]
    text += ["", "## Settings that differ", ""]
    text += markdown_table(["setting", *names], difference_rows(comparison))
    if comparison.tuned:
        text += [
            "",
            "## Guidance, tuned",
            "",
            *markdown_table(tuned.COLUMNS, tuned_rows(comparison)),
        ]
    for title, entries in (("Left out", comparison.refused), ("Notes", comparison.notes)):
        if entries:
            text += ["", f"## {title}", "", *(f"- {entry}" for entry in entries)]
    return "\n".join(text) + "\n"


def difference_rows(comparison: Comparison) -> list[list[str]]:
    """One line per setting; a dash where an arm does not have it."""
    return [
        [key, *(short(by_arm[row.name]) if row.name in by_arm else "–" for row in comparison.rows)]
        for key, by_arm in comparison.differences.items()
    ]


def tuned_rows(comparison: Comparison) -> list[list[str]]:
    """One line per tuning, or per run without one; none where nothing is to be tuned."""
    return [line.cells(score) for line in comparison.tuned]


def markdown_table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a table; bars in its texts are escaped."""
    lines = [head, ["---"] * len(head), *rows]
    return [
        f"| {' | '.join(text.replace('|', chr(92) + '|') for text in line)} |" for line in lines
    ]


def to_json(comparison: Comparison) -> str:
    """``comparison.json``."""
    chosen = comparison.selection
    shared = {"weights": chosen.weights, "guidance": chosen.guidance} | comparison.protocol
    content = {
        "schema": SCHEMA,
        "metric": chosen.metric,
        "protocol": shared | {"seeds": comparison.sampling_seeds},
        "baseline": comparison.baseline,
        "arms": [_arm(row, comparison) for row in comparison.rows],
        "refused": comparison.refused,
        "notes": comparison.notes,
        "differences": comparison.differences,
    }
    if comparison.reached:
        content["reached"] = reached.as_json(comparison.reached)
    if comparison.tuned:
        content["tuned"] = tuned.as_json(comparison.tuned)
    return json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def _arm(row: Row, comparison: Comparison) -> dict[str, Any]:
    at_step, guided = _result(row.at_step), comparison.guided.get(row.name)
    timed = None
    if row.at_seconds is not None:
        timed = {"seconds": comparison.seconds} | _result(row.at_seconds)
    return {
        "name": row.name,
        "runs": [str(run.folder) for run in row.runs],
        "step": comparison.step,
        **at_step,
        "equal_steps": {"step": comparison.step} | at_step,
        "equal_wall_clock": timed,
        "seconds_per_step": row.seconds_per_step,
        "time_ratio": row.time_ratio,
        "curve": [_point(point) for point in row.curve],
        "guided": None if guided is None else asdict(guided),
    }


def _result(result: Result) -> dict[str, Any]:
    judgement = result.judgement
    return {
        "seeds": result.seeds,
        "mean": result.mean,
        "std": result.std,
        "sampling_std": result.sampling_std,
        "interval": result.interval,
        "ratio_to_baseline": judgement.ratio,
        "ratio_interval": judgement.interval,
        "gap": judgement.gap,
        "noise": judgement.noise,
        "verdict": judgement.verdict,
    }


def _point(point: Point) -> dict[str, Any]:
    low, high = point.interval or (None, None)
    return {
        "step": point.step,
        "images_seen": point.images_seen,
        "training_seconds": point.training_seconds,
        "mean": point.mean,
        "std": point.std,
        "low": low,
        "high": high,
    }
