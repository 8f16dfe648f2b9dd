"""Times the training step of today's block against that of 2023, at equal parameters.

    python benchmarks/block.py --networks small --compile off,on --rounds 9 --json OUT.json

The step is that of step.py, of plain flow matching. Arms are timed in turn, round after round, in
another order each time; a ratio is the median over rounds of an arm's time over that of the first.
What stands after ``--`` is passed to the command.
"""

import argparse
import random
import statistics
import warnings
from itertools import product
from typing import Any

import torch
from common import about, parse, write_json
from timed import NETWORKS, Setting, Timed

from w2s_train.cli import keep_freed_memory
from w2s_train.command.trainer import quiet_lightning

COMPILE: dict[str, bool | str] = {"off": False, "on": True, "blocks": "blocks"}
ARMS: dict[str, list[str]] = {
    "2023": [],
    "rope": ["rope"],
    "swiglu": ["swiglu"],
    "rmsnorm": ["rmsnorm"],
    "today": ["rope", "swiglu", "rmsnorm"],
    "today+qk_norm": ["rope", "swiglu", "rmsnorm", "qk_norm"],
}


def measure(setting: Setting, arms: dict[str, list[str]], rounds: int) -> list[dict[str, Any]]:
    """Seconds per step of each arm, options of the command, and ratios to the first."""
    timed, steps = dict[str, Timed](), dict[str, list[float]]()
    for name, options in arms.items():
        own = Setting(**(vars(setting) | dict(options=[*setting.options, *options])))
        timed[name], steps[name] = Timed("none", own), []
        timed[name].block(3 if setting.compile else 1)
    first, order = next(iter(arms)), list(arms)
    for i in range(rounds):
        random.Random(i).shuffle(order)
        for name in order:
            steps[name].append(timed[name].block() / timed[name].steps)
    entries = []
    for name in arms:
        pairs = zip(steps[name], steps[first], strict=True)
        low, ratio, high = statistics.quantiles([mine / its for mine, its in pairs], n=4)
        learned = timed[name].module.network.parameters()
        entry: dict[str, Any] = dict(network=setting.network, arm=name)
        entry |= dict(precision=setting.precision)
        entry |= dict(compile=setting.compile, batch=setting.batch, rounds=rounds, ratio=ratio)
        entry |= dict(ratio_quartiles=[low, high], seconds=statistics.median(steps[name]))
        entries.append(entry | dict(parameters=sum(p.numel() for p in learned)))
    return entries


def main() -> None:
    """Measure, print a table, write JSON."""
    lists: dict[str, tuple[str, list[str]]] = {
        "networks": ("small", list(NETWORKS)),
        "arms": ("2023,today", list(ARMS)),
        "precision": ("32-true", ["32-true", "bf16-mixed"]),
        "compile": ("off", list(COMPILE)),
    }
    numbers = {
        "rounds": (9, 3, "of blocks"),
        "batch": (0, 0, "rows; 0 is each network's own"),
        "threads": (1, 1, "on the CPU"),
    }
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("options", nargs="*", help="options of the command, after --")
    args = parse(parser, lists, numbers)
    quiet_lightning()
    keep_freed_memory()
    warnings.filterwarnings("ignore", "The `srun` command is available")
    torch.set_num_threads(args.threads)
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    entries: list[dict[str, Any]] = []
    for name, precision, switch in product(args.networks, args.precision, args.compile):
        network, gpu = NETWORKS[name], device.type == "cuda"
        batch = args.batch or (network.gpu_batch if gpu else network.batch)
        steps = network.gpu_steps if gpu else network.steps
        own = Setting(name, precision, COMPILE[switch], batch, steps, args.options, device)
        switches = {
            arm: [f"--model.network.init_args.{switch}=true" for switch in ARMS[arm]]
            for arm in args.arms
        }
        found = measure(own, switches, args.rounds)
        entries += [entry | about() for entry in found]
        for e in found:
            low, high = e["ratio_quartiles"]
            print(
                f"{name:6} {precision:10} {switch:6} {e['arm']:14} {e['parameters'] / 1e6:8.2f} M "
                f"{1000 * e['seconds']:9.1f} ms  {e['ratio']:.3f} ({low:.3f} to {high:.3f})",
                flush=True,
            )
        if args.json:
            write_json(args.json, entries)


if __name__ == "__main__":
    main()
