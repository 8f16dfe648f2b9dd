"""Which scores of the runs may be compared: one metric, one protocol; and in which arms."""

import itertools
import json
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any

from w2s_train.compare.numbers import interpolate
from w2s_train.compare.runs import Run, flatten
from w2s_train.errors import UserError
from w2s_train.scores import Score

Range = tuple[int, int]
Scores = dict[Range, float]
# Must agree. Metric, weights and guidance agree because they select the scores; the decay of the
# EMA is a setting of the arm.
AGREE = (
    "sampler",
    "steps",
    "autoencoder",
    "precision",
    "extractor",
    "n",
    "labels",
    "metric_settings",
)
NOTED = ("reference.versions", "data.train_urls")  # may differ; a note says so
EACH = "of each arm"  # in place of one guidance
SHOWN_IN_NAME = 3  # settings that tell arms of one name apart


@dataclass(frozen=True)
class Selection:
    """Which scores of a run are meant."""

    metric: str
    weights: str = "ema"
    guidance: str = "none"

    def __str__(self) -> str:
        return f"{self.metric}, weights {self.weights}, guidance {self.guidance}"

    @classmethod
    def holding(cls, score: Score) -> "Selection":
        """The one that a score belongs to."""
        return cls(score.metric, score.weights, score.guidance)

    def of(self, run: Run) -> list[Score]:
        """Those of one run, oldest first."""
        wanted = self.within(run)
        return [score for score in run.scores if self.holding(score) == wanted]

    def within(self, run: Run) -> "Selection":
        """The same; guided as the run that stands for one guidance is."""
        return replace(self, guidance=run.guidance or self.guidance)


def select(runs: Sequence[Run], metric: str | None, weights: str, guidance: str) -> Selection:
    """What to compare: without a metric the FID or Fréchet distance that most runs have, or any."""
    there = [s for run in runs for s in dict.fromkeys(map(Selection.holding, run.scores))]
    if metric is None:
        fitting = [s for s in there if (s.weights, s.guidance) == (weights, guidance)] or there
        names = [s.metric for s in fitting]
        metric = _most([n for n in names if n.startswith(("fid", "fd_"))] or names)
    wanted = Selection(metric, weights, guidance)
    for key in ("metric", "weights", "guidance")[: 2 if guidance == EACH else 3]:
        names = list(dict.fromkeys(getattr(s, key) for s in there))
        if getattr(wanted, key) not in names:
            raise UserError(f"{key}={getattr(wanted, key)}: must be one of {', '.join(names)}")
        there = [s for s in there if getattr(s, key) == getattr(wanted, key)]
    return wanted


def with_selection(runs: Sequence[Run], selection: Selection, refused: list[str]) -> list[Run]:
    """The runs with such scores, none of which is unusable; ``refused`` gets a line for others."""
    kept = []
    for run in runs:
        own = selection.within(run)
        wanted = f"weights={own.weights}, guidance={own.guidance}"
        hit = [f.message for f in run.faults if f.may_be_of(*astuple(own))]
        has = sorted({f"{s.metric} ({s.weights}, {s.guidance})" for s in run.scores})
        if not hit and selection.of(run):
            kept.append(run)
            continue
        lacking = f"metric={selection.metric}: no score with {wanted}; it has {', '.join(has)}"
        refused.append(f"{run.where}: {hit[0] if hit else lacking}")
    return kept


