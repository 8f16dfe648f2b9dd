"""The comparison: arms against a baseline, at equal steps and at equal training time."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from w2s_train.compare import numbers
from w2s_train.compare.numbers import Interval, Judgement
from w2s_train.compare.protocol import (
    EACH,
    Arm,
    Range,
    Rules,
    Scores,
    Selection,
    Series,
    admit,
    differences,
    find_baseline,
    group,
    select,
    with_selection,
)
from w2s_train.compare.reached import Threshold, thresholds
from w2s_train.compare.runs import Findings, Run
from w2s_train.compare.tuned import Guided, Line, guided, tunings
from w2s_train.errors import UserError
from w2s_train.scores import higher_is_better

BASELINE = Judgement(1.0, None, 0.0, None, "baseline")


@dataclass(frozen=True)
class Grid:
    """An arm's grid of generated images: the run that wrote it, the network's step, the file."""

    arm: str
    run: Run
    step: int
    png: bytes


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
        sampling_seeds: Ranges of the images' seeds at equal steps.
        baseline: Name of its arm.
        step: Of the comparison at equal steps.
        seconds: Training time of the comparison at equal time; None without times.
        rows: Baseline first, then by mean at equal steps, best first.
        refused: A line for each run that is left out.
        notes: Lines about what else is worth knowing.
        differences: Settings that differ, by key and arm.
        grids: A sample grid per arm that has one at that step.
        tuned: How guidance at sampling was tuned, if any was.
        reached: When each arm was as good as some scores.
        guided: By arm, where unguided scores are compared, what it scores with guidance tuned.
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
    tuned: list[Line]
    reached: list[Threshold]
    guided: dict[str, Guided]


@dataclass(frozen=True)
class Options:
    """What the user chose; see ``lightning compare --help``."""

    metric: str | None = None
    weights: str = "ema"
    guidance: str | None = None
    baseline: str | None = None
    settings: bool = False
    reach: tuple[float, ...] = ()


def compare(findings: Findings, options: Options) -> Comparison:
    """Compare runs."""
    runs, refused, notes = findings.runs, list(findings.refused), list[str]()
    try:
        if not runs:
            raise UserError("runs=null: must be at least two arms; no run can be read")
        guidance = options.guidance or "none"
        if options.settings:
            guidance, runs = EACH, [part for r in runs for part in r.by_guidance(options.weights)]
        selection = select(runs, options.metric, options.weights, guidance)
        higher = higher_is_better(selection.metric)
        runs = with_selection(runs, selection, refused)
        rules, series = admit(runs, selection, refused, notes)
        arms = group(series, refused)
        baseline = find_baseline(arms, options.baseline)
        if len(arms) < 2:
            raise UserError(f"runs={arms[0].name}: must be at least two arms that can be compared")
    except UserError as error:
        raise UserError("\n".join([*refused, str(error)])) from error
    step, ranges = _common_step(arms)
    _note_runs(arms, step, notes)
    at_step = _results(arms, lambda one: one.at_step(step), baseline.name, higher)
    timed: dict[str, Result] = {}
    seconds = _common_seconds(arms, baseline, notes)
    if seconds is not None:
        timed = _results(arms, lambda one: one.at_seconds(seconds), baseline.name, higher)
        _note_untimed(arms, seconds, notes)
    rows = [_row(arm, at_step[arm.name], timed.get(arm.name)) for arm in arms]
    rows = _in_order(rows, baseline.name, higher)
    order = [row.name for row in rows]
    arms.sort(key=lambda arm: order.index(arm.name))
    grids = choose(arms, step, selection, notes)
    lines = tunings(arms, selection.guidance, notes)
    return Comparison(
        selection,
        {key: value for key, value in rules.facts.items() if (key, value) != ("labels", None)},
        ranges,
        baseline.name,
        step,
        seconds,
        rows,
        refused,
        notes,
        differences(arms),
        grids,
        lines,
        # Where the guidances of a run are arms, no training reaches anything.
        [] if options.settings else thresholds(arms, baseline, options.reach, notes, higher=higher),
        _guided(lines, selection, step, rules, notes),
    )


def _guided(
    lines: list[Line], selection: Selection, step: int, rules: Rules, notes: list[str]
) -> dict[str, Guided]:
    if selection.guidance != "none":
        return {}
    wanted = {"step": step, "weights": selection.weights}
    wanted |= {key: value for key, value in rules.facts.items() if value is not None}
    return guided(lines, selection.metric, wanted, notes)


def _common_step(arms: Sequence[Arm]) -> tuple[int, list[Range]]:
    """The largest step that all runs have scored, and the sampling seeds that all have there."""
    keys = set.intersection(*(one.keys for arm in arms for one in arm.series))
    step = max(step for step, _ in keys)
    return step, sorted(seeds for at, seeds in keys if at == step)


def _note_runs(arms: Sequence[Arm], step: int, notes: list[str]) -> None:
    """What is broken in runs that take part, and which runs keep the others from a later step."""
    series = [one for arm in arms for one in arm.series]
    for one in series:
        run = one.run
        notes += [f"{run.where}: {note}" for note in run.notes]
        if run.faults:
            more = f" (and {len(run.faults) - 1} more)" if len(run.faults) > 1 else ""
            notes.append(f"{run.where}: not compared here: {run.faults[0].message}{more}")
    last, least = max(one.last for one in series), min(one.last for one in series)
    if last > least:
        first = ", ".join(one.run.where for one in series if one.last == least)
        notes.append(
            f"equal steps are step {step}: {first} ends at {least}, others at up to {last}"
        )


def _common_seconds(arms: Sequence[Arm], baseline: Arm, notes: list[str]) -> float | None:
    """The largest training time up to which all runs with times have the same sampling seeds."""
    if not any(one.ends() for one in baseline.series):
        notes.append(f"{baseline.name}: the baseline has no times, so none are equal")
        return None
    ends = [found for arm in arms for one in arm.series if (found := one.ends())]
    shared = set.intersection(*map(set, ends))
    return max((min(found[seeds] for found in ends) for seeds in shared), default=None)


def _note_untimed(arms: Sequence[Arm], seconds: float, notes: list[str]) -> None:
    for one in (one for arm in arms for one in arm.series):
        if not one.at_seconds(seconds):
            why = f"no score before {seconds:.4g} s" if one.ends() else "no times"
            notes.append(f"{one.run.where}: has {why} and takes no part at equal time")


def _in_order(rows: Sequence[Row], baseline: str, higher: bool) -> list[Row]:
    """The baseline first, then the best; each with what its steps cost against the baseline's."""
    base = next(row for row in rows if row.name == baseline)
    alone = base.seconds_per_step
    ratios = [x / alone if (x := row.seconds_per_step) and alone else None for row in rows]
    rows = [replace(row, time_ratio=ratio) for row, ratio in zip(rows, ratios, strict=True)]
    return sorted(rows, key=lambda r: (r.name != baseline, r.at_step.mean * (-1 if higher else 1)))


