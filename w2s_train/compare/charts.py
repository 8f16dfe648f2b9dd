"""Line charts with bands, as SVG text."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 490, 325  # of the picture, in its own units; text is 12 of them high
LEFT, RIGHT, TOP, BOTTOM = 74, 22, 12, 48  # margins
LOG_FROM = 10  # a logarithmic axis where the largest value is more than this times the smallest
# Okabe and Ito's colours, which colour-blind readers can tell apart, without the pale yellow.
COLOURS = ("#000000", "#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
DASHES = ("", "7 3", "2 3", "9 3 2 3")
MARKERS = {
    "circle": "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z",
    "square": "M-3.5-3.5h7v7h-7z",
    "diamond": "M0-5L5 0L0 5L-5 0z",
    "triangle": "M0-5L4.8 3.5H-4.8z",
    "cross": "M-4-1.3h2.7v-2.7h2.6v2.7H4v2.6H1.3v2.7h-2.6v-2.7H-4z",
}


@dataclass(frozen=True)
class Style:
    """How an arm looks: a colour, a dash pattern and a key of `MARKERS`."""

    colour: str
    dash: str
    marker: str


@dataclass(frozen=True)
class Line:
    """One arm; x ascending, at least one point; low and high are None without an interval."""

    name: str
    look: Style
    x: list[float]
    y: list[float]
    low: list[float | None]
    high: list[float | None]


@dataclass(frozen=True)
class Axis:
    """Maps values to positions.

    Args:
        low: Value at ``start``.
        high: Value at ``end``.
        start: Position.
        end: Position.
        log: The logarithm is mapped.
        ticks: Values with a label.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool
    ticks: list[float]

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return self.start + (value - low) / (high - low) * (self.end - self.start)


def nice_ticks(low: float, high: float, count: int) -> list[float]:
    """At most count + 2 round values that reach from low or below to high or above."""
    rough = (high - low or abs(high) or 1.0) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, max(last, first + 1) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten, or powers alone over many, around low and high."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if high / low < 1000 else (1,)
    ticks = [factor * 10.0**power for power in powers for factor in factors]
    first = max(i for i, tick in enumerate(ticks) if tick <= low * (1 + 1e-9))
    last = min(i for i, tick in enumerate(ticks) if tick >= high * (1 - 1e-9))
    return ticks[first : max(last, first + 1) + 1]


def y_axis(values: Sequence[float], start: float, end: float) -> Axis:
    """An axis for the values, logarithmic if they are positive and far apart."""
    low, high = min(values), max(values)
    log = low > 0 and high / low > LOG_FROM
    ticks = log_ticks(low, high) if log else nice_ticks(low, high, 5)
    return Axis(ticks[0], ticks[-1], start, end, log, ticks)


def number(value: float) -> str:
    """Short text of a tick: 1,500, 40K, 2.5M."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= 10 * size or (abs(value) >= size and unit != "K"):
            return f"{value / size:.4g}{unit}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def style(i: int) -> Style:
    """Of the i-th arm: no two of 140 agree in colour, dash and marker."""
    dash, marker = DASHES[i % len(DASHES)], list(MARKERS)[i % len(MARKERS)]
    return Style(COLOURS[i % len(COLOURS)], dash, marker)


def chart(lines: Sequence[Line], x_label: str, y_label: str) -> str:
    """An SVG element; no lines make a sentence instead."""
    if not lines:
        return f"<p>Not recorded: {escape(x_label)}.</p>"
    limits = [limit for line in lines for limit in (*line.low, *line.high) if limit is not None]
    y_values = [y for line in lines for y in line.y] + limits
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    last = max(line.x[-1] for line in lines) or 1.0
    ticks = [tick for tick in nice_ticks(0, last, 4) if tick <= last * (1 + 1e-9)]
    x = Axis(0, last, LEFT, right, False, ticks)
    y = y_axis(y_values, bottom, TOP)
    title = f"{y_label} against {x_label}: {', '.join(line.name for line in lines)}"
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">',
        *_frame(x, y, x_label, y_label + (" (log scale)" if y.log else "")),
        *(_band(line, x, y) for line in lines),
        *(_curve(line, x, y) for line in lines),
        "</svg>",
    ]
    return "\n".join(parts)


def swatch(look: Style) -> str:
    """A piece of an arm's line for legends."""
    return (
        '<svg class="swatch" viewBox="0 0 34 14" aria-hidden="true">'
        f'<path d="M1 7H33" {_stroke(look)}/>{_marker(look, 17, 7)}</svg>'
    )


def _frame(x: Axis, y: Axis, x_label: str, y_label: str) -> list[str]:
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = []
    for tick in y.ticks:
        parts.append(f'<path class="rule" d="M{LEFT} {y(tick):.1f}H{right}"/>')
        parts.append(
            f'<text x="{LEFT - 7}" y="{y(tick) + 4:.1f}" class="end">{number(tick)}</text>'
        )
    for tick in x.ticks:
        parts.append(f'<path class="axis" d="M{x(tick):.1f} {bottom}v5"/>')
        parts.append(f'<text x="{x(tick):.1f}" y="{bottom + 19}" class="mid">{number(tick)}</text>')
    middle = (TOP + bottom) / 2
    parts.append(f'<path class="axis" d="M{LEFT} {bottom}H{right}"/>')
    parts.append(
        f'<text x="{(LEFT + right) / 2}" y="{HEIGHT - 8}" class="mid name">{escape(x_label)}</text>'
        f'<text transform="translate(13 {middle}) rotate(-90)" class="mid name">{escape(y_label)}'
        "</text>"
    )
    return parts


def _stroke(look: Style) -> str:
    return f'fill="none" stroke="{look.colour}" stroke-width="2" stroke-dasharray="{look.dash}"'


def _marker(look: Style, x: float, y: float) -> str:
    shape = f'd="{MARKERS[look.marker]}" fill="{look.colour}"'
    return f'<path transform="translate({x:.1f} {y:.1f})" {shape}/>'


def _band(line: Line, x: Axis, y: Axis) -> str:
    """The area between low and high, where there are both."""
    ends = [
        (x(at), y(low), y(high))
        for at, low, high in zip(line.x, line.low, line.high, strict=True)
        if low is not None and high is not None
    ]
    if not ends:
        return ""
    there = [f"{at:.1f} {low:.1f}" for at, low, _ in ends]
    back = [f"{at:.1f} {high:.1f}" for at, _, high in reversed(ends)]
    return f'<path d="M{"L".join(there + back)}z" fill="{line.look.colour}" fill-opacity="0.16"/>'


def _curve(line: Line, x: Axis, y: Axis) -> str:
    places = [(x(at), y(value)) for at, value in zip(line.x, line.y, strict=True)]
    path = "L".join(f"{at:.1f} {value:.1f}" for at, value in places)
    markers = "".join(_marker(line.look, *place) for place in places)
    return f'<path d="M{path}" {_stroke(line.look)}/>{markers}'
