"""A study that scores runs at their end, on fresh seeds, by every metric."""

from collections import defaultdict

from cells import evaluations, interval_of, with_verdict
from run import ROOT, load

from w2s_train.compare.numbers import Judgement, judge
from w2s_train.compare.protocol import commit_name
from w2s_train.scores import Score, higher_is_better, read_scores

BASE = ("none", "none")  # arm and guidance


def scores_of(study: str) -> dict[tuple[str, str], dict[int, list[Score]]]:
    """By arm and guidance, and by training seed; what has been scored so far."""
    found: dict[tuple[str, str], dict[int, list[Score]]] = defaultdict(lambda: defaultdict(list))
    for arm, seeds in load(study)["seeds"].items():
        for seed in seeds:
            folder = ROOT / "experiments" / study / "runs" / f"{arm}-{seed}"
            for score in read_scores(folder) if folder.exists() else []:
                found[arm, score.guidance][seed].append(score)
    return {row: found[row] for row in sorted(found, key=lambda row: row != BASE)}


def table(study: str) -> str:
    """Arms and guidances, a column a metric; the verdict is on the first of them."""
    found = scores_of(study)
    every = [score for by_seed in found.values() for scores in by_seed.values() for score in scores]
    names = list(dict.fromkeys(score.metric for score in every))
    shared = names[0].partition("_")[2]  # of the extractor
    values = {
        row: {
            name: [s.value for scores in by_seed.values() for s in scores if s.metric == name]
            for name in names
        }
        for row, by_seed in found.items()
    }
    heads = [name.replace(f"_{shared}", "") for name in names]
    lines = [f"| trained, sampled | {' | '.join(heads)} | evaluations | verdict |"]
    lines.append("|---" * (len(names) + 3) + "|")
    (steps,) = {score.protocol.steps for score in every}
    for (arm, guidance), of_row in values.items():
        cells = [interval_of(of_row[name], 2 if name == names[0] else 3) for name in names]
        cells.append(str(evaluations(guidance, steps)))
        cells.append(_verdict(names[0], found[arm, guidance], found[BASE]))
        how = "unguided" if guidance == "none" else f"`{guidance}`"
        lines.append(f"| `{arm}`, {how} | {' | '.join(cells)} |")
    (count,), (first,) = {s.protocol.n for s in every}, {s.protocol.seeds[0] for s in every}
    commits = {commit_name(score.protocol.git_commit or "unknown") for score in every}
    text = (
        f"{count:,} images each of seeds from {first:,} on, features of `{shared}`; mean and "
        f"95 % t interval over training seeds {_seeds(found)}, or the values of fewer than three. "
        f"The verdict is on `{heads[0]}`, lower is better, against the first row on the same "
        f"training seeds. Evaluations are the network's for an image. "
        f"Commit {', '.join(sorted(commits))}."
    )
    return "\n".join([*lines, "", text]) + "\n"


def column(study: str) -> dict[tuple[str, str], tuple[str, int]]:
    """By arm and guidance: the distance, as the summary shows it, and evaluations an image."""
    found, shown = scores_of(study), dict[tuple[str, str], tuple[str, int]]()
    metric = found[BASE][min(found[BASE])][0].metric
    for row, by_seed in found.items():
        scores = [s for scores in by_seed.values() for s in scores if s.metric == metric]
        text = interval_of([score.value for score in scores], 0)
        if row != BASE:
            text = with_verdict(text, _judgement(metric, by_seed, found[BASE]))
        shown[row] = text, evaluations(row[1], scores[0].protocol.steps)
    return shown


def _verdict(metric: str, ours: dict[int, list[Score]], plain: dict[int, list[Score]]) -> str:
    """Of a row against the baseline."""
    if ours is plain:
        return "baseline"
    verdict = _judgement(metric, ours, plain).verdict.partition(":")[0]
    return verdict if len(ours.keys() & plain.keys()) > 1 else f"{verdict}, one seed"


def _judgement(
    metric: str, ours: dict[int, list[Score]], plain: dict[int, list[Score]]
) -> Judgement:
    """On the training seeds that both have."""
    both = sorted(ours.keys() & plain.keys())
    samples = [[[s.value for s in x[k] if s.metric == metric] for k in both] for x in (ours, plain)]
    return judge(*samples, higher_is_better=higher_is_better(metric))


def _seeds(found: dict[tuple[str, str], dict[int, list[Score]]]) -> str:
    return ", ".join(map(str, sorted(found[BASE])))