def _shared(found: Sequence[Scores]) -> list[list[float]]:
    """Scores of runs (rows) for the sampling seeds that all of them have (columns)."""
    ranges = sorted(set.intersection(*map(set, found))) if found else []
    return [[scores[seeds] for seeds in ranges] for scores in found] if ranges else []


def _results(
    arms: Sequence[Arm], scores: Callable[[Series], Scores], baseline: str, higher: bool
) -> dict[str, Result]:
    """Results of the arms that have scores, with the same sampling seeds in all.

    There are none at all if the baseline has none.
    """
    found = [
        (arm.name, one.run.seed, some)
        for arm in arms
        for one in arm.series
        if (some := scores(one))
    ]
    samples: dict[str, dict[int, list[float]]] = {}
    for (name, seed, _), row in zip(found, _shared([some for *_, some in found]), strict=False):
        samples.setdefault(name, {})[seed] = row
    if baseline not in samples:
        return {}
    base = list(samples[baseline].values())
    results = {}
    for name, by_seed in samples.items():
        sample = list(by_seed.values())
        judged = numbers.judge(sample, base, higher_is_better=higher)
        results[name] = Result(
            list(by_seed),
            numbers.mean(sample),
            numbers.spread(sample),
            numbers.sampling_spread(sample),
            numbers.bootstrap_interval(sample),
            BASELINE if name == baseline else judged,
        )
    return results


def _row(arm: Arm, at_step: Result, at_seconds: Result | None) -> Row:
    """One arm; its curve has the steps that all its runs have scored with the same seeds."""
    series = arm.series
    keys = set.intersection(*(one.keys for one in series))
    per_step = [x for one in series if (x := one.seconds_per_step()) is not None]
    curve = []
    for step in sorted({step for step, _ in keys}):
        sample = _shared([one.at_step(step) for one in series])
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


def choose(arms: Sequence[Arm], step: int, selection: Selection, notes: list[str]) -> list[Grid]:
    """The grids of a step and setting; says in ``notes`` what is broken or not there."""
    there: dict[str, dict[int, Grid]] = {arm.name: {} for arm in arms}
    without = dict.fromkeys(there)
    for arm in arms:
        for run in arm.runs:
            try:
                png = run.grid(step, selection.weights, selection.within(run).guidance)
            except (UserError, OSError) as error:
                notes.append(str(error))
                without.pop(arm.name, None)
                continue
            if png is not None:
                there[arm.name][run.seed] = Grid(arm.name, run, step, png)
                without.pop(arm.name, None)
    there = {name: grids for name, grids in there.items() if grids}
    if without and any((run.folder / "grids").is_dir() for arm in arms for run in arm.runs):
        setting = f"weights {selection.weights}, guidance {selection.guidance}"
        notes.append(f"sample grids: none of step {step}, {setting} in {', '.join(without)}")
    if not there:
        return []
    shared = set.intersection(*(set(grids) for grids in there.values()))
    if not shared:
        notes.append("sample grids: no training seed has one in every arm; their seeds differ")
    return [grids[min(shared or grids)] for grids in there.values()]
