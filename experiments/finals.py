"""A study that scores runs at their end, on fresh seeds, by every metric."""

import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from cells import evaluations, interval_of, with_verdict
from run import ROOT, load

from w2s_train.compare.numbers import Judgement, judge
from w2s_train.compare.protocol import commit_name
from w2s_train.scores import Score, higher_is_better, read_scores

Row = tuple[str, str]  # arm and guidance
Values = dict[Row, dict[str, dict[int, float]]]  # by row, metric and training seed
BASE = ("none", "none")
SAME = ("weights", "sampler", "steps", "step", "n", "extractor")  # in all scores of a table
GUIDED = "guided at sampling"


def scores_of(study: str) -> dict[Row, list[tuple[int, Score]]]:
    """What has been scored so far, with training seeds, the baseline first.

    An arm of the study's ``same_runs`` has another guidance for runs of the arm that it names.

    Raises:
        SystemExit: The baseline was not scored, or scores that cannot stand in one table.
    """
    about, found = load(study), defaultdict[Row, list[tuple[int, Score]]](list)
    for arm, seeds in about["seeds"].items():
        shown = about.get("same_runs", {}).get(arm, arm)
        for seed in seeds:
            folder = ROOT / "experiments" / study / "runs" / f"{arm}-{seed}"
            for score in read_scores(folder) if folder.exists() else []:
                found[shown, score.guidance].append((seed, score))
    if BASE not in found:
        sys.exit(f"error: {study}: must have scores of none, unguided, and has none of them")
    every = [score for scores in found.values() for _, score in scores]
    for key in SAME:
        if len(values := {getattr(score.protocol, key) for score in every}) > 1:
            sys.exit(f"error: {study}: {key} must be the same in all scores, is {values}")
    return {row: found[row] for row in sorted(found, key=lambda row: row != BASE)}


def values_of(found: dict[Row, list[tuple[int, Score]]]) -> Values:
    """Of a run one value a metric, the mean where it was sampled more than once."""
    several: Any = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for row, scores in found.items():
        for seed, score in scores:
            several[row][score.metric][seed].append(score.value)
    return {
        row: {
            metric: {seed: statistics.fmean(several[row][metric][seed]) for seed in by_seed}
            for metric, by_seed in metrics.items()
        }
        for row, metrics in several.items()
    }


def table(study: str) -> str:
    """Arms and guidances, a column a metric; the verdict is on the distance."""
    found = scores_of(study)
    values, scores = values_of(found), [score for one in found.values() for _, score in one]
    first = _distance(values)
    shared = first.partition("_")[2]  # of the extractor
    names = [first, *sorted({name for row in values.values() for name in row} - {first})]
    with_cfg = [row for row in reversed(values) if is_guided(row)]  # of several the first
    guided = {}
    for row in with_cfg:
        count, runs = (len(values.get(each, {}).get(first, {})) for each in (row, (row[0], "none")))
        part = f", {count} of {runs} runs" if count < runs else ""
        guided[row[0]] = _cell(values[row][first].values(), 2) + part
    heads = [name.removesuffix(f"_{shared}") for name in names]
    heads[1:1] = [f"{heads[0]}, {GUIDED}"] if guided else []
    lines = [f"| trained, sampled | {' | '.join(heads)} | evaluations | verdict |"]
    lines.append("|---" * (len(heads) + 3) + "|")
    for (arm, guidance), of_row in values.items():
        cells = [_cell(of_row.get(name, {}).values(), 2 if name == first else 3) for name in names]
        if guided:
            cells.insert(1, guided.get(arm, "–") if guidance == "none" else "–")
        cells.append(str(evaluations(guidance, scores[0].protocol.steps)))
        cells.append(_verdict(first, of_row, values[BASE]))
        how = "unguided" if guidance == "none" else f"`{guidance}`"
        lines.append(f"| `{arm}`, {how} | {' | '.join(cells)} |")
    start = min(score.protocol.seeds[0] for score in scores)
    commits = {commit_name(score.protocol.git_commit or "unknown") for score in scores}
    text = (
        f"{scores[0].protocol.n:,} images each of seeds from {start:,} on, features of `{shared}`; "
        f"mean and 95 % t interval over training seeds {_seeds(first, values)}, or the values of "
        f"fewer than three. The verdict is on `{heads[0]}`, lower is better, against the first row "
        f"on the same training seeds. Evaluations are the network's for an image. "
        f"Commit {', '.join(sorted(commits))}."
    )
    return "\n".join([*lines, "", text]) + "\n"


def column(study: str) -> dict[Row, tuple[str, int]]:
    """By arm and guidance: the distance, as the summary shows it, and evaluations an image."""
    found = scores_of(study)
    values, shown = values_of(found), dict[Row, tuple[str, int]]()
    first = _distance(values)
    for row, of_row in values.items():
        text = _cell(of_row[first].values(), 0)
        if row != BASE and (judgement := _judgement(first, of_row, values[BASE])):
            text = with_verdict(text, judgement)
        shown[row] = text, evaluations(row[1], found[row][0][1].protocol.steps)
    return shown


def is_guided(row: Row) -> bool:
    """By further evaluations of the network, not by its inputs."""
    return row[1].startswith("cfg(")


def _distance(values: Values) -> str:
    """The Fréchet distance among the metrics."""
    return next(name for name in values[BASE] if name.startswith("fd_"))


def _cell(values: Iterable[float], decimals: int) -> str:
    return interval_of(list(values), decimals)


def _verdict(metric: str, ours: dict[str, Any], plain: dict[str, Any]) -> str:
    """Of a row against the baseline."""
    if ours is plain:
        return "baseline"
    if not (judgement := _judgement(metric, ours, plain)):
        return "–"
    verdict = judgement.verdict.partition(":")[0]
    return (
        verdict if len(ours[metric].keys() & plain[metric].keys()) > 1 else f"{verdict}, one seed"
    )


def _judgement(metric: str, ours: dict[str, Any], plain: dict[str, Any]) -> Judgement | None:
    """On the training seeds that both have, if there are any."""
    both = sorted(ours[metric].keys() & plain[metric].keys())
    samples = [[[x[metric][seed]] for seed in both] for x in (ours, plain)]
    return judge(*samples, higher_is_better=higher_is_better(metric)) if both else None


def _seeds(metric: str, values: Values) -> str:
    """The baseline's, and of the rows that have others theirs."""
    common = sorted(values[BASE][metric])
    others: dict[str, list[str]] = defaultdict(list)
    for row, of_row in values.items():
        if (seeds := sorted(of_row[metric])) != common:
            names = others[", ".join(map(str, seeds))]
            name = f"`{row[0]}`, guided" if is_guided(row) else f"`{row[0]}`"
            names += [] if name in names else [name]
    parts = [f"of {', '.join(names)} {seeds}" for seeds, names in others.items()]
    return "; ".join([", ".join(map(str, common)), *parts])
