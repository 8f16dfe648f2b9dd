"""Times the step with drawn scales against that with fixed ones, at the same rows.

    python benchmarks/drawn.py --networks tiny,s2 --rounds 20 --json OUT.json

Every recipe is timed as it stands and with its scales drawn for every row, in turn, in one process.
A ratio is the median over rounds of the second time over the first of the same round.
"""

import argparse
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from common import ROOT, about, write_json
from timed import NETWORKS, Setting, Timed

RECIPES = ("head_above", "mg", "sgg_paper", "ema")
LAW = "{class_path: w2s_train.inbuilt.UniformScale, init_args: {high: 0.75, plain: 0.0}}"


def drawn(recipe: str) -> list[str]:
    """Options that draw the scales of a recipe's segments."""
    config = yaml.safe_load((ROOT / "configs" / "weak" / f"{recipe}.yaml").read_text())
    segments = range(len(config["model"]["objective"]["init_args"]["segments"]))
    keys = [f"--model.objective.segments.{i}." for i in segments]
    return [o for i, key in enumerate(keys) for o in (f"{key}scale={LAW}", f"{key}name=s{i}")]


def measure(network: str, recipe: str, rounds: int, device: torch.device) -> dict[str, Any]:
    """The ratio of one recipe."""
    size = NETWORKS[network]
    setting = Setting(network, "32-true", False, size.batch, size.steps, [], device)
    pair = [Timed(recipe, setting), Timed(recipe, replace(setting, options=drawn(recipe)))]
    for timed in pair:
        timed.block(2)
    ratios = []
    for i in range(rounds):
        order = pair if i % 2 else pair[::-1]
        seconds = {timed: timed.block() for timed in order}
        ratios.append(seconds[pair[1]] / seconds[pair[0]])
    low, ratio, high = statistics.quantiles(ratios, n=4)
    print(f"{network:5} {recipe:11} {ratio:.3f} ({low:.3f} to {high:.3f})", flush=True)
    return dict(network=network, recipe=recipe, ratio=ratio, quartiles=[low, high], rounds=rounds)


def main() -> None:
    """Measure, print, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--networks", default="tiny", help="tiny, s2, ...")
    parser.add_argument("--recipes", default=",".join(RECIPES))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pairs = [(n, r) for n in args.networks.split(",") for r in args.recipes.split(",")]
    entries = [about() | measure(n, r, args.rounds, device) for n, r in pairs]
    if args.json:
        write_json(args.json, entries)


if __name__ == "__main__":
    main()
