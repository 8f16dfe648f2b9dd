"""The comparison of images as a table in the terminal, as Markdown and as JSON."""

import json
from typing import Any

from rich.table import Table
from rich.text import Text

from w2s_train.compare.image_comparison import Estimate, ImageComparison, ImageRow
from w2s_train.compare.numbers import CONFIDENCE, percent
from w2s_train.compare.protocol import short
from w2s_train.compare.report import STYLES, markdown_table, ratio, score, seconds

SCHEMA = 1
METHOD = (
    "Images are paired by prompt and seed. A prompt's score is its mean over seeds, a difference "
    "the mean over prompts of the paired differences, ± half its "
    f"{percent(CONFIDENCE)} t interval over prompts. An arm is better or worse where that interval "
    "excludes 0, worse than the best of a sweep only if also worse than the scale that is best for "
    "the other half of the prompts; each arm is tested by itself, so of twenty arms without an "
    "effect one may pass. "
    "± beside a mean is over prompts, too, and larger, since prompts differ more than arms do. "
    "Evaluations are those of whole networks, a mean; seconds are a median, since the first image "
    "includes what is compiled once. Distances are one number a folder and have no interval."
)


def estimate(value: Estimate, like: float | None = None) -> str:
    """A mean or a difference with its noise, with the decimals of another number."""
    like = value.mean if like is None else like
    noise = "" if value.noise is None else f" ± {score(value.noise, like)}"
    return f"{score(value.mean, like)}{noise}"


def difference(row: ImageRow, name: str) -> str:
    """From the baseline, with its sign; one decimal more than the score has."""
    return signed(row.differences[name], row.scores[name].mean)


def signed(value: Estimate, like: float) -> str:
    """A difference of scores like this one."""
    text = estimate(value, like / 10)
    return f"+{text}" if value.mean > 0 else text


def columns(comparison: ImageComparison) -> list[str]:
    """Heads of the table."""
    first, *others = comparison.scores
    costs = ["evaluations", "seconds", "time ratio"]
    return ["arm", first, "difference", "verdict", *others, *comparison.distances, *costs]


def lines(comparison: ImageComparison) -> list[list[str]]:
    """Its lines, in the columns of `columns`."""
    return [_line(row, comparison) for row in comparison.rows]


def _line(row: ImageRow, comparison: ImageComparison) -> list[str]:
    first, *others = comparison.scores
    is_base = row.name == comparison.baseline
    others = [
        score(row.scores[name].mean) + ("" if is_base else f" ({difference(row, name)})")
        for name in others
    ]
    return [
        row.name,
        estimate(row.scores[first]),
        "–" if is_base else difference(row, first),
        verdict(row, comparison),
        *others,
        *(score(row.distances[name]) for name in comparison.distances),
        f"{row.evaluations:.4g}",
        seconds(row.median_seconds),
        ratio(row.ratios[1]),
    ]


def verdict(row: ImageRow, comparison: ImageComparison) -> str:
    """Of one arm, or that it is the baseline."""
    is_base = row.name == comparison.baseline
    return "baseline" if is_base else row.verdict(comparison.metric)


def title(comparison: ImageComparison) -> str:
    """What is compared, in words."""
    return f"{comparison.metric}, higher is better, {size(comparison)}"


def size(comparison: ImageComparison) -> str:
    """Of how much it is."""
    prompts, images = len(comparison.prompts), len(comparison.keys)
    some = f"{images:,} image{'s'[: images != 1]} of {prompts:,} prompt{'s'[: prompts != 1]}"
    return f"{some} in each of {len(comparison.rows)} arms"


def tables(comparison: ImageComparison) -> list[tuple[str, list[str], list[list[str]]]]:
    """Title, heads and lines of what stands beside the results."""
    made = []
    names, swept = [row.name for row in comparison.rows], comparison.sweep
    if len(swept.folders) > 1:
        heads = ["arm", *(f"{scale:g}" for scale in swept.scales)]
        made.append(("Differences from each scale of the sweep", heads, _against(comparison)))
    if comparison.categories:
        heads = ["category", "prompts", *(n for n in names if n != comparison.baseline)]
        made.append(("Differences from the baseline by category", heads, _by_category(comparison)))
    made.append(("Settings that differ", *_settings(comparison)))
    shared = [[key, short(value)] for key, value in comparison.protocol.items()]
    made.append(("Protocol of all images", ["key", "value"], shared))
    return made


