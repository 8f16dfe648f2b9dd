"""The comparison of images as one HTML file that needs nothing else: no scripts, no network."""

import base64
import io
from typing import Any, NamedTuple

from markupsafe import Markup
from PIL import Image as Pictures

from w2s_train.compare import images_report
from w2s_train.compare.charts import Curve, chart, style, swatch
from w2s_train.compare.comparison import Point
from w2s_train.compare.image_comparison import SAMPLES, ImageComparison, ImageRow
from w2s_train.compare.page import template

SIDE = 224  # pixels of the longer side of a sample


class Cells(NamedTuple):
    """What the table of results shows of one arm."""

    score: str
    interval: str
    difference: str
    kind: str  # of the verdict
    reason: str
    others: list[tuple[str, str]]  # score and difference


class Samples(NamedTuple):
    """Images of one prompt and seed, one for each arm; None where it cannot be read."""

    prompt: str
    seed: int
    images: list[str | None]  # as data: URLs


def images_page(comparison: ImageComparison) -> str:
    """The whole page; the template escapes every text of a record."""
    looks = _styles(comparison)
    broken = list[str]()
    return template("images.html").render(
        comparison=comparison,
        report=images_report,
        swatches=[swatch(looks[row.name]) for row in comparison.rows],
        cells=[_cells(row, comparison) for row in comparison.rows],
        charts=_charts(comparison, looks),
        samples=_samples(comparison, broken),
        broken=broken,
        swept=len(comparison.sweep.folders) > 1,
    )


def _styles(comparison: ImageComparison) -> dict[str, dict[str, Any]]:
    """The sweep has one look, every other arm its own."""
    others = [row.name for row in comparison.rows if row.scale is None]
    looks = {name: style(i) for i, name in enumerate(others, 1)}
    return {row.name: looks.get(row.name, style(0)) for row in comparison.rows}


def _cells(row: ImageRow, comparison: ImageComparison) -> Cells:
    first, *others = comparison.scores
    mean, is_base = row.scores[first], row.name == comparison.baseline
    kind, _, reason = images_report.verdict(row, comparison).partition(": ")
    ends = " to ".join(images_report.score(end, mean.mean) for end in mean.interval or ())
    return Cells(
        images_report.score(mean.mean),
        ends,
        "–" if is_base else images_report.difference(row, first),
        kind,
        reason,
        [
            (
                images_report.score(row.scores[name].mean),
                "" if is_base else images_report.difference(row, name),
            )
            for name in others
        ],
    )


def _point(row: ImageRow, metric: str) -> Point:
    """The score; its interval is that of the paired difference from the baseline."""
    mean = row.scores[metric].mean
    return Point(0, 0.0, None, mean, None, row.differences[metric].around(mean))


def _charts(
    comparison: ImageComparison, looks: dict[str, dict[str, Any]]
) -> list[tuple[str, Markup]]:
    """Against the guidance scale, if there is a sweep, evaluations and seconds."""
    points = {row.name: _point(row, comparison.metric) for row in comparison.rows}
    made, swept = [], comparison.sweep
    if len(swept.scales) > 1:
        names = [folder.name for folder in swept.folders]
        curve = [(x, points[name]) for x, name in zip(swept.scales, names, strict=True)]
        curves = [Curve(style(0), curve)]
        ends = swept.scales[0], swept.scales[-1]
        curves += [
            Curve(looks[row.name], [(x, points[row.name]) for x in ends])
            for row in comparison.rows
            if row.scale is None
        ]
        made.append(("guidance scale of the sweep", chart(curves, "guidance scale", log=False)))
    costs = {
        "evaluations an image": [row.evaluations for row in comparison.rows],
        "seconds an image": [row.median_seconds for row in comparison.rows],
    }
    for label, values in costs.items():
        pairs = zip(comparison.rows, values, strict=True)
        curves = [Curve(looks[row.name], [(x, points[row.name])]) for row, x in pairs]
        made.append((label, chart(curves, label, log=False)))
    return made


def _samples(comparison: ImageComparison, broken: list[str]) -> list[Samples]:
    """Of the first prompts, at the first seed that each has; ``broken`` says what is missing."""
    made = []
    for prompt in comparison.prompts[:SAMPLES]:
        key = min(key for key in comparison.keys if key[0] == prompt)
        images = list[str | None]()
        for row in comparison.rows:
            path = row.folder.path / row.folder.images[key].file
            try:
                images.append(_thumbnail(path.read_bytes()))
            except (OSError, ValueError, SyntaxError, Pictures.DecompressionBombError):
                broken.append(f"{path}: must be a PNG image; it is missing or broken and not shown")
                images.append(None)
        made.append(Samples(prompt, key[1], images))
    return made


def _thumbnail(content: bytes) -> str:
    image = Pictures.open(io.BytesIO(content)).convert("RGB")
    image.thumbnail((SIDE, SIDE))
    file = io.BytesIO()
    image.save(file, "jpeg", quality=88)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
