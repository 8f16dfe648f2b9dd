"""How much training an arm needs until its score is as good as a given one.

With the FID of plain samples this is the field's E@FID-k, epochs until it falls below k (RAEv2): it
does not depend on how long the runs went on afterwards.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from w2s_train.compare import numbers
from w2s_train.compare.protocol import Arm, Series


@dataclass(frozen=True)
class Reach:
    """One arm.

    Args:
        arm: Its name.
        needed: Epochs, or training images, by training seed; None where it was not reached.
        at_first: Seeds whose first score was that good already: they needed no more than that.
        last: The same unit at the last score, the mean over seeds.
        ratio: Of the means to the baseline's; None where a run of either did not reach it, or the
            baseline's first score was that good already.
        verdict: Against the baseline; None as above, where it rests on what is only a bound, and
            for the baseline itself.
    """

    arm: str
    needed: dict[int, float | None]
    at_first: list[int]
    last: float
    ratio: float | None = None
    verdict: str | None = None

    @property
    def complete(self) -> list[float] | None:
        """What its runs needed, if all reached it."""
        there = [x for x in self.needed.values() if x is not None]
        return there if len(there) == len(self.needed) else None


@dataclass(frozen=True)
class Threshold:
    """A score, and when each arm reached it; ``unit`` is "epochs" or "images"."""

    score: float
    unit: str
    arms: list[Reach]


def thresholds(
    arms: Sequence[Arm],
    baseline: Arm,
    wanted: Sequence[float],
    notes: list[str],
    *,
    higher: bool,
) -> list[Threshold]:
    """For each wanted score, by default the worst that a run of the baseline ended with.

    None where the first score of every run was that good already, which says nothing.

    Args:
        arms: In the order of the report, the baseline among them.
        baseline: What the others are compared with.
        wanted: Scores; none for the default.
        notes: Lines about what else is worth knowing.
        higher: Whether higher scores are better.
    """
    sizes = [one.run.training_samples for arm in arms for one in arm.series]
    known = all(sizes)
    found = []
    for score in dict.fromkeys(wanted) or [_worst_end(baseline, higher)]:
        reached = [_reach(arm, score, higher, known) for arm in arms]
        base = next(each for each in reached if each.arm == baseline.name)
        if all(len(each.at_first) == len(each.needed) for each in reached):
            if wanted:
                notes.append(
                    f"reach={score:g}: the first scores of all runs were that good already"
                )
            continue
        judged = [each if each is base else _judged(each, base) for each in reached]
        found.append(Threshold(score, "epochs" if known else "images", judged))
    return found


def _worst_end(baseline: Arm, higher: bool) -> float:
    ends = [_curve(one)[-1][1] for one in baseline.series]
    return min(ends) if higher else max(ends)


def _curve(one: Series) -> list[tuple[float, float]]:
    """Training images and mean score of the sampling seeds that scored the most steps."""
    most = max(map(len, one.values.values()))
    curves = [curve for curve in one.values.values() if len(curve) == most]
    steps = set.intersection(*map(set, curves))  # of as many steps, but not the same: the first
    curves = curves if steps else curves[:1]
    return [
        (float(one.images[step]), statistics.fmean(curve[step] for curve in curves))
        for step in sorted(steps or curves[0])
    ]


def _reach(arm: Arm, score: float, higher: bool, known: bool) -> Reach:
    needed, at_first, ends = dict[int, float | None](), [], []
    for one in arm.series:
        size = float(one.run.training_samples or 1) if known else 1.0
        curve = [(images / size, value) for images, value in _curve(one)]
        place = first_reached(curve, score, higher=higher)
        needed[one.run.seed] = place
        at_first += [one.run.seed] if place == curve[0][0] else []
        ends.append(curve[-1][0])
    return Reach(arm.name, needed, at_first, statistics.fmean(ends))


def first_reached(
    curve: Sequence[tuple[float, float]], score: float, *, higher: bool
) -> float | None:
    """Where a curve (x ascending, y) is first as good as a score; None if nowhere.

    Between two points it is linear in x of log y, as at equal time; of y if one is not positive. A
    curve that begins with a score that good has reached it at its first point at the latest.
    """

    def good(value: float) -> bool:
        return value >= score if higher else value <= score

    for i, (x, y) in enumerate(curve):
        if good(y):
            return x if i == 0 else numbers.crossing(curve[i - 1], (x, y), score)
    return None


def _judged(reach: Reach, base: Reach) -> Reach:
    ours, theirs = reach.complete, base.complete
    if ours is None or theirs is None or base.at_first:
        return reach
    found = numbers.judge([[x] for x in ours], [[x] for x in theirs], higher_is_better=False)
    certain = not reach.at_first or found.verdict == "better"
    return replace(reach, ratio=found.ratio, verdict=found.verdict if certain else None)


def lines(threshold: Threshold) -> list[list[str]]:
    """A line an arm: name, what it needed, ratio to the baseline's, verdict."""

    def number(value: float) -> str:
        few = 2 if threshold.arms[0].last >= 1 else 5
        return f"{value:.{few}f}" if threshold.unit == "epochs" else f"{value:,.0f}"

    made = []
    for each in threshold.arms:
        there = [x for x in each.needed.values() if x is not None]
        bound = "≤ " if each.at_first else ""
        text = (
            f"{bound}{number(statistics.fmean(there))}" if there else f"not by {number(each.last)}"
        )
        if each.complete and len(there) > 1:
            text += f" ± {number(statistics.stdev(there))}"
        elif there and not each.complete:
            text += f", {len(there)} of {len(each.needed)} runs"
        ratio = "–" if each.ratio is None else f"{bound}{each.ratio:.3f}"
        made.append([each.arm, text, ratio, each.verdict or "–"])
    return made


def as_json(found: Sequence[Threshold]) -> list[dict[str, Any]]:
    """For ``comparison.json``."""
    return [
        {
            "score": each.score,
            "unit": each.unit,
            "arms": [
                {
                    "name": arm.arm,
                    "needed": {str(seed): x for seed, x in arm.needed.items()},
                    "at_first": arm.at_first,
                    "last": arm.last,
                    "ratio_to_baseline": arm.ratio,
                    "verdict": arm.verdict,
                }
                for arm in each.arms
            ],
        }
        for each in found
    ]
