"""Which scores of the runs may be compared: one metric, one protocol."""

import itertools
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from w2s_train.compare.numbers import interpolate
from w2s_train.compare.runs import Run, flatten
from w2s_train.errors import UserError
from w2s_train.scores import Score

Range = tuple[int, int]
# Must agree. Metric, weights and guidance agree because they select the scores; the decay of the
# EMA is a setting of the arm.
AGREE = ("sampler", "steps", "autoencoder", "precision", "extractor", "n")


@dataclass(frozen=True)
class Selection:
    """Which scores of a run are meant."""

    metric: str
    weights: str = "ema"
    guidance: str = "none"

    def __str__(self) -> str:
        return f"{self.metric}, weights {self.weights}, guidance {self.guidance}"

    def of(self, run: Run) -> list[Score]:
        """Those of one run, oldest first."""
        return [score for score in run.scores if _selection(score) == self]


def _selection(score: Score) -> Selection:
    return Selection(score.metric, score.weights, score.guidance)


def select(runs: Sequence[Run], metric: str | None, weights: str, guidance: str) -> Selection:
    """What to compare: without a metric, the first FID or Fréchet distance, or the first of all.

    Raises:
        UserError: No run has such a score; the message lists what there is.
    """
    there = list(dict.fromkeys(_selection(score) for run in runs for score in run.scores))
    if metric is None:
        names = [s.metric for s in there]
        metric = next((name for name in names if name.startswith(("fid", "fd_"))), names[0])
    wanted = Selection(metric, weights, guidance)
    for key in ("metric", "weights", "guidance"):
        names = list(dict.fromkeys(getattr(s, key) for s in there))
        if getattr(wanted, key) not in names:
            raise UserError(f"{key}={getattr(wanted, key)}: must be one of {', '.join(names)}")
        there = [s for s in there if getattr(s, key) == getattr(wanted, key)]
    return wanted


@dataclass(frozen=True)
class Series:
    """The scores of one run that take part.

    Args:
        run: The run.
        values: Score by range of sampling seeds and by step.
        seconds: Training time by step; None where it was not recorded.
        images: Images seen by step.
        commits: Of the code that scored.
    """

    run: Run
    values: dict[Range, dict[int, float]]
    seconds: dict[int, float | None]
    images: dict[int, int]
    commits: frozenset[str]

    @classmethod
    def of(cls, run: Run, scores: Sequence[Score]) -> "Series":
        """From scores, oldest first; of two with the same seeds and step the later one counts."""
        values: dict[Range, dict[int, float]] = {}
        for score in scores:
            values.setdefault(score.protocol.seeds, {})[score.step] = score.value
        # Later entries of a step score its checkpoint again, after the fit.
        first = {score.step: score.protocol for score in reversed(scores)}
        seconds = {step: first[step].training_seconds for step in sorted(first)}
        images = {step: first[step].images_seen for step in sorted(first)}
        commits = frozenset(score.protocol.git_commit or "unknown" for score in scores)
        return cls(run, dict(sorted(values.items())), seconds, images, commits)

    def at_step(self, step: int) -> list[float]:
        """Scores at a step, one per range of sampling seeds that has it."""
        return [curve[step] for curve in self.values.values() if step in curve]

    def at_seconds(self, at: float) -> list[float]:
        """Scores after a training time in seconds, between those of the neighbouring steps."""
        found = []
        for curve in self.values.values():
            times = ((self.seconds[step], score) for step, score in curve.items())
            points = sorted((x, y) for x, y in times if x is not None)
            found.append(interpolate([x for x, _ in points], [y for _, y in points], at))
        return [score for score in found if score is not None]

    def total_seconds(self) -> float | None:
        """Training time of the last score that has one."""
        return max((x for x in self.seconds.values() if x is not None), default=None)

    def seconds_per_step(self) -> float | None:
        """Median over consecutive scores; from the start where there is only one."""
        points = [(step, x) for step, x in self.seconds.items() if x is not None and step > 0]
        points = [(0, 0.0), *points] if len(points) == 1 else points
        pairs = itertools.pairwise(points)
        return _median([(x - before) / (step - last) for (last, before), (step, x) in pairs])


def facts(score: Score, run: Run) -> dict[str, Any]:
    """What must agree, by name: protocol, reference fingerprint and training data."""
    agree = {key: getattr(score.protocol, key) for key in AGREE}
    reference = flatten(score.protocol.reference, "reference")
    return agree | reference | {"data.train_urls": run.settings.get("data.train_urls")}


@dataclass(frozen=True)
class Rules:
    """What the majority of some runs, those of the baseline, has."""

    facts: dict[str, Any]
    ranges: frozenset[Range]

    @classmethod
    def of_majority(cls, runs: Sequence[Run], selection: Selection) -> "Rules":
        """Each run counts once with the protocol of most of its scores; the first wins a tie."""
        per_run = [_most([facts(s, run) for s in selection.of(run)]) for run in runs]
        ruling = _most(per_run)
        ranges = [
            frozenset(s.protocol.seeds for s in selection.of(run) if facts(s, run) == ruling)
            for run in runs
        ]
        return cls(ruling, _most(found for found in ranges if found))

    def differences(self, score: Score, run: Run) -> list[str]:
        """What is otherwise in a score, in words."""
        found = facts(score, run)
        return [
            f"{key}={found.get(key)}: the others have {self.facts.get(key)}"
            for key in self.facts | found
            if found.get(key) != self.facts.get(key)
        ]

    def admit(self, run: Run, selection: Selection, notes: list[str]) -> Series:
        """The run's scores that agree; says in ``notes`` which are left out.

        Raises:
            UserError: None agrees, or sampling seeds are missing; the message names what differs.
        """
        scores = selection.of(run)
        if not scores:
            has = sorted({f"{s.metric} ({s.weights}, {s.guidance})" for s in run.scores})
            raise UserError(
                f"metric={selection.metric}: no score with weights={selection.weights}, "
                f"guidance={selection.guidance}; it has {', '.join(has)}"
            )
        agreeing = [score for score in scores if not self.differences(score, run)]
        if not agreeing:
            raise UserError("; ".join(self.differences(scores[-1], run)))
        missing = self.ranges - {score.protocol.seeds for score in agreeing}
        if missing:
            raise UserError(f"sampling seeds: must include {_ranges(missing)}, as the others do")
        kept = [score for score in agreeing if score.protocol.seeds in self.ranges]
        for score in scores:
            if score not in kept:
                reasons = self.differences(score, run) or [
                    f"sampling seeds={_ranges([score.protocol.seeds])}: the others have "
                    f"{_ranges(self.ranges)}"
                ]
                notes.append(
                    f"{run.folder}: the score at step {score.step} is left out; {reasons[0]}"
                )
        return Series.of(run, kept)


def _median(numbers: list[float]) -> float | None:
    return statistics.median(numbers) if numbers else None


def _ranges(ranges: Iterable[Range]) -> str:
    return ", ".join(f"{first}-{last}" for first, last in sorted(ranges))


def _most(items: Iterable[Any]) -> Any:
    """The most frequent item, the first one of several."""
    items = list(items)
    keys = [repr(item) for item in items]
    return items[keys.index(Counter(keys).most_common(1)[0][0])]
