"""Make all tables and figures of the studies again, from the scores that their runs left.

    python experiments/remake.py                    every study, and the pages that show its tables
    python experiments/remake.py digits mnist       these studies only
    python experiments/remake.py --check            change nothing; fail where numbers would change
                                                    in a table, comparison.json or .md, or a page
                                                    (figures and comparison.html are not read)

A study of trainings gets comparison/ (as `lightning compare` makes it, with the times of
step_time.json), table.md and, if it has a `figure`, wall_clock.png; pairs.md, if its `pairs` say
which arms are to be set against each other; one of guidance at sampling, or of runs with drawn
scales (`separately` names runs with one recipe each), or of runs at their end (`every_metric`),
gets table.md. guideability.json gives guideability.md. `baseline` is `none`, if it is not said.
experiments/table.md has the recipes that README.md shows, docs/mnist.png the samples of two.
Pages show tables between two comments,
<!-- experiments/STUDY/table.md --> and <!-- end -->.
"""

import argparse
import json
import math
import os
import re
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import finals
import guideability
import matplotlib.pyplot as plt
from cells import evaluations, interval, interval_of, with_verdict
from PIL import Image
from run import ROOT, jobs, last_value, load

from w2s_train.compare.charts import COLOURS
from w2s_train.compare.comparison import Comparison, Options, Result, Row, compare
from w2s_train.compare.numbers import half_width, judge
from w2s_train.compare.page import page
from w2s_train.compare.protocol import commit_name
from w2s_train.compare.report import files as reports
from w2s_train.compare.report import guided as tuned_scores
from w2s_train.compare.runs import Run, read_all
from w2s_train.errors import UserError
from w2s_train.scores import Score, read_scores

PAGES = ("README.md", "docs/*.md", "experiments/README.md", "experiments/*/README.md")
BLOCK = re.compile(r"(<!-- (experiments/\S+\.md) -->\n)((?:(?!<!--).)*)(<!-- end -->)", re.DOTALL)
FIGURE = "experiments/wall_clock.png"  # of the studies that have a `figure`, beside each other
SUMMARY, PICTURE = "experiments/table.md", "docs/mnist.png"
SETS = {"mnist": "MNIST", "cifar10": "CIFAR-10", "digits": "digits"}
MANY, OF_MANY = "tiny_imagenet", "Tiny ImageNet, 200 classes"  # scored at its end, in _final
RECIPES = {  # of the summary, with what they are in short
    "none": "none: flow matching",
    "branch": "head at every t, 0.3",
    "head_above": "head above t = 0.2, 0.6",
    "sgg_reversed": "the same, and null class below, 0.6",
    "sgg_paper": "null class above t = 0.2, head below, 0.6: SGG as published",
}
SUMMARY_NOTE = (
    "Fréchet distances, **not** FID; lower is better: mean and 95 % t interval over training "
    "seeds, or the values of fewer than three; of 1,000 images in features of small classifiers, "
    "of Tiny ImageNet 5,000 on fresh seeds in those of one of ImageNet. Unguided but for the last "
    "row: the best of eight scales and intervals on these very seeds, of Tiny ImageNet what "
    "`lightning tune` chose on one run up to scale 4, fresh seeds again. **Bold** is better than "
    "`none` beyond the noise of seeds. Time is relative to `none`, evaluations are the network's "
    "for an image; – was not run."
)
SMALL = 0.15  # distances below it are shown with three decimals, where one run is every recipe
PAIR, GAP = ("none", "head_above"), 20  # arms of MNIST whose samples the picture shows; pixels


