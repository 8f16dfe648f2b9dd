"""The comparison: arms against a baseline, at equal steps and at equal training time."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from w2s_train.compare import numbers
from w2s_train.compare.arms import Arm, differences, find_baseline, group
from w2s_train.compare.grids import Grid, choose
from w2s_train.compare.numbers import Interval, Judgement, Sample
from w2s_train.compare.protocol import Rules, Selection, Series, select
from w2s_train.compare.runs import Findings, Run
from w2s_train.errors import UserError
from w2s_train.scores import higher_is_better

BASELINE = Judgement(1.0, None, 0.0, None, "baseline")


@dataclass(frozen=True)
class Result:
    """One arm at one point.

    Args:
        seeds: Training seeds of the runs that have a score there.
        mean: Over training and sampling seeds.
        std: Over training seeds; None for one.
        sampling_std: Over sampling seeds; None if there is one range of them.
        interval: Bootstrap interval of the mean; None for one training seed.
        judgement: Against the baseline.
    """

    seeds: list[int]
    mean: float
    std: float | None
    sampling_std: float | None
    interval: Interval | None
    judgement: Judgement


@dataclass(frozen=True)
class Point:
    """An arm's scores at a step; times and images are means over its runs."""

    step: int
    images_seen: float
    training_seconds: float | None
    mean: float
    std: float | None
    interval: Interval | None


@dataclass(frozen=True)
class Row:
    """Everything about one arm; ``at_seconds`` is None if it was not scored by that time."""

    name: str
    runs: list[Run]
    at_step: Result
    at_seconds: Result | None
    seconds_per_step: float | None
    time_ratio: float | None
    curve: list[Point]


@dataclass(frozen=True)
class Comparison:
    """What the reports show.

    Args:
        selection: Metric, weights and guidance.
        protocol: What all scores share, by name.
        sampling_seeds: Ranges of the images' seeds.
        baseline: Name of its arm.
        step: Of the comparison at equal steps.
        seconds: Training time of the comparison at equal time; None if times are not recorded.
        rows: Baseline first, then by mean at equal steps, best first.
        refused: A line for each run that is left out.
        notes: Lines about what else is worth knowing.
        differences: Settings that differ, by key and arm.
        grids: A sample grid per arm that has one at that step.
    """

    selection: Selection
    protocol: dict[str, Any]
    sampling_seeds: list[tuple[int, int]]
    baseline: str
    step: int
    seconds: float | None
    rows: list[Row]
    refused: list[str]
    notes: list[str]
    differences: dict[str, dict[str, Any]]
    grids: list[Grid]


@dataclass(frozen=True)
class Options:
    """What the user chose; see ``lightning compare --help``."""

    metric: str | None = None
    weights: str = "ema"
    guidance: str = "none"
    baseline: str | None = None
    noise: float | None = None


def compare(findings: Findings, options: Options) -> Comparison:
    """Compare runs.

    Raises:
        UserError: Fewer than two arms can be compared, or an option does not fit the runs.
    """
    refused, notes = list(findings.refused), list[str]()
    arms = group(findings.runs)
    try:
        if not arms:
            raise UserError("runs=null: must be at least two arms; no run can be read")
        selection = select(findings.runs, options.metric, options.weights, options.guidance)
        higher = higher_is_better(selection.metric)
        baseline = find_baseline(arms, options.baseline)
        scored = [run for run in baseline.runs if selection.of(run)]
        if not scored:
            raise UserError(f"baseline={baseline.name}: must have scores of {selection}")
        rules = Rules.of_majority(scored, selection)
        series = _admit(arms, baseline, rules, selection, refused, notes)
        arms = [replace(arm, runs=[s.run for s in series[arm.name]]) for arm in arms]
        arms = [arm for arm in arms if arm.runs]
        if len(arms) < 2:
            names = ", ".join(arm.name for arm in arms)
            raise UserError(f"runs={names}: must be at least two arms that can be compared")
    except UserError as error:
        raise UserError("\n".join([*refused, str(error)])) from error
    rows = _rows(arms, series, baseline.name, higher, options.noise, notes)
    order = [row.name for row in rows]
    arms.sort(key=lambda arm: order.index(arm.name))
    grids = choose(arms, _common_step(series), notes)
    _note_machines(arms, notes)
    return Comparison(
        selection,
        rules.facts,
        sorted(rules.ranges),
        baseline.name,
        _common_step(series),
        _common_seconds(series),
        rows,
        refused,
        notes,
        differences(arms, series),
        grids,
    )


def _admit(
    arms: Sequence[Arm],
    baseline: Arm,
    rules: Rules,
    selection: Selection,
    refused: list[str],
    notes: list[str],
) -> dict[str, list[Series]]:
    """The runs of each arm that agree in protocol and share a step, those of the baseline first."""
    series: dict[str, list[Series]] = {arm.name: [] for arm in arms}
    common: set[int] = set()
    for arm in [baseline, *(arm for arm in arms if arm is not baseline)]:
        for run in arm.runs:
            try:
                one = rules.admit(run, selection, notes)
                _check_new(run, series[arm.name])
                common = _shared_steps(one, common)
                series[arm.name].append(one)
            except UserError as error:
                refused.append(f"{run.folder}: {error}")
    return series


