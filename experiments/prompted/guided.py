"""Guidance at sampling on the runs of a prompted study: tuned with equal budgets, then measured.

    python -m experiments.prompted.guided prompted_digits            what is not recorded yet
    python -m experiments.prompted.guided prompted_digits --table    the table alone

Recorded runs without weak source are tuned by `lightning tune`, each guidance with as many images
and up to the same scale; what it finds, and unguided sampling, is measured on fresh seeds:
distance, share of images whose class a classifier finds to be that of the prompt, network
evaluations and processor time an image, for which all guidances take turns. Runs that were trained
with weak targets are sampled unguided. What is found stands in guided/ARM-SEED.json of the study,
and in guided.md.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import yaml
from torch import nn

from w2s_train.compare.numbers import half_width
from w2s_train.features import ClassifierFeatures
from w2s_train.features.frechet import FeatureSums, Reference, frechet_distance
from w2s_train.files import atomic_write
from w2s_train.guidance import Unguided
from w2s_train.imports import found
from w2s_train.metrics import ClassAgreement
from w2s_train.module import DiffusionModule
from w2s_train.scores import git_commit
from w2s_train.tune.tuning import FRESH

ROOT = Path(__file__).resolve().parents[2]
BASE = "`none`, unguided"
ALLOWED = "experiments.prompted"
SETS = 3  # of seeds, in tuning and fresh
SET_IMAGES = 250  # of a set in tuning
ROUNDS = 5  # of the times, a block of images each
MOST = {"prompted_digits": 1.5, "prompted_mnist": 4.0}  # scale; 1 is off
BLOCKS = "[0],[1],[2],[1, 2]"
INTERVAL = ["low=0:0.9", "high=0.1:1"]  # the ones that are none are passed over


def guidances(study: str) -> dict[str, tuple[str, list[str]]]:
    """By name the overlay, and what is searched: all from off to the same scale."""
    most = MOST[study]
    scale, blocks = f"scale=1:{most:g}", f"blocks={BLOCKS}"
    both = [f"high_noise.{scale}", f"low_noise.{scale}", f"low_noise.weak.{blocks}"]
    skipped = [scale, f"skip_scale=0:{most - 1:g}", blocks]
    return {
        "cfg": ("cfg", [scale, *INTERVAL]),
        "skip": ("experiments/prompted/skip.yaml", [scale, f"weak.{blocks}", *INTERVAL]),
        "slg": ("experiments/prompted/slg.yaml", [*skipped, *INTERVAL]),
        "segmented": ("segmented", ["border=0.1:0.9", *both]),
    }


class Row(NamedTuple):
    """Of one run; ``time`` is over that of its unguided sampling."""

    distance: float
    agreement: float
    evaluations: float
    time: float
    seconds: float
    candidates: int | None


def built(node: Any) -> Any:
    """What a config's class paths and arguments stand for."""
    if isinstance(node, dict) and "class_path" in node:
        arguments = {key: built(value) for key, value in node.get("init_args", {}).items()}
        return found(node["class_path"])(**arguments)
    return node


def tuned(run: Path, name: str, images: int) -> dict[str, Any]:
    """The result of `lightning tune`, which is run if there is none; an interrupted one goes on."""
    result = run / "tune" / name / "result.json"
    overlay, searched = guidances(run.parent.name)[name]
    if not result.is_file():
        words = [sys.executable, "-m", "w2s_train", "tune", str(run), "--guidance", overlay]
        words += [word for each in searched for word in ("--search", each)]
        words += ["--images", str(images), "--set_images", str(SET_IMAGES), "--sets", str(SETS)]
        subprocess.run([*words, "--name", name, "--allow_imports", ALLOWED], check=True, cwd=ROOT)
    found: dict[str, Any] = json.loads(result.read_text())
    asked = {"search": searched, "images": images, "set_images": SET_IMAGES, "sets": SETS}
    if (has := {key: found["about"][key] for key in asked}) != asked:
        sys.exit(f"error: {result.parent}: {has}: must be {asked}; move it away to tune anew")
    return found


