"""Make all tables and figures of the studies again, from the scores that their runs left.

    python experiments/remake.py                    every study, and the pages that show its tables
    python experiments/remake.py digits mnist       these studies only
    python experiments/remake.py --check            change nothing; fail where a file would change

A study of trainings gets comparison/ (by `lightning compare`), table.md and wall_clock.png; one of
guidance at sampling gets table.md. Pages show tables between two comments,
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
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import yaml
from scipy.special import stdtrit

from w2s_train.compare.comparison import Comparison, Options, Result, Row, compare
from w2s_train.compare.page import page
from w2s_train.compare.report import markdown, to_json
from w2s_train.compare.runs import read_all
from w2s_train.sampler import Euler

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "docs/*.md", "experiments/README.md", "experiments/*/README.md")
BLOCK = re.compile(r"(<!-- (experiments/\S+\.md) -->\n).*?(<!-- end -->)", re.DOTALL)
FIGURE = "experiments/wall_clock.png"  # of the studies that have a `figure`, beside each other
COLOURS = ("#000000", "#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


def half_width(std: float, n: int) -> float:
    """Half the 95 % t interval of the mean of n numbers."""
    return float(stdtrit(n - 1, 0.975)) * std / math.sqrt(n)


def interval(mean: float, std: float, n: int) -> str:
    """Mean and its 95 % t interval over training seeds."""
    width = half_width(std, n)
    return f"{mean:.2f} ({mean - width:.2f} to {mean + width:.2f})"


def load(study: str) -> dict[str, Any]:
    """The study's description."""
    return dict(yaml.safe_load((ROOT / "experiments" / study / "study.yaml").read_text()))


def compared(study: str) -> Comparison:
    """The runs of a study against its baseline; a run that cannot be used is an error.

    Raises:
        SystemExit: A run is left out.
    """
    found = compare(read_all([f"experiments/{study}/runs/*"]), Options(baseline="none"))
    if found.refused:
        sys.exit("\n".join(f"error: {line}" for line in found.refused))
    return found


def training_table(study: str, comparison: Comparison) -> str:
    """Arms in the order of the study's description."""
    order = list(load(study)["arms"])
    head = [f"step {comparison.step:,}", "verdict", f"{comparison.seconds:.0f} s", "verdict"]
    lines = [f"| arm | {' | '.join(head)} | time per step |", "|---" * 6 + "|"]
    for row in sorted(comparison.rows, key=lambda row: order.index(row.name)):
        cells = [*_cells(row.at_step), *_cells(row.at_seconds), f"{row.time_ratio:.2f}"]
        lines.append(f"| `{row.name}` | {' | '.join(cells)} |")
    return "\n".join([*lines, "", _footnote(comparison)]) + "\n"


def _cells(result: Result | None) -> list[str]:
    if result is None:
        return ["–", "not scored by then"]
    verdict = result.judgement.verdict.split(":")[0].replace("inconclusive", "inside the noise")
    if result.std is None:
        return [f"{result.mean:.2f}", "one seed"]
    return [interval(result.mean, result.std, len(result.seeds)), verdict]


def _footnote(comparison: Comparison) -> str:
    seeds = sorted({seed for row in comparison.rows for seed in row.at_step.seeds})
    commits = {c[:7] for row in comparison.rows for run in row.runs for c in _commits(run.scores)}
    count = comparison.protocol["n"]
    return (
        f"`{comparison.selection.metric}` of {count:,} images, unguided, lower is better: mean and "
        f"95 % t interval over training seeds {', '.join(map(str, seeds))}, at equal steps and at "
        f"equal training time. Time per step relative to `{comparison.baseline}`, as the runs had "
        f"it. Commit {', '.join(sorted(commits))}; {_machine(comparison)}."
    )


def _commits(scores: Sequence[Any]) -> set[str]:
    return {score.protocol.git_commit for score in scores}


def _machine(comparison: Comparison) -> str:
    machines = {run.machine for row in comparison.rows for run in row.runs}
    return " and ".join(sorted(m.partition(": ")[2] for m in machines if m))


