"""The statistics of a comparison, over training seeds and the sampling seeds that cross them.

A sample is a list with one element per training seed: the scores of that run, one per range of
sampling seeds, the same ranges in all runs. Training seeds are the unit: retraining moves an FID
about three times more than sampling again does, so scores of one run are no independent evidence
about its recipe.
"""

import math
import statistics
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.special import stdtrit

Sample = Sequence[Sequence[float]]

CONFIDENCE = 0.95
FLOOR = 0.013  # gaps below 1.3 % are inconclusive for FID at 50K images, however many seeds agree
DRAWS = 5000  # of the bootstrap


class Interval(NamedTuple):
    """The two ends of a 95 % interval."""

    low: float
    high: float


@dataclass(frozen=True)
class Judgement:
    """A sample against that of the baseline.

    Args:
        ratio: Of the means; None if the baseline's is not positive.
        interval: Bootstrap interval of the ratio; None as above, or with one run on either side.
        gap: Difference of the means over the baseline's, with its sign; None if that is 0.
        noise: What the gap must exceed, in the same unit; None if it cannot be told.
        verdict: "better", "worse" or "inconclusive: ..." with the reason; "baseline" for itself.
    """

    ratio: float | None
    interval: Interval | None
    gap: float | None
    noise: float | None
    verdict: str


def run_means(sample: Sample) -> list[float]:
    """The mean over sampling seeds of each run."""
    return [statistics.fmean(scores) for scores in sample]


def mean(sample: Sample) -> float:
    """The mean over runs of their means."""
    return statistics.fmean(run_means(sample))


def spread(sample: Sample) -> float | None:
    """Standard deviation (n - 1) of the runs' means over training seeds; None for one run."""
    return statistics.stdev(run_means(sample)) if len(sample) > 1 else None


def sampling_spread(sample: Sample) -> float | None:
    """Standard deviation over sampling seeds, pooled over runs; None if each run has one."""
    squares = [sum((s - statistics.fmean(run)) ** 2 for s in run) for run in sample]
    freedom = sum(len(run) - 1 for run in sample)
    return math.sqrt(sum(squares) / freedom) if freedom else None


def bootstrap(sample: Sample, seed: int = 0) -> np.ndarray:
    """Means (DRAWS,) of resampled samples: training seeds, and ranges of sampling seeds.

    Ranges are drawn once for all runs, and for all samples with as many of them, since the runs
    share their noise. The same seed gives the same draws of training seeds.
    """
    scores = np.asarray(sample, dtype=float)
    n, m = scores.shape
    ranges = np.random.default_rng(m).integers(m, size=(DRAWS, 1, m))
    runs = np.random.default_rng([seed, n]).integers(n, size=(DRAWS, n, 1))
    return scores[runs, ranges].mean((1, 2))


def percentiles(draws: np.ndarray) -> Interval:
    """The interval that holds the middle 95 % of the draws (percentile bootstrap)."""
    low, high = np.quantile(draws, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(float(low), float(high))


def bootstrap_interval(sample: Sample) -> Interval | None:
    """Of the mean; None for one run, which says nothing about other training seeds.

    With two or three runs it lies within their range and is too narrow: it is shown, and the
    verdict does not rest on it.
    """
    return percentiles(bootstrap(sample)) if len(sample) > 1 else None


def half_width(std: float, n: int) -> float:
    """Half the 95 % t interval of the mean of n numbers with this standard deviation (n - 1)."""
    return _t_quantile(n - 1) * std / math.sqrt(n)


def _t_quantile(freedom: int) -> float:
    """What 95 % of Student's t lie within, to both sides."""
    return float(stdtrit(freedom, (1 + CONFIDENCE) / 2))


def welch_half_width(a: Sequence[float], b: Sequence[float]) -> float:
    """Half the 95 % interval of mean(a) - mean(b), at least two numbers each.

    t(df) sqrt(s_a^2 / n_a + s_b^2 / n_b), df = min(n_a, n_b) - 1: never too narrow for normal
    numbers, while Welch's own df (1947) is where the smaller side has the larger variance.
    """
    error = math.sqrt(statistics.variance(a) / len(a) + statistics.variance(b) / len(b))
    return _t_quantile(min(len(a), len(b)) - 1) * error


def judge(sample: Sample, baseline: Sample, *, higher_is_better: bool) -> Judgement:
    """Compare with the baseline: a gap counts if it exceeds the noise and `FLOOR`."""
    ours, base = mean(sample), mean(baseline)
    if base == 0:
        return Judgement(None, None, None, None, "inconclusive: the baseline's score is 0")
    gap = (ours - base) / abs(base)
    single = min(len(sample), len(baseline)) == 1
    ratio, interval, noise = None, None, None
    if base > 0:
        ratio = ours / base
        below = bootstrap(baseline, seed=1)
        if not single and below.min() > 0:
            interval = percentiles(bootstrap(sample) / below)
    if not single:
        noise = max(_noise(run_means(sample), run_means(baseline), gap), FLOOR)
    return Judgement(ratio, interval, gap, noise, _verdict(gap, noise, higher_is_better))


def _noise(ours: Sequence[float], base: Sequence[float], gap: float) -> float:
    """What a gap of this sign must exceed, as a share of the baseline.

    Scores vary by factors rather than by amounts, so the interval is that of the logarithms; of the
    scores themselves if one is not positive.
    """
    if min(*ours, *base) > 0:
        width = welch_half_width([math.log(x) for x in ours], [math.log(x) for x in base])
        return math.expm1(width) if gap > 0 else -math.expm1(-width)
    return welch_half_width(ours, base) / abs(statistics.fmean(base))


def _verdict(gap: float, noise: float | None, higher_is_better: bool) -> str:
    if noise is None:
        return f"inconclusive: one seed, the gap is {percent(abs(gap))}"
    if abs(gap) <= noise:
        return f"inconclusive: the gap is {percent(abs(gap))}, the noise {percent(noise)}"
    return "better" if (gap > 0) == higher_is_better else "worse"


def percent(share: float) -> str:
    """A share in percent, with one decimal below 10 %."""
    return f"{100 * share:.{1 if abs(share) < 0.0995 else 0}f} %"


def crossing(a: tuple[float, float], b: tuple[float, float], level: float) -> float:
    """Where the curve of `interpolate` between two points (x, y) has this y, between theirs."""
    (left, below), (right, above) = a, b
    if below == above:
        return left
    if min(below, above, level) > 0:
        below, above, level = math.log(below), math.log(above), math.log(level)
    return left + (right - left) * (level - below) / (above - below)


def interpolate(x: Sequence[float], y: Sequence[float], at: float) -> float | None:
    """The value at ``at``, x ascending; None outside of x.

    Linear in x of log y, for scores fall by factors rather than by amounts; of y itself between
    neighbours that are not both positive.
    """
    if not x or not x[0] <= at <= x[-1]:
        return None
    right = bisect_left(x, at)
    if x[right] == at:
        return y[right]
    share = (at - x[right - 1]) / (x[right] - x[right - 1])
    below, above = y[right - 1], y[right]
    if min(below, above) > 0:
        return math.exp((1 - share) * math.log(below) + share * math.log(above))
    return (1 - share) * below + share * above
