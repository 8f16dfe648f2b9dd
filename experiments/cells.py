"""What the tables of the studies have in common."""

import re
import statistics
import sys
from collections.abc import Sequence

from w2s_train.compare.numbers import Judgement, half_width
from w2s_train.sampler import Euler


def interval(mean: float, std: float, n: int, decimals: int = 2) -> str:
    """Mean and its 95 % t interval over training seeds."""
    width, d = half_width(std, n), decimals
    return f"{mean:.{d}f} ({mean - width:.{d}f} to {mean + width:.{d}f})"


def interval_of(values: Sequence[float], decimals: int = 2) -> str:
    """The same of at least three values, or the ones there are."""
    if len(values) < 3:
        return ", ".join(f"{value:.{decimals}f}" for value in values) or "–"
    return interval(statistics.fmean(values), statistics.stdev(values), len(values), decimals)


def evaluations(guidance: str, steps: int) -> int:
    """Network evaluations for one image: Euler's, and one more at each step that cfg guides."""
    if guidance == "none" or guidance.startswith("inbuilt("):
        return steps
    found = re.fullmatch(r"cfg\(\S+, \[(\S+), (\S+)\]\)", guidance)
    if not found:
        sys.exit(
            f"error: guidance={guidance}: must be none, inbuilt(...) or cfg(SCALE, [LOW, HIGH])"
        )
    low, high = map(float, found.groups())
    return steps + sum(low <= t <= high for t in Euler(steps).times()[:-1])


def with_verdict(text: str, judgement: Judgement) -> str:
    """Better ones are bold, worse ones say so."""
    mean, _, rest = text.partition(" ")
    if judgement.verdict == "better":
        return f"**{mean}** {rest}"
    return f"{text}, worse" if judgement.verdict == "worse" else text
