"""Times the step with REPA or iREPA on stored tokens against that without.

    python benchmarks/align.py --networks small --rounds 20 --json OUT.json

A recipe is timed as it stands and with a term of each overlay of configs/align, in turn, in one
process; tokens of 768 numbers, as many as the network's, come with the batch (reading them from
disk is no part of it). A ratio is the median over rounds of the second time over the first of the
same round.
"""

import argparse
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import ROOT, about, write_json
from timed import NETWORKS, Setting, Timed

from w2s_train.command.trainer import quiet_lightning

KINDS = ("repa", "irepa")
WIDTH = 768  # of DINOv2-B's tokens


def with_tokens(recipe: str, setting: Setting, kind: str) -> Timed:
    """The recipe with a term, and a batch that brings tokens along."""
    depth = "--model.objective.align.0.block=null"  # the end of the first third, in any network
    overlay = ["-c", str(ROOT / "configs" / "align" / f"{kind}.yaml"), depth]
    timed = Timed(recipe, replace(setting, options=overlay))
    network: Any = timed.module.network
    tokens = (network.input_size // network.patch_size) ** 2
    timed.batch["tokens"] = torch.randn(setting.batch, tokens, WIDTH, device=timed.device).half()
    return timed


def measure(
    network: str, recipe: str, rounds: int, rows: int, device: torch.device
) -> list[dict[str, Any]]:
    """The ratios of one recipe."""
    size, gpu = NETWORKS[network], device.type == "cuda"
    batch, steps = (size.gpu_batch, size.gpu_steps) if gpu else (size.batch, size.steps)
    precision = "bf16-mixed" if gpu else "32-true"
    batch = rows or batch
    setting = Setting(network, precision, gpu, batch, steps, [], device)
    timed = {"none": Timed(recipe, setting)}
    timed |= {kind: with_tokens(recipe, setting, kind) for kind in KINDS}
    for each in timed.values():
        each.block(2)
    ratios: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for i in range(rounds):
        order = list(timed)[i % 3 :] + list(timed)[: i % 3]
        seconds = {name: timed[name].block() for name in order}
        for kind in KINDS:
            ratios[kind].append(seconds[kind] / seconds["none"])
    entries = []
    for kind, found in ratios.items():
        low, ratio, high = statistics.quantiles(found, n=4)
        print(f"{network:5} {recipe:11} {kind:5} {ratio:.3f} ({low:.3f} to {high:.3f})", flush=True)
        entry = dict(network=network, recipe=recipe, term=kind, ratio=ratio, batch=batch)
        entries.append(entry | dict(quartiles=[low, high], rounds=rounds, precision=precision))
    return entries


def main() -> None:
    """Measure, print, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--networks", default="small", help="small, s2, b2, ...")
    parser.add_argument("--recipes", default="none,head_above")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--batch", type=int, default=0, help="rows; 0 is the network's own")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    quiet_lightning()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pairs = [(n, r) for n in args.networks.split(",") for r in args.recipes.split(",")]
    entries = [
        about() | e for n, r in pairs for e in measure(n, r, args.rounds, args.batch, device)
    ]
    if args.json:
        write_json(args.json, entries)


if __name__ == "__main__":
    main()
