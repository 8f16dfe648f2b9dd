"""Guideability of runs in which sources only look on: the mean of the last five log entries.

python experiments/look_on/table.py runs/look_on/mnist-10 [...]
"""

import csv
import statistics
import sys
from pathlib import Path

SOURCES = ("head", "class", "ema")
LAST = 5


def last(rows: list[dict[str, str]], key: str) -> list[float]:
    """The last values of a column."""
    return [float(row[key]) for row in rows if row.get(key)][-LAST:]


def line(rows: list[dict[str, str]], where: str, source: str) -> str:
    """A row of the table: over all times with its standard error, and per tenth."""
    name = f"{where}/{source}"
    values, errors = (last(rows, f"{name}/guideability{end}") for end in ("", "_error"))
    error = sum(e * e for e in errors) ** 0.5 / len(errors)
    tenths = [
        statistics.fmean(last(rows, f"{name}/tenth_{k / 10:g}-{(k + 1) / 10:g}/guideability"))
        for k in range(10)
    ]
    cells = " | ".join(f"{value:+.2f}" for value in tenths)
    return f"{where} | `{source}` | {statistics.fmean(values):+.3f} ± {error:.3f} | {cells} |"


def main() -> None:
    """Print a table."""
    print("| run | rows | source | all times | " + " | ".join(f".{k}" for k in range(10)) + " |")
    print("|---" * 14 + "|")
    for folder in map(Path, sys.argv[1:]):
        rows = list(csv.DictReader((folder / "metrics.csv").open()))
        for where in ("train", "held_out"):
            for source in SOURCES:
                print(f"| {folder.name} | {line(rows, where, source)}")


if __name__ == "__main__":
    main()
