"""Times the training step of each arm of a study, for its comparison at equal time.

    python benchmarks/arms.py digits_backbone --network tiny
    python benchmarks/arms.py cifar10_backbone --network cifar10

The step is that of step.py, on random data of the study's batch. Arms are timed in turn, round
after round, in another order each time; a ratio is the median over rounds of an arm's time over
that of the study's baseline. The study's `timed_as` can give the options that an arm is timed with,
if it looks on at weak sources in training, or name another arm of the same step. Writes
experiments/STUDY/step_time.json, which experiments/remake.py reads, or the file that --json names.
Nothing else may run meanwhile.
"""

import argparse
import sys
import warnings

import torch
from block import measure
from common import ROOT, about, parse, write_json
from timed import NETWORKS, Setting

from w2s_train.cli import keep_freed_memory
from w2s_train.command.trainer import quiet_lightning

sys.path.insert(0, str(ROOT / "experiments"))
import run


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study")
    parser.add_argument("--network", required=True, choices=NETWORKS, help="of the study's command")
    numbers = {"rounds": (9, 3, "of blocks"), "steps": (0, 0, "per block; 0 is the network's own")}
    args = parse(parser, {}, numbers)
    quiet_lightning()
    keep_freed_memory()
    warnings.filterwarnings("ignore", "The `srun` command is available")
    torch.set_num_threads(1)
    about_study = run.load(args.study)
    first = about_study.get("baseline", "none")
    timed_as = about_study.get("timed_as", {})
    words = about_study["arms"] | {name: w for name, w in timed_as.items() if w.startswith("-")}
    same = {name for name, other in timed_as.items() if other in words}
    arms = {name: run.options_of(w, 0) for name, w in words.items() if name not in same}
    arms = {first: arms.pop(first), **arms}
    network, device = NETWORKS[args.network], torch.device("cpu")
    steps = args.steps or network.steps
    setting = Setting(args.network, "32-true", False, 64, steps, [], device)
    found = measure(setting, arms, args.rounds)
    for e in found:
        low, high = e["ratio_quartiles"]
        ratio = f"{e['ratio']:.3f} ({low:.3f} to {high:.3f})"
        print(f"{e['arm']:20} {1000 * e['seconds']:9.1f} ms  {ratio}")
    entries = [{"recipe": entry.pop("arm")} | entry | about() for entry in found]
    write_json(args.json or ROOT / "experiments" / args.study / "step_time.json", entries)


if __name__ == "__main__":
    main()