def compared(study: str, *arms: str) -> Comparison:
    """The runs of a study against its baseline, retired arms left out; one that fails is an error.

    Args:
        study: Its name.
        arms: These only, against the first; none are all, against the study's baseline.

    Raises:
        SystemExit: A run is left out, or there are too few.
    """
    wanted = (job for job in jobs(study, list(arms) or None) if job.record.is_dir())
    findings = read_all(sorted(str(job.record.relative_to(ROOT)) for job in wanted))
    times = step_times(study)
    runs = [with_times(run, times) for run in findings.runs]
    try:
        against = arms[0] if arms else baseline(study)
        found = compare(replace(findings, runs=runs), Options(baseline=against))
    except UserError as error:
        sys.exit(f"error: {study}: {error}")
    if found.refused:
        sys.exit("\n".join(f"error: {line}" for line in found.refused))
    if found.seconds is not None and times:
        note = "a time is the number of steps times that of one, measured alone (step_time.json)"
        found = replace(found, notes=[*found.notes, note])
    return found


def baseline(study: str) -> str:
    """The arm that the others are compared with."""
    return str(load(study).get("baseline", "none"))


@cache
def measured_steps(study: str) -> list[dict[str, Any]]:
    """What benchmarks/step.py or arms.py measured, an arm an entry; nothing if they did not."""
    path = ROOT / "experiments" / study / "step_time.json"
    return list(json.loads(path.read_text())) if path.is_file() else []


def step_times(study: str) -> dict[str, float | None]:
    """Seconds per step by arm, as they were measured alone.

    None each where the study says that its times mean nothing; no arms where the runs' own count.
    """
    about = load(study)
    if not about.get("times", True):
        return dict.fromkeys(about["arms"])
    entries = {entry["recipe"]: entry for entry in measured_steps(study)}
    if not entries:
        return {}
    named = {a: name for a, name in about.get("timed_as", {}).items() if not name.startswith("-")}
    same = {arm: named.get(arm, arm) for arm in about["arms"]}
    alone = entries[baseline(study)]["seconds"]
    return {arm: alone * entries[name]["ratio"] for arm, name in same.items() if name in entries}


def with_times(run: Run, times: dict[str, float | None]) -> Run:
    """The run with times that do not depend on what else its machine did.

    Raises:
        SystemExit: The steps of other arms were measured, those of its were not.
    """
    if not times:
        return run
    if run.stem not in times:
        sys.exit(f"error: {run.folder}: step_time.json must have the steps of {run.stem}")
    per_step = times[run.stem]
    scores = []
    for score in run.scores:
        seconds = None if per_step is None else score.step * per_step
        scores.append(replace(score, protocol=replace(score.protocol, training_seconds=seconds)))
    return replace(run, scores=scores)


def training_table(study: str, comparison: Comparison) -> str:
    """Arms in the order of the study's description; at equal time, too, if there are times."""
    order, timed = list(load(study)["arms"]), comparison.seconds is not None
    with_guidance, source = guided_at_sampling(study, comparison)
    head = [f"step {comparison.step:,}", "verdict"]
    head += [finals.GUIDED] if with_guidance else []
    head += [f"{comparison.seconds:.0f} s", "verdict", "time per step"] if timed else []
    lines = [f"| arm | {' | '.join(head)} |", "|---" * (1 + len(head)) + "|"]
    for row in sorted(comparison.rows, key=lambda row: order.index(row.name)):
        cells = _cells(row.at_step)
        cells += [with_guidance.get(row.name, "–")] if with_guidance else []
        cells += [*_cells(row.at_seconds), f"{row.time_ratio:.2f}"] if timed else []
        lines.append(f"| `{row.name}` | {' | '.join(cells)} |")
    return "\n".join([*lines, "", _footnote(study, comparison, timed) + source]) + "\n"


def guided_at_sampling(study: str, comparison: Comparison) -> tuple[dict[str, str], str]:
    """What arms score with guidance at sampling, where it was tried, and how that was chosen."""
    if scores := tuned_scores(comparison):
        steps = comparison.protocol["steps"]
        found = [
            f"`{line.arm}` {line.guidance}, {evaluations(line.guidance, steps)} evaluations"
            for line in comparison.tuned
            if line.tuned
        ]
        how = "found by `lightning tune`, fresh seeds"
        return scores, f" Guided at sampling: {how}: {'; '.join(found)} an image."
    (base,) = [row for row in comparison.rows if row.name == comparison.baseline]
    if best := best_guidance(f"{study}_guidance", base):
        return {base.name: best[0]}, (
            f" Guided at sampling: the best setting of `{study}_guidance` on these very seeds, for "
            f"{best[1]} evaluations an image."
        )
    return {}, ""


