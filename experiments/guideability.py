"""Guideability of baselines in which sources only look on, by tenths of t.

    python experiments/guideability.py runs/look_on/mnist-10 [...]
    python experiments/guideability.py runs/tiny_imagenet/none-1[01] --keep tiny_imagenet

The mean of the last entries of metrics.csv, held-out rows, and its standard error; kept as
guideability.json beside a study's description, of which `remake.py` makes guideability.md.
"""

import argparse
import csv
import json
import statistics
from pathlib import Path

from run import ROOT

SOURCES, LAST = ("head", "class", "ema"), 5
RANGES = ["", *(f"tenth_{k / 10:g}-{(k + 1) / 10:g}/" for k in range(10))]
STORED = "guideability.json"
Measured = dict[str, dict[str, list[tuple[float, float]]]]  # by run and source, in RANGES


def measured(run: Path) -> dict[str, list[tuple[float, float]]]:
    """By source: mean and standard error, over all times, then in each tenth."""
    rows = list(csv.DictReader((run / "metrics.csv").open()))

    def last(key: str) -> list[float]:
        return [float(row[key]) for row in rows if row.get(key)][-LAST:]

    found = dict[str, list[tuple[float, float]]]()
    for source in SOURCES:
        keys = [f"held_out/{source}/{where}guideability" for where in RANGES]
        errors = [last(f"{key}_error") for key in keys]
        means = [statistics.fmean(last(key)) for key in keys]
        found[source] = [
            (mean, sum(x * x for x in each) ** 0.5 / len(each))
            for mean, each in zip(means, errors, strict=True)
        ]
    return found


def lines(found: Measured) -> str:
    """A row a range of t, a column a source and run."""
    heads = [f"`{source}`, {run}" for source in SOURCES for run in found]
    rows = [f"| t | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for i in range(len(RANGES)):
        where = f"{(i - 1) / 10:.1f} to {i / 10:.1f}" if i else "all"
        values = [found[run][source][i] for source in SOURCES for run in found]
        rows.append(f"| {where} | {' | '.join(f'{x:+.3f} ± {e:.3f}' for x, e in values)} |")
    return "\n".join(rows) + "\n"


def table(study: str) -> str:
    """Of what is kept."""
    note = f"Held-out rows, the mean of the last {LAST} entries of the log and its standard error."
    return f"{lines(json.loads((ROOT / 'experiments' / study / STORED).read_text()))}\n{note}\n"


def main() -> None:
    """Print, or keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--keep", metavar="STUDY")
    options = parser.parse_args()
    found = {run.name: measured(run) for run in options.runs}
    print(lines(found), end="")
    if options.keep:
        path = ROOT / "experiments" / options.keep / STORED
        path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