def _against(comparison: ImageComparison) -> list[list[str]]:
    return [
        [row.name, *(_cell(row, row.against_sweep[f.name], comparison) for f in swept)]
        for row in comparison.rows
        if row.scale is None
        for swept in [comparison.sweep.folders]
    ]


def _by_category(comparison: ImageComparison) -> list[list[str]]:
    others = [row for row in comparison.rows if row.name != comparison.baseline]
    return [
        [category, f"{count:,}", *(_cell(r, r.categories[category], comparison) for r in others)]
        for category, count in comparison.categories.items()
    ]


def _cell(row: ImageRow, value: Estimate, comparison: ImageComparison) -> str:
    return signed(value, row.scores[comparison.metric].mean)


def _settings(comparison: ImageComparison) -> tuple[list[str], list[list[str]]]:
    """A line per arm; arguments of guidance stand there where its words do not tell arms apart."""
    rows, differing = comparison.rows, comparison.differences
    alike = len({row.folder.guidance for row in rows}) < len(rows)
    keys = [key for key in differing if alike or not key.startswith("guidance_settings.")]
    keys = [key for key in keys if key != "guidance"]
    lines = [
        [row.name, row.folder.guidance]
        + [short(differing[key][row.name]) if row.name in differing[key] else "–" for key in keys]
        for row in rows
    ]
    return ["arm", "guidance", *keys], lines


def terminal(comparison: ImageComparison) -> list[Table]:
    """One table, narrower than that of the files; verdicts are coloured."""
    table = Table(title=Text(title(comparison)), title_justify="left")
    for i, heading in enumerate(columns(comparison)):
        table.add_column(heading, justify="left" if i < 1 else "right", overflow="fold")
    others = comparison.scores[1:]
    for row, line in zip(comparison.rows, lines(comparison), strict=True):
        line[3] = line[3].partition(":")[0]
        line[4 : 4 + len(others)] = [score(row.scores[name].mean) for name in others]
        table.add_row(*(Text(text, style=STYLES.get(text, "")) for text in line))
    return [table]


def markdown(comparison: ImageComparison) -> str:
    """The whole report without charts and samples."""
    text = [f"# {title(comparison)}", ""]
    text += [*markdown_table(columns(comparison), lines(comparison)), "", METHOD]
    for name, entries in (("Left out", comparison.refused), ("Notes", comparison.notes)):
        if entries:
            text += ["", f"## {name}", "", *(f"- {entry}" for entry in entries)]
    for name, heads, rows in tables(comparison):
        if rows:
            text += ["", f"## {name}", "", *markdown_table(heads, rows)]
    return "\n".join(text) + "\n"


def files(comparison: ImageComparison) -> dict[str, str]:
    """The reports by the names of their files, without the page."""
    return {"comparison.md": markdown(comparison), "comparison.json": to_json(comparison)}


def to_json(comparison: ImageComparison) -> str:
    """``comparison.json`` of images."""
    swept = comparison.sweep
    content = {
        "schema": SCHEMA,
        "kind": "images",
        "metric": comparison.metric,
        "protocol": comparison.protocol,
        "prompts": len(comparison.prompts),
        "images": len(comparison.keys),
        "baseline": comparison.baseline,
        "sweep": [
            {"arm": folder.name, "scale": scale}
            for folder, scale in zip(swept.folders, swept.scales, strict=True)
        ],
        "arms": [_arm(row, comparison) for row in comparison.rows],
        "categories": comparison.categories,
        "refused": comparison.refused,
        "notes": comparison.notes,
        "differences": comparison.differences,
    }
    return json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def _arm(row: ImageRow, comparison: ImageComparison) -> dict[str, Any]:
    return {
        "name": row.name,
        "folder": str(row.folder.path),
        "guidance": row.folder.guidance,
        "scale": row.scale,
        "verdict": verdict(row, comparison),
        "crossed": None if row.crossed is None else _as_json(row.crossed),
        "scores": {
            name: {"mean": mean.mean, "interval": mean.interval}
            | {"difference": _as_json(row.differences[name])}
            for name, mean in row.scores.items()
        },
        "distances": row.distances,
        "evaluations": row.evaluations,
        "evaluations_ratio": row.ratios[0],
        "seconds": row.seconds,
        "median_seconds": row.median_seconds,
        "seconds_ratio": row.ratios[1],
        "against_sweep": {name: _as_json(each) for name, each in row.against_sweep.items()},
        "categories": {name: _as_json(each) for name, each in row.categories.items()},
    }


def _as_json(value: Estimate) -> dict[str, Any]:
    return {"mean": value.mean, "interval": value.interval, "verdict": value.verdict}