def pairs_table(study: str) -> str:
    """What an arm adds to the one that it differs from, a pair a line; each with its verdict."""
    there = {job.arm for job in jobs(study) if job.is_recorded}
    timed = load(study).get("times", True)
    head = ["without, with", *(f"equal steps: {name}" for name in ("without", "with", "verdict"))]
    if timed:
        head += [*(f"equal time: {name}" for name in ("without", "with", "verdict")), "step"]
    lines = []
    for plain, other in load(study)["pairs"].items():
        if not {plain, other} <= there:
            continue  # not run yet
        below, above = compared(study, plain, other).rows
        cells = [f"`{plain}`, `{other}`", _cells(below.at_step)[0], *_cells(above.at_step)]
        if timed:
            cells += [_cells(below.at_seconds)[0], *_cells(above.at_seconds)]
            cells.append(f"{above.time_ratio or math.nan:.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    text = "Each pair by itself, at its last step"
    if timed:
        text += ", and at the time that the faster one took to it; step: its time over that without"
    text += "; mean and 95 % t interval over training seeds."
    top = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    return "\n".join([*top, *lines, "", text]) + "\n"


def _cells(result: Result | None) -> list[str]:
    if result is None:
        return ["–", "not scored by then"]
    verdict = result.judgement.verdict.partition(":")[0]
    if result.std is None:
        return [f"{result.mean:.2f}", f"{verdict}, one seed"]
    return [interval(result.mean, result.std, len(result.seeds)), verdict]


def _footnote(study: str, comparison: Comparison, timed: bool) -> str:
    arms: dict[str, list[str]] = defaultdict(list)  # by their seeds
    for row in comparison.rows:
        arms[", ".join(map(str, row.at_step.seeds))].append(f"`{row.name}`")
    common = max(arms, key=lambda seeds: (len(seeds), len(arms[seeds])))
    others = [f"of {', '.join(n)} {seeds}" for seeds, n in arms.items() if seeds != common]
    entries = [score for row in comparison.rows for run in row.runs for score in run.scores]
    commits = {commit_name(score.protocol.git_commit or "unknown") for score in entries}
    machines = {run.machine or "unknown" for row in comparison.rows for run in row.runs}
    measured = "as the runs had them"
    if steps := measured_steps(study):
        measured = (
            f"measured alone (`step_time.json`, {steps[0]['rounds']} rounds, commit "
            f"{commit_name(steps[0]['git_commit'])})"
        )
    at_time = (
        f" At equal time, scores between two evaluations are interpolated in their logarithm; "
        f"a time is the number of steps times that of one, {measured}."
    )
    return (
        f"`{comparison.selection.metric}` of {comparison.protocol['n']:,} images, unguided, lower "
        f"is better: mean and 95 % t interval over training seeds {'; '.join([common, *others])}; "
        f"inconclusive is inside the noise."
        f"{at_time if timed else ''} Commit {', '.join(sorted(commits))}; "
        f"{' and '.join(sorted(m.partition(': ')[2] or m for m in machines))}."
    )


@cache
def guided(study: str) -> tuple[dict[str, dict[str, list[float]]], list[Score]]:
    """Values by guidance and set of seeds, and all scores of a study of guidance at sampling."""
    values: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    scores: list[Score] = []
    for name, seeds in load(study)["seeds"].items():
        for seed in seeds:
            folder = ROOT / "experiments" / study / "runs" / f"{name}-{seed}"
            if "separately" in load(study) and not folder.exists():
                continue  # of arms that are still to be trained
            try:
                found = read_scores(folder)
            except UserError as error:
                sys.exit(f"error: {study}: {name}-{seed}: {error}")
            scores += found
            for score in found:
                values[score.guidance][name].append(score.value)
    return values, scores


def guidance_table(study: str) -> str:
    """Guidance at sampling, best first on the first set of seeds; a column a set."""
    sets: dict[str, list[int]] = load(study)["seeds"]
    values, scores = guided(study)
    head = [f"{name.replace('_', ' ')} {', '.join(map(str, s))}" for name, s in sets.items()]
    lines = [f"| guidance | evaluations an image | {' | '.join(head)} |"]
    lines.append("|---" * (2 + len(sets)) + "|")
    (steps,) = {score.protocol.steps for score in scores}
    for guidance in sorted(values, key=lambda g: statistics.fmean(values[g][next(iter(sets))])):
        samples = values[guidance].values()
        cells = [interval(statistics.fmean(s), statistics.stdev(s), len(s)) for s in samples]
        lines.append(f"| `{guidance}` | {evaluations(guidance, steps)} | {' | '.join(cells)} |")
    (metric,), (count,) = {score.metric for score in scores}, {s.protocol.n for s in scores}
    trained = sorted({score.step for score in scores})
    text = (
        f"`{metric}` of {count:,} images of the baseline at step "
        f"{' and '.join(f'{step:,}' for step in trained)}, lower is better: mean and 95 % t "
        f"interval over training seeds. {_commits(scores)}"
    )
    return "\n".join([*lines, "", text]) + "\n"


def settings_table(study: str) -> str:
    """What is chosen at sampling of runs with drawn scales; a column an arm, and separate runs."""
    about, (values, scores) = load(study), guided(study)
    separate = about["separately"]
    arms = [arm for arm in about["seeds"] if any(arm in found for found in values.values())]
    lines = [f"| chosen at sampling | {' | '.join(arms)} | trained separately |"]
    lines.append("|---" * (2 + len(arms)) + "|")
    for guidance, found in values.items():
        cells = [_cell(found[arm]) for arm in arms]
        arm = separate["arms"].get(guidance)
        same = jobs(separate["study"], [arm]) if arm else []
        ends = [last_value(job.record) for job in same if job.is_recorded]
        cells.append(f"{_cell(ends)} (`{arm}`)" if arm else "–")
        lines.append(f"| `{guidance}` | {' | '.join(cells)} |")
    (metric,), (count,) = {score.metric for score in scores}, {s.protocol.n for s in scores}
    text = (
        f"`{metric}` of {count:,} images at the end of training, lower is better: mean and 95 % t "
        f"interval over training seeds, or the values of one or two. {_commits(scores)}"
    )
    return "\n".join([*lines, "", text]) + "\n"


def _commits(scores: Sequence[Score]) -> str:
    names = {commit_name(score.protocol.git_commit or "unknown") for score in scores}
    return f"Commit {', '.join(sorted(names))}."


def _cell(values: Sequence[float]) -> str:
    return interval_of(values, 3 if max(values, default=0.0) < SMALL else 2)


def summary(found: dict[str, Comparison]) -> str:
    """Some recipes on all data sets at equal steps, and the baseline with its best guidance."""
    many = finals.column(f"{MANY}_final")
    rows = {study: {row.name: row for row in found[study].rows} for study in (*SETS, MANY)}
    (steps,) = {found[study].protocol["steps"] for study in SETS}
    heads = [f"{name}, step {found[study].step:,}" for study, name in SETS.items()] + [OF_MANY]
    lines = [
        f"| recipe | weak source, scale | {' | '.join(heads)} | time of a step | evaluations |"
    ]
    lines.append("|---" * (5 + len(SETS)) + "|")
    for recipe, what in RECIPES.items():
        cells = [marked(rows[study].get(recipe)) for study in SETS]
        cells.append(many.get((recipe, "none"), ("–", 0))[0])
        times = [
            of_study[recipe].time_ratio or 0.0 for of_study in rows.values() if recipe in of_study
        ]
        took = " to ".join(dict.fromkeys(f"{time:.2f}" for time in (min(times), max(times))))
        lines.append(f"| `{recipe}` | {what} | {' | '.join(cells)} | {took} | {steps} |")
    best = [best_guidance(f"{study}_guidance", rows[study]["none"]) for study in SETS]
    of_many = [many[row] for row in many if row[0] == "none" and finals.is_guided(row)]
    best.append(of_many[0] if of_many else None)
    cells = [each[0] if each else "–" for each in best]
    names = [*SETS.values(), OF_MANY.partition(",")[0]]
    counts = ", ".join(f"{n} {each[1]}" for n, each in zip(names, best, strict=True) if each)
    head = "| `none`, guided | null class, while sampling |"
    lines.append(f"{head} {' | '.join(cells)} | 1.00 | {counts} |")
    return "\n".join([*lines, "", SUMMARY_NOTE]) + "\n"


def marked(row: Row | None) -> str:
    """A cell of the summary."""
    if row is None:
        return "–"
    result = row.at_step
    return with_verdict(
        interval(result.mean, result.std or 0.0, len(result.seeds)), result.judgement
    )


def best_guidance(study: str, baseline: Row) -> tuple[str, int] | None:
    """The best of its settings on the baseline's own seeds, and its evaluations an image."""
    if not (ROOT / "experiments" / study).is_dir():
        return None
    values, scores = guided(study)
    of_set = [name for name, s in load(study)["seeds"].items() if s == baseline.at_step.seeds][0]
    settings = {name: v[of_set] for name, v in values.items()}
    name = min(settings, key=lambda setting: statistics.fmean(settings[setting]))
    plain, best = ([[value] for value in settings[key]] for key in ("none", name))
    (steps,) = {score.protocol.steps for score in scores}
    mean, std = statistics.fmean(settings[name]), statistics.stdev(settings[name])
    text, verdict = interval(mean, std, len(best)), judge(best, plain, higher_is_better=False)
    return with_verdict(text, verdict), evaluations(name, steps)


def picture(path: Path) -> None:
    """The stored samples of two arms of MNIST beside each other: same seeds, same noise."""
    seed = load("mnist")["seeds"][PAIR[0]][0]
    folders = [ROOT / "experiments" / "mnist" / "runs" / f"{arm}-{seed}" / "grids" for arm in PAIR]
    left, right = (Image.open(next(folder.glob("*.png"))) for folder in folders)
    both = Image.new("L", (left.width + right.width + GAP, left.height), 255)
    both.paste(left, (0, 0))
    both.paste(right, (left.width + GAP, 0))
    both.save(path, optimize=True)


def figure(studies: Sequence[str], found: dict[str, Comparison], path: Path) -> None:
    """Score against training time, a panel a study; bands are t intervals, cut off at mean / 10."""
    fig, axes = plt.subplots(1, len(studies), figsize=(4.6 * len(studies), 3.6), squeeze=False)
    shown = {study: [str(name) for name in load(study)["figure"]] for study in studies}
    names = list(dict.fromkeys(name for of_study in shown.values() for name in of_study))
    colours = dict(zip(names, COLOURS[: len(names)], strict=True))
    for study, axis in zip(studies, axes[0], strict=True):
        rows = {row.name: row for row in found[study].rows}
        for name in shown[study]:
            if name in rows:  # else not run yet
                _curve(axis, rows[name], colours[name])
        axis.set_yscale("log", subs=[2, 3, 5])
        axis.set_title(study)
        axis.set_xlabel("seconds of training")
        axis.set_ylabel(found[study].selection.metric)
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:g}")
        axis.grid(alpha=0.3, which="both")
        axis.legend(frameon=False, fontsize=8)
    fig.tight_layout()
    fig.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(fig)