@contextmanager
def counted(blocks: nn.ModuleList) -> Iterator[list[int]]:
    """Rows that went through each block call, while the context lasts."""
    rows: list[int] = []

    def count(_: nn.Module, __: Any, arguments: dict[str, Any]) -> None:
        rows.append(len(arguments["hidden_states"]))

    hooks = [block.register_forward_pre_hook(count, with_kwargs=True) for block in blocks]
    try:
        yield rows
    finally:
        for hook in hooks:
            hook.remove()


class Measure:
    """Samples a run with any guidance, on fresh seeds.

    Args:
        run: Its folder.

    Raises:
        UserError: There is no checkpoint, or no classifier of its data.
    """

    def __init__(self, run: Path) -> None:
        path = str(run / "checkpoints" / "last.ckpt")
        self.module = DiffusionModule.load_from_checkpoint(path, allow_imports=[ALLOWED]).eval()
        config = yaml.safe_load((run / "config.yaml").read_text())
        callbacks = config["trainer"]["callbacks"]
        (fid,) = [each["init_args"] for each in callbacks if each["class_path"].endswith(".FID")]
        self.images = int(config["data"]["num_generated"])
        self.features: ClassifierFeatures = built(fid["features"])
        self.features.load()
        self.reference = Reference.load(ROOT / fid["reference"])

    def __call__(self, guidance: Any) -> dict[str, Any]:
        """Distance and agreement by set, network evaluations of an image."""
        module, network = self.module, cast(Any, self.module.ema.module)
        self._take(guidance)
        distances, agreements = [], []
        with counted(network.blocks) as rows:
            for k in range(SETS):
                first = FRESH + k * self.images
                labels = [i % network.num_classes for i in range(self.images)]
                made = module.generate(list(range(first, first + self.images)), labels)
                seen = self.features(made)
                sums = FeatureSums(self.features.num_features)
                sums.update(seen)
                distances.append(frechet_distance(sums.moments(), self.reference.moments))
                asked = torch.tensor(labels)
                found = ClassAgreement().compute(seen, seen, self.features, asked)
                agreements.append(found["agreement"])
        block = module.generation_block
        images = SETS * -(-self.images // block) * block  # blocks are filled up
        return {
            "guidance": guidance.describe(),
            "distance": distances,
            "agreement": agreements,
            "evaluations": sum(rows) / len(network.blocks) / images,
        }

    def _take(self, guidance: Any) -> None:
        guidance.bind(cast(Any, self.module.ema.module), self.module.objective)
        self.module.guidances, self.module.scored_weights = [guidance], ["ema"]

    def seconds(self, guidances: dict[str, Any]) -> dict[str, list[float]]:
        """Processor time of an image, by guidance and round, in turn."""
        found: dict[str, list[float]] = {name: [] for name in guidances}
        block, classes = self.module.generation_block, cast(Any, self.module.network).num_classes
        labels = [i % classes for i in range(block)]
        for _ in range(ROUNDS):
            for name, guidance in guidances.items():
                self._take(guidance)
                began = time.process_time()
                self.module.generate(list(range(FRESH, FRESH + block)), labels)
                found[name].append((time.process_time() - began) / block)
        return found


def record(run: Path, target: Path, images: int) -> None:
    """Tune, measure and write down one run."""
    measure, built_ones = Measure(run), {"unguided": Unguided()}
    entries = {"unguided": measure(built_ones["unguided"])}
    if run.name.startswith("none-"):
        for name in guidances(run.parent.name):
            result = tuned(run, name, images)
            built_ones[name] = built(result["settings"])
            entries[name] = measure(built_ones[name])
            entries[name] |= {"images": result["images"], "candidates": len(result["candidates"])}
            again = statistics.fmean(entries[name]["distance"])
            said = statistics.fmean(result["fresh"]["winner"])
            if abs(again / said - 1) > 1e-3:
                sys.exit(f"error: {run}: {name} measures {again:.5g}, tuning said {said:.5g}")
    for name, seconds in measure.seconds(built_ones).items():
        entries[name]["seconds"] = seconds
    target.parent.mkdir(exist_ok=True)
    about = {"git_commit": git_commit(), "entries": entries}
    with atomic_write(target) as file:
        file.write(json.dumps(about, indent=1).encode() + b"\n")


def found_of(folder: Path) -> tuple[dict[str, dict[str, Row]], list[str]]:
    """What was measured, by arm and guidance and by training seed; the commits."""
    rows: dict[str, dict[str, Row]] = defaultdict(dict)
    commits = set[str]()
    for path in sorted((folder / "guided").glob("*.json")):
        arm, _, seed = path.stem.rpartition("-")
        about = json.loads(path.read_text())
        commits.add((about["git_commit"] or "unknown")[:7])
        plain = about["entries"]["unguided"]["seconds"]
        for name, entry in about["entries"].items():
            times = zip(entry["seconds"], plain, strict=True)
            rows[f"`{arm}`, {name}"][seed] = Row(
                statistics.fmean(entry["distance"]),
                statistics.fmean(entry["agreement"]),
                entry["evaluations"],
                statistics.median(ours / its for ours, its in times),
                statistics.median(entry["seconds"]),
                entry.get("candidates"),
            )
    order = sorted(rows, key=lambda name: (name != BASE, not name.startswith("`none`")))
    return {name: rows[name] for name in order}, sorted(commits)


def table(folder: Path) -> str:
    """Arms and guidances; means and 95 % t intervals over training seeds."""
    rows, commits = found_of(folder)
    base = rows.get(BASE, {})
    tried = {str(row.candidates) for row in chain(*map(dict.values, rows.values()))} - {"None"}
    seconds = 1000 * statistics.fmean([row.seconds for row in base.values()] or [math.nan])
    lines = [
        "| training, sampling | distance | over that of the first row | prompt followed "
        "| evaluations an image | time |"
    ]
    lines.append("|---" * 6 + "|")
    for name, by_seed in rows.items():
        both = [seed for seed in by_seed if seed in base]
        logs = [math.log(by_seed[seed].distance / base[seed].distance) for seed in both]
        cells = [
            _interval([row.distance for row in by_seed.values()], 2),
            "1" if name == BASE else _interval(logs, 2, math.exp) if logs else "–",
            _interval([row.agreement for row in by_seed.values()], 3),
            f"{statistics.fmean(row.evaluations for row in by_seed.values()):.1f}",
            _interval([row.time for row in by_seed.values()], 2),
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    text = (
        f"Fréchet distance, lower is better, and share of images in which the classifier finds the "
        f"digit of the prompt, of {SETS} sets of fresh seeds; mean and 95 % t interval over "
        f"training seeds {', '.join(sorted(base))}; ratios by training seed, their geometric mean. "
        f"Guidances are the best of {' or '.join(sorted(tried))} candidates each. Evaluations in "
        f"whole networks; processor time over that of unguided sampling of the same run, the "
        f"median of {ROUNDS} rounds in which all take turns, unguided {seconds:.1f} ms. Commit "
        f"{', '.join(commits)}."
    )
    return "\n".join([*lines, "", text]) + "\n"


def _interval(
    values: list[float], decimals: int, of: Callable[[float], float] = lambda value: value
) -> str:
    mean = statistics.fmean(values)
    if len(values) < 2 or len({*values}) == 1:
        return f"{of(mean):.{decimals}f}"
    width = half_width(statistics.stdev(values), len(values))
    low, high = of(mean - width), of(mean + width)
    return f"{of(mean):.{decimals}f} ({low:.{decimals}f} to {high:.{decimals}f})"


def main() -> None:
    """Parse; measure what is left, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", choices=sorted(MOST))
    parser.add_argument("--images", type=int, default=20_000, help="of each tuning")
    parser.add_argument("--seeds", nargs="+", help="of training; all that there are")
    parser.add_argument("--table", action="store_true", help="measure nothing")
    options = parser.parse_args()
    os.chdir(ROOT)
    folder = ROOT / "experiments" / options.study
    for scores in [] if options.table else sorted((folder / "runs").glob("*/scores.json")):
        run = ROOT / "runs" / options.study / scores.parent.name  # one that ran to its end
        target = folder / "guided" / f"{run.name}.json"
        wanted = not options.seeds or run.name.rpartition("-")[2] in options.seeds
        if wanted and not target.is_file():
            record(run, target, options.images)
            print(f"{options.study} {run.name}: recorded", flush=True)
    (folder / "guided.md").write_text(table(folder))


if __name__ == "__main__":
    main()