@dataclass(frozen=True)
class Series:
    """The scores of one run that take part.

    Args:
        run: The run.
        values: Score by range of sampling seeds and by step.
        seconds: Training time by step; None where it was not recorded.
        images: Images seen by step.
        clock: As ``seconds``, at all steps that tell what training took.
        commits: Of the code that scored.
    """

    run: Run
    values: dict[Range, dict[int, float]]
    seconds: dict[int, float | None]
    images: dict[int, int]
    clock: dict[int, float | None]
    commits: frozenset[str]

    @classmethod
    def of(cls, run: Run, scores: Sequence[Score]) -> "Series":
        """From scores, oldest first; of two with the same seeds and step the later one counts."""
        values: dict[Range, dict[int, float]] = {}
        for score in scores:
            values.setdefault(score.protocol.seeds, {})[score.step] = score.value
        # Later entries of a step score its checkpoint again, after the fit.
        timed = scores if run.guidance is None else run.scores
        first = {score.step: score.protocol for score in reversed(timed)}
        clock = {step: first[step].training_seconds for step in sorted(first)}
        steps = sorted({score.step for score in scores})
        seconds = {step: clock[step] for step in steps}
        images = {step: first[step].images_seen for step in steps}
        commits = frozenset(score.protocol.git_commit or "unknown" for score in scores)
        return cls(run, dict(sorted(values.items())), seconds, images, clock, commits)

    @property
    def last(self) -> int:
        """The last step."""
        return max(self.seconds)

    @property
    def keys(self) -> set[tuple[int, Range]]:
        """Step and sampling seeds of every score."""
        return {(step, seeds) for seeds, curve in self.values.items() for step in curve}

    def at_step(self, step: int) -> Scores:
        """Scores at a step by range of sampling seeds; empty if it was not scored."""
        return {seeds: curve[step] for seeds, curve in self.values.items() if step in curve}

    def at_seconds(self, at: float) -> Scores:
        """Scores after a training time in seconds, between those of the neighbouring steps."""
        found = {}
        for seeds, curve in self.values.items():
            points = self._timed(curve)
            score = interpolate([x for x, _ in points], [y for _, y in points], at)
            if score is not None:
                found[seeds] = score
        return found

    def ends(self) -> dict[Range, float]:
        """Training time of the last score of each range of sampling seeds that has one."""
        timed = {seeds: self._timed(curve) for seeds, curve in self.values.items()}
        return {seeds: points[-1][0] for seeds, points in timed.items() if points}

    def _timed(self, curve: dict[int, float]) -> list[tuple[float, float]]:
        times = ((self.seconds[step], score) for step, score in curve.items())
        return sorted((x, y) for x, y in times if x is not None)

    def seconds_per_step(self) -> float | None:
        """Median over consecutive scores; from the start where there is only one."""
        points = [(step, x) for step, x in self.clock.items() if x is not None and step > 0]
        points = [(0, 0.0), *points] if len(points) == 1 else points
        pairs = itertools.pairwise(points)
        paces = [(x - before) / (step - last) for (last, before), (step, x) in pairs]
        return statistics.median(paces) if paces else None


def facts(score: Score, run: Run) -> dict[str, Any]:
    """What should agree, by name: protocol, reference fingerprint and training data."""
    agree = {key: getattr(score.protocol, key) for key in AGREE}
    reference = flatten(score.protocol.reference, "reference")
    urls = run.settings.get("data.train_urls")
    return agree | reference | {"data.dataset": run.dataset, "data.train_urls": urls}


def clashes(found: dict[str, Any], ruling: dict[str, Any]) -> list[str]:
    """The keys of both that forbid a comparison."""
    return [k for k in ruling if k in found and found[k] != ruling[k] and k not in NOTED]