def _curve(axis: Any, row: Row, colour: str) -> None:
    points = [p for p in row.curve if p.training_seconds is not None and p.std is not None]
    if not points:  # one seed
        return
    x, y = [p.training_seconds for p in points], [p.mean for p in points]
    width = [half_width(p.std or 0.0, len(row.runs)) for p in points]
    low = [max(mean - w, mean / 10) for mean, w in zip(y, width, strict=True)]
    axis.fill_between(
        x, low, [m + w for m, w in zip(y, width, strict=True)], color=colour, alpha=0.15, lw=0
    )
    axis.plot(x, y, color=colour, marker="o", ms=3, label=row.name)


def texts(study: str, comparison: Comparison | None) -> dict[Path, str]:
    """The files of a study that hold its numbers."""
    folder = ROOT / "experiments" / study
    if comparison is None:
        of_drawn = settings_table if "separately" in load(study) else guidance_table
        table = finals.table if load(study).get("every_metric") else of_drawn
        return {folder / "table.md": table(study)}
    files = {folder / "comparison" / name: text for name, text in reports(comparison).items()}
    if "pairs" in load(study):
        files[folder / "pairs.md"] = pairs_table(study)
    if (folder / guideability.STORED).is_file():
        files[folder / "guideability.md"] = guideability.table(study)
    return {folder / "table.md": training_table(study, comparison), **files}


