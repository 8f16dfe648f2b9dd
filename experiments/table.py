"""The table of a study of recipes, made from its runs' scores.

    python experiments/table.py experiments/digits_recipes

Reads scores/RECIPE-SEED.json, which the runs wrote, and step_time.json, which benchmarks/step.py
wrote, if it is there; writes table.md.
"""

import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any


def last_scores(folder: Path) -> dict[str, dict[int, dict[str, Any]]]:
    """The last score of every run, by recipe and seed."""
    found: dict[str, dict[int, dict[str, Any]]] = defaultdict(dict)
    for path in sorted((folder / "scores").glob("*.json")):
        recipe, _, seed = path.stem.rpartition("-")
        found[recipe][int(seed)] = json.loads(path.read_text())[-1]
    return found


def table(folder: Path) -> str:
    """Markdown, best mean first."""
    scores, timed = last_scores(folder), folder / "step_time.json"
    times = {e["recipe"]: e for e in json.loads(timed.read_text())} if timed.exists() else {}
    seeds = sorted({seed for runs in scores.values() for seed in runs})
    values = {r: [runs[s]["value"] for s in sorted(runs)] for r, runs in scores.items()}
    (metric,) = {run["metric"] for runs in scores.values() for run in runs.values()}
    (step,) = {run["step"] for runs in scores.values() for run in runs.values()}
    head = ["recipe", *(f"seed {s}" for s in seeds), "mean ± std"]
    head += ["time per step"] if times else []
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for recipe in sorted(values, key=lambda r: statistics.fmean(values[r])):
        mean, spread = statistics.fmean(values[recipe]), statistics.stdev(values[recipe])
        cells = [f"`{recipe}`", *(f"{v:.2f}" for v in values[recipe]), f"{mean:.2f} ± {spread:.2f}"]
        if times:
            low, high = times[recipe]["ratio_quartiles"]
            cells.append(f"{times[recipe]['ratio']:.2f} ({low:.2f} to {high:.2f})")
        lines.append("| " + " | ".join(cells) + " |")
    commits = {r["protocol"]["git_commit"][:7] for runs in scores.values() for r in runs.values()}
    lines += ["", f"`{metric}` at step {step}, unguided; commit {', '.join(sorted(commits))}."]
    return "\n".join(lines) + (_timing(times) if times else "") + "\n"


def _timing(times: dict[str, dict[str, Any]]) -> str:
    about, commits = times["none"], sorted({e["git_commit"][:7] for e in times.values()})
    return (
        " Time per step: ratio to `none` in the same round, median and quartiles of "
        f"{about['rounds']} rounds ({about['network']}, {about['machine']}, one thread; commit "
        f"{', '.join(commits)})."
    )


if __name__ == "__main__":
    text = table(Path(sys.argv[1]))
    (Path(sys.argv[1]) / "table.md").write_text(text)
    print(text)