@dataclass(frozen=True)
class Rules:
    """The protocol that most runs agree with, and the sampling seeds that most of those have."""

    facts: dict[str, Any]
    ranges: frozenset[Range]

    @classmethod
    def of_majority(cls, runs: Sequence[Run], selection: Selection) -> "Rules":
        """Runs vote with the protocol of most of their scores; those without segments win ties."""
        per_run = [_most([facts(s, run) for s in selection.of(run)]) for run in runs]

        def votes(ruling: dict[str, Any]) -> tuple[int, int]:
            pairs = zip(runs, per_run, strict=True)
            voters = [run for run, found in pairs if not clashes(found, ruling)]
            return len(voters), sum(run.is_plain for run in voters)

        ruling = max(per_run, key=votes)
        first = sorted(zip(runs, per_run, strict=True), key=lambda pair: not pair[0].is_plain)
        agreeing = [found for _, found in first if not clashes(found, ruling)]
        keys = dict.fromkeys(key for found in agreeing for key in found)
        ruling = {key: _most(found[key] for found in agreeing if key in found) for key in keys}
        there = []
        for run in runs:
            fitting = [s for s in selection.of(run) if not clashes(facts(s, run), ruling)]
            there += [frozenset(s.protocol.seeds for s in fitting)] if fitting else []
        most = max(there, key=lambda r: (there.count(r), sum(r <= other for other in there)))
        return cls(ruling, most)

    def differences(self, found: dict[str, Any], keys: Iterable[str]) -> list[str]:
        """What is otherwise in the facts of a score, in words."""
        return [
            f"{key}={found.get(key, 'not recorded')}: the others have "
            f"{self.facts.get(key, 'not recorded')}"
            for key in keys
        ]

    def admit(self, run: Run, selection: Selection, notes: list[str]) -> Series:
        """The run's scores that agree; ``notes`` gets which are left out, and what may differ."""
        kept: list[Score] = []
        left: dict[str, set[int]] = {}  # reason -> steps
        harmless: dict[str, None] = {}
        for score in selection.of(run):
            found = facts(score, run)
            reasons = self.differences(found, clashes(found, self.facts))
            if not reasons and score.protocol.seeds not in self.ranges:
                reasons = [f"sampling seeds: the others have {_ranges(self.ranges)}"]
            if reasons:
                left.setdefault("; ".join(reasons), set()).add(score.step)
            else:
                kept.append(score)
                keys = [k for k in self.facts | found if found.get(k) != self.facts.get(k)]
                harmless |= dict.fromkeys(self.differences(found, keys))
        missing = self.ranges - {score.protocol.seeds for score in kept}
        if not kept and not any(reason.startswith("sampling seeds") for reason in left):
            raise UserError(list(left)[-1])
        if missing:
            raise UserError(f"sampling seeds: must include {_ranges(missing)}, as the others do")
        for reason, steps in left.items():
            notes.append(f"{run.where}: scores at step {_steps(steps)} are left out; {reason}")
        if harmless:
            notes.append(f"{run.where}: {'; '.join(harmless)}")
        return Series.of(run, kept)


def admit(
    runs: Sequence[Run], selection: Selection, refused: list[str], notes: list[str]
) -> tuple[Rules, list[Series]]:
    """What of the runs may be compared: one protocol, and a step that all have scored."""
    if not runs:
        raise UserError(f"runs=null: must have scores of {selection} that can be read")
    rules = Rules.of_majority(runs, selection)
    series = []
    for run in runs:
        try:
            series.append(rules.admit(run, selection, notes))
        except UserError as error:
            refused.append(f"{run.where}: {error}")
    plain = Counter(key for one in series if one.run.is_plain for key in one.keys)
    every = Counter(key for one in series for key in one.keys)
    shared = max(every, key=lambda key: (every[key], plain[key], key))
    kept = [one for one in series if shared in one.keys]
    steps = set.intersection(*(set(one.seconds) for one in kept))
    for one in series:
        if shared not in one.keys:
            refused.append(
                f"{one.run.where}: steps={_steps(one.seconds)}: must include one of "
                f"{_steps(steps)}, which the others have"
            )
    return rules, kept


def _ranges(ranges: Iterable[Range]) -> str:
    return ", ".join(f"{first}-{last}" for first, last in sorted(ranges))


def _steps(steps: Iterable[int]) -> str:
    found = sorted(steps)
    if len(found) > 5:
        return f"{found[0]} to {found[-1]} ({len(found)} steps)"
    return ", ".join(map(str, found))


def _most(items: Iterable[Any]) -> Any:
    """The most frequent item, the first one of several."""
    items = list(items)
    keys = [repr(item) for item in items]
    return items[keys.index(Counter(keys).most_common(1)[0][0])]


@dataclass(frozen=True)
class Arm:
    """Runs that differ in their seeds only: their name in the tables, and their scores by seed."""

    name: str
    series: list[Series]

    @property
    def runs(self) -> list[Run]:
        """Its runs, by seed."""
        return [one.run for one in self.series]