def guidance_table(study: str) -> str:
    """Guidance at sampling, best first on the first set of seeds; a column a set."""
    sets: dict[str, list[int]] = load(study)["seeds"]
    values: dict[str, dict[int, float]] = defaultdict(dict)
    entry: dict[str, Any] = {}
    for path in sorted((ROOT / "experiments" / study / "runs").glob("*/scores.json")):
        for entry in json.loads(path.read_text()):
            values[entry["guidance"]][int(path.parent.name.rpartition("-")[2])] = entry["value"]
    head = [f"{name.replace('_', ' ')} {', '.join(map(str, s))}" for name, s in sets.items()]
    lines = [f"| guidance | evaluations an image | {' | '.join(head)} |"]
    lines.append("|---" * (2 + len(sets)) + "|")
    first = next(iter(sets.values()))
    for guidance in sorted(values, key=lambda g: statistics.fmean(values[g][s] for s in first)):
        samples = [[values[guidance][seed] for seed in seeds] for seeds in sets.values()]
        cells = [interval(statistics.fmean(s), statistics.stdev(s), len(s)) for s in samples]
        count = evaluations(guidance, entry["protocol"]["steps"])
        lines.append(f"| `{guidance}` | {count} | {' | '.join(cells)} |")
    text = (
        f"`{entry['metric']}` of {entry['protocol']['n']:,} images of the baseline, lower is "
        "better: mean and 95 % t interval over training seeds."
    )
    return "\n".join([*lines, "", text]) + "\n"


def evaluations(guidance: str, steps: int) -> int:
    """Network evaluations for one image: Euler's, and one more at each step that cfg guides."""
    found = re.fullmatch(r"cfg\(\S+, \[(\S+), (\S+)\]\)", guidance)
    if not found:
        return steps
    low, high = map(float, found.groups())
    return steps + sum(low <= t <= high for t in Euler(steps).times()[:-1])


def figure(studies: Sequence[str], found: dict[str, Comparison], path: Path) -> None:
    """Score against training time, a panel a study, bands as in the tables."""
    fig, axes = plt.subplots(1, len(studies), figsize=(4.6 * len(studies), 3.6), squeeze=False)
    for study, axis in zip(studies, axes[0], strict=True):
        rows = {row.name: row for row in found[study].rows}
        for colour, name in zip(COLOURS, load(study)["figure"], strict=False):
            _curve(axis, rows[name], colour)
        axis.set_yscale("log")
        axis.set_title(study)
        axis.set_xlabel("seconds of training")
        axis.set_ylabel(found[study].selection.metric)
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
        axis.grid(alpha=0.3, which="both")
        axis.legend(frameon=False, fontsize=8)
    fig.tight_layout()
    fig.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(fig)


def _curve(axis: Any, row: Row, colour: str) -> None:
    points = [p for p in row.curve if p.training_seconds is not None and p.std is not None]
    x, y = [p.training_seconds for p in points], [p.mean for p in points]
    width = [half_width(p.std or 0.0, len(row.runs)) for p in points]
    low = [max(mean - w, mean / 10) for mean, w in zip(y, width, strict=True)]
    axis.fill_between(
        x, low, [m + w for m, w in zip(y, width, strict=True)], color=colour, alpha=0.15, lw=0
    )
    axis.plot(x, y, color=colour, marker="o", ms=3, label=row.name)


def texts(study: str, comparison: Comparison | None) -> dict[Path, str]:
    """The files of a study, figures left out."""
    folder = ROOT / "experiments" / study
    if comparison is None:
        return {folder / "table.md": guidance_table(study)}
    made = {"md": markdown, "json": to_json, "html": page}
    files = {
        folder / "comparison" / f"comparison.{suffix}": make(comparison)
        for suffix, make in made.items()
    }
    return {folder / "table.md": training_table(study, comparison), **files}


def pages(tables: dict[Path, str]) -> dict[Path, str]:
    """Pages, with the tables that they name as they are now."""

    def table(match: re.Match[str]) -> str:
        path = ROOT / match[2]
        return match[1] + (tables.get(path) or path.read_text()) + match[3]

    found = sorted(path for pattern in PAGES for path in ROOT.glob(pattern))
    return {path: BLOCK.sub(table, path.read_text()) for path in found}


def main() -> None:
    """Remake or check."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("studies", nargs="*")
    parser.add_argument("--check", action="store_true", help="change nothing, fail on differences")
    options = parser.parse_args()
    described = (ROOT / "experiments").glob("*/study.yaml")
    every = sorted(path.parent.name for path in described if (path.parent / "runs").is_dir())
    unknown = sorted(set(options.studies) - set(every))
    if unknown:
        sys.exit(f"error: studies={unknown[0]}: must be one of {', '.join(every)}")
    os.chdir(ROOT)  # reports name the runs by their paths
    found, files = dict[str, Comparison](), dict[Path, str]()
    for study in options.studies or every:
        if isinstance(load(study)["seeds"], list):
            found[study] = compared(study)
        files |= texts(study, found.get(study))
    files |= pages(files)
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
    if not options.studies:
        figure(drawn, found, ROOT / FIGURE)


if __name__ == "__main__":
    main()