def _check_new(run: Run, series: Sequence[Series]) -> None:
    """Refuse a repetition: the same config and seed is the same experiment, no further evidence."""
    for other in series:
        if other.run.seed == run.seed:
            raise UserError(
                f"seed_everything={run.seed}: must differ from that of {other.run.folder}, which "
                "has the same config"
            )


def _shared_steps(series: Series, common: set[int]) -> set[int]:
    """The steps that this run and the earlier ones, if any, have scored."""
    steps = set(series.seconds)
    if common and not steps & common:
        ours, theirs = (", ".join(map(str, sorted(some))) for some in (steps, common))
        raise UserError(f"steps={ours}: must include one of {theirs}, which the others have")
    return steps & common if common else steps


def _all(series: dict[str, list[Series]]) -> list[Series]:
    return [one for some in series.values() for one in some]


def _common_step(series: dict[str, list[Series]]) -> int:
    """The largest step that all runs have scored."""
    return max(set.intersection(*(set(one.seconds) for one in _all(series))))


def _common_seconds(series: dict[str, list[Series]]) -> float | None:
    """The largest training time that all runs with recorded times have reached."""
    totals = [total for one in _all(series) if (total := one.total_seconds()) is not None]
    return min(totals, default=None)


def _rows(
    arms: Sequence[Arm],
    series: dict[str, list[Series]],
    baseline: str,
    higher: bool,
    noise: float | None,
    notes: list[str],
) -> list[Row]:
    step, seconds = _common_step(series), _common_seconds(series)
    at_step = {name: {s.run.seed: s.at_step(step) for s in some} for name, some in series.items()}
    at_time: dict[str, dict[int, list[float]]] = {name: {} for name in series}
    if seconds is not None:
        at_time = {name: _timed(some, seconds, notes) for name, some in series.items()}
    results = _results(at_step, baseline, higher, noise)
    timed = _results(at_time, baseline, higher, noise)
    rows = [_row(arm, series[arm.name], results[arm.name], timed.get(arm.name)) for arm in arms]
    base = next(row for row in rows if row.name == baseline)
    rows.sort(key=lambda r: (r is not base, r.at_step.mean * (-1 if higher else 1)))
    return [replace(row, time_ratio=_ratio(row, base)) for row in rows]


def _timed(series: Sequence[Series], seconds: float, notes: list[str]) -> dict[int, list[float]]:
    """Scores by training seed after a training time; says in ``notes`` which runs have none."""
    found = {one.run.seed: one.at_seconds(seconds) for one in series}
    for one in series:
        if not found[one.run.seed]:
            why = "no times" if one.total_seconds() is None else f"no score before {seconds:.4g} s"
            notes.append(f"{one.run.folder}: has {why} and takes no part at equal time")
    return {seed: values for seed, values in found.items() if values}


def _ratio(row: Row, base: Row) -> float | None:
    if not row.seconds_per_step or not base.seconds_per_step:
        return None
    return row.seconds_per_step / base.seconds_per_step


def _results(
    values: dict[str, dict[int, list[float]]], baseline: str, higher: bool, noise: float | None
) -> dict[str, Result]:
    """Results of the arms that have values; none at all if the baseline has none."""
    base: Sample = list(values[baseline].values())
    found = {}
    for name, by_seed in values.items() if base else ():
        sample = list(by_seed.values())
        if sample:
            judged = numbers.judge(sample, base, higher_is_better=higher, noise=noise)
            found[name] = Result(
                list(by_seed),
                numbers.mean(sample),
                numbers.spread(sample),
                numbers.sampling_spread(sample),
                numbers.bootstrap_interval(sample),
                BASELINE if name == baseline else judged,
            )
    return found


def _row(arm: Arm, series: Sequence[Series], at_step: Result, at_seconds: Result | None) -> Row:
    """One arm; its curve has the steps that all its runs have scored."""
    steps = set.intersection(*(set(one.seconds) for one in series))
    per_step = [x for one in series if (x := one.seconds_per_step()) is not None]
    curve = []
    for step in sorted(steps):
        sample = [one.at_step(step) for one in series]
        times = [x for one in series if (x := one.seconds[step]) is not None]
        curve.append(
            Point(
                step,
                statistics.fmean(one.images[step] for one in series),
                statistics.fmean(times) if len(times) == len(series) else None,
                numbers.mean(sample),
                numbers.spread(sample),
                numbers.bootstrap_interval(sample),
            )
        )
    median = statistics.median(per_step) if per_step else None
    return Row(arm.name, arm.runs, at_step, at_seconds, median, None, curve)


def _note_machines(arms: Sequence[Arm], notes: list[str]) -> None:
    """Times of different machines do not compare."""
    machines = {run.machine or "unknown" for arm in arms for run in arm.runs}
    if len(machines) > 1:
        notes.append(f"times are of different machines: {'; '.join(sorted(machines))}")