def group(series: Sequence[Series], refused: list[str]) -> list[Arm]:
    """Put runs of the same config together, in the order given.

    The same config and seed is the same experiment, no further evidence: ``refused`` says which.
    """
    groups: dict[str, dict[int, Series]] = {}
    for one in series:
        run = one.run
        same = groups.setdefault(json.dumps(run.recipe, sort_keys=True), {})
        if same.setdefault(run.seed, one) is not one:
            refused.append(
                f"{run.where}: seed_everything={run.seed}: must differ from that of "
                f"{same[run.seed].run.where}, which has the same config"
            )
    together = [[same[seed] for seed in sorted(same)] for same in groups.values()]
    names = _names([some[0].run for some in together])
    return [Arm(name, some) for name, some in zip(names, together, strict=True)]


def _names(runs: Sequence[Run]) -> list[str]:
    """The folders' names without seeds; where two agree, with what differs in their configs."""
    names: list[str] = []
    for run in runs:
        keys = _differing([other.recipe for other in runs if other.stem == run.stem])
        values = [
            f"{key.rpartition('.')[2]}={short(run.settings.get(key))}"
            for key in keys[:SHOWN_IN_NAME]
        ]
        name = unique = f"{run.stem} ({', '.join(values)})" if values else run.stem
        number = 1
        while unique in names:
            number += 1
            unique = f"{name} #{number}"
        names.append(unique)
    return names


def _differing(all_settings: Sequence[dict[str, Any]]) -> list[str]:
    """Keys whose values differ, in the configs' order; absent, null and false are the same."""
    keys = dict.fromkeys(key for settings in all_settings for key in settings)
    return [
        key for key in keys if len({_plain(settings.get(key)) for settings in all_settings}) > 1
    ]


def _plain(value: Any) -> str:
    return json.dumps(None if value is False else value)


def short(value: Any) -> str:
    """A setting for people: classes without their module."""
    text = value if isinstance(value, str) else json.dumps(value)
    is_class = "/" not in text and " " not in text and text.rpartition(".")[2][:1].isupper()
    return text.rpartition(".")[2] if is_class else text


def differences(arms: Sequence[Arm]) -> dict[str, dict[str, Any]]:
    """Settings that differ by key and arm; arms that do not have a setting are left out of it.

    The commit of the code and the machine are among them.
    """
    settings = {arm.name: arm.runs[0].settings for arm in arms}
    found = {
        key: {name: had[key] for name, had in settings.items() if had.get(key) is not None}
        for key in _differing(list(settings.values()))
    }
    commits = {arm.name: {commit_name(c) for s in arm.series for c in s.commits} for arm in arms}
    machines = {arm.name: {run.machine or "unknown" for run in arm.runs} for arm in arms}
    for key, values in (("git_commit", commits), ("machine", machines)):
        if len(set(map(frozenset, values.values()))) > 1:
            found[key] = {name: ", ".join(sorted(had)) for name, had in values.items()}
    return found


def commit_name(name: str) -> str:
    """A commit for people, with what says that the files differed from it."""
    return name[:7] + ("-dirty" if name.endswith("-dirty") else "")


def find_baseline(arms: Sequence[Arm], name: str | None) -> Arm:
    """The arm of that name; without one, the arm whose objective has no segments.

    Where guidances are arms, the unguided one; of runs with segments, if there are no others.
    """
    names = ", ".join(arm.name for arm in arms)
    if name is not None:
        named = [arm for arm in arms if arm.name == name]
        if not named:
            raise UserError(f"baseline={name}: must be one of {names}")
        return named[0]
    plain = [arm for arm in arms if arm.runs[0].is_plain]
    plain = plain or [arm for arm in arms if arm.runs[0].guidance is not None]
    found = [arm for arm in plain if arm.runs[0].guidance in (None, "none")]
    if len(found) != 1:
        kind = "several arms have" if found else "no arm has"
        raise UserError(f"baseline=null: {kind} no segments; must be one of {names}")
    return found[0]
