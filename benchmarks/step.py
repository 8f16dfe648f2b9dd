"""Times the training step of each recipe, as ratios to the baseline's.

    python benchmarks/step.py --networks tiny,s2 --recipes none,sgg_reversed,branch --json OUT.json
    python benchmarks/step.py --networks s2 --precision 32-true,bf16-mixed --compile off,on
    python benchmarks/step.py --networks b2 -- --model.network.init_args.gradient_checkpointing=true

The step is that of the real module, objective and trainer: label dropout, timesteps and noise,
strong and weak passes, backward, clipping, optimizer, averages, weak sources; on random data, past
the start of every schedule, without callbacks. What stands after ``--`` is passed to the command.

All recipes of a network, in one precision, compiled or not, are timed in turn, in one process,
round after round, in another order each time. A ratio is the median over rounds of a recipe's time
over that of ``none`` in the same round; a round is a block of steps of each. ``mfu`` counts what
the baseline needs (see flops.py). ``compile_seconds`` is what a recipe's first block took longer
than those that count, so less where one before it, or the cache on the disk, had compiled the same.
``recompiles`` counts graphs that were compiled after the first block, ``graph_breaks`` all.

Results are written as soon as a network is done in one precision, compiled or not.
"""

import argparse
import logging
import warnings
from itertools import product

import torch
from common import ROOT, about, costs, parse, write_json
from comparison import Entry, measure
from timed import NETWORKS, OWN, Setting

from w2s_train.cli import keep_freed_memory
from w2s_train.command.trainer import quiet_lightning
from w2s_train.errors import UserError

COMPILED = {False: "eager", True: "compiled", "blocks": "blocks"}
PRECISIONS = ("32-true", "bf16-mixed")
COMPILE: dict[str, bool | str] = {"off": False, "on": True, "blocks": "blocks"}


def print_table(entries: list[Entry]) -> None:
    """One line per recipe."""
    for e in entries:
        low, high = e["ratio_quartiles"]
        print(
            f"{e['network']:5} {e['precision']:10} {COMPILED[e['compile']]:8} "
            f"{e['recipe']:17} {1000 * e['seconds']:9.1f} ms  "
            f"{e['ratio']:.3f} ({low:.3f} to {high:.3f})  {e['images_per_second']:7.1f} images/s  "
            f"MFU {100 * e['mfu']:4.1f} %" + costs(e),
            flush=True,
        )


def arguments() -> argparse.Namespace:
    """Those of the command line, checked."""
    known = sorted(path.stem for path in (ROOT / "configs" / "weak").glob("*.yaml"))
    known.append(OWN)
    lists: dict[str, tuple[str, list[str]]] = {
        "networks": ("tiny", list(NETWORKS)),
        "recipes": (",".join(known), known),
        "precision": ("32-true", list(PRECISIONS)),
        "compile": ("off", list(COMPILE)),
    }
    numbers = {
        "rounds": (9, 3, "of blocks"),
        "batch": (0, 0, "rows; 0 is each network's own"),
        "steps": (0, 0, "per block; 0 is each network's own"),
        "threads": (1, 1, "on the CPU"),
        "limit": (0, 0, "seconds for each comparison; 0 is none"),
    }
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("options", nargs="*", help="options of the command, after --")
    args = parse(parser, lists, numbers)
    args.recipes = ["none", *(recipe for recipe in args.recipes if recipe != "none")]
    return args


def settings(args: argparse.Namespace, device: torch.device) -> list[Setting]:
    """Every comparison that was asked for."""
    result = []
    for name, precision, switch in product(args.networks, args.precision, args.compile):
        network, gpu = NETWORKS[name], device.type == "cuda"
        batch = args.batch or (network.gpu_batch if gpu else network.batch)
        steps = args.steps or (network.gpu_steps if gpu else network.steps)
        options = (args.options, device)
        result.append(Setting(name, precision, COMPILE[switch], batch, steps, *options))
    return result


def main() -> None:
    """Measure, print a table, write JSON."""
    args = arguments()
    quiet_lightning()
    keep_freed_memory()  # as the command does
    warnings.filterwarnings("ignore", "The `srun` command is available")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    torch.set_num_threads(args.threads)
    # Past the limit it would go on without compiling, and nobody would know.
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    entries: list[Entry] = []
    for setting in settings(args, device):
        try:
            found = measure(setting, args.recipes, args.rounds, args.limit)
        except (UserError, argparse.ArgumentError) as error:
            raise SystemExit(f"error: {' '.join(str(error).split())}") from error
        entries += [entry | about() for entry in found]
        print_table(found)
        if args.json:
            write_json(args.json, entries)


if __name__ == "__main__":
    main()