def pages(tables: dict[Path, str]) -> dict[Path, str]:
    """Pages, with the tables that they name as they are now.

    Raises:
        SystemExit: A table is named that is not there, or does not end.
    """
    found = {}
    for path in sorted(path for pattern in PAGES for path in ROOT.glob(pattern)):
        text = path.read_text()
        blocks = list(BLOCK.finditer(text))
        if len(blocks) != text.count("<!-- ") / 2:
            sys.exit(f"error: {path.relative_to(ROOT)}: each table must have a start and an end")
        for match in blocks:
            table = ROOT / match[2]
            if table not in tables and not table.is_file():
                sys.exit(f"error: {path.relative_to(ROOT)}: there is no {match[2]}")
            shown = tables.get(table) or table.read_text()
            text = text.replace(match[0], match[1] + shown + match[4])
        found[path] = text
    return found


def main() -> None:
    """Remake or check."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("studies", nargs="*")
    parser.add_argument("--check", action="store_true", help="change nothing, fail on differences")
    options = parser.parse_args()
    os.chdir(ROOT)  # reports name the runs by their paths
    every = sorted({path.parts[1] for path in Path("experiments").glob("*/runs/*/scores.json")})
    unknown = sorted(set(options.studies) - set(every))
    if unknown:
        sys.exit(f"error: studies={unknown[0]}: must be one of {', '.join(every)}")
    found, files = dict[str, Comparison](), dict[Path, str]()
    for study in options.studies or every:
        if " fit " in load(study)["command"] and "separately" not in load(study):
            found[study] = compared(study)
        files |= texts(study, found.get(study))
    if not options.studies:
        files[ROOT / SUMMARY] = summary(found)
    files |= pages(files)
    if not options.check:
        shown = ROOT / "experiments"
        files |= {shown / s / "comparison/comparison.html": page(c) for s, c in found.items()}
    changed = [p for p, text in files.items() if not p.is_file() or p.read_text() != text]
    for path in changed:
        print(f"{'differs' if options.check else 'written'}: {path.relative_to(ROOT)}")
    if options.check:
        sys.exit(bool(changed))
    for path in changed:
        path.parent.mkdir(exist_ok=True)
        path.write_text(files[path])
    drawn = [study for study in found if "figure" in load(study)]
    for study in drawn:
        figure([study], found, ROOT / "experiments" / study / "wall_clock.png")
    if drawn and not options.studies:
        figure(drawn, found, ROOT / FIGURE)
        picture(ROOT / PICTURE)


if __name__ == "__main__":
    main()
