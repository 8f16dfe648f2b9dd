"""Times sampling and evaluation, as ratios to eager sampling.

    python benchmarks/sample.py --networks tiny,s2 --samplers euler,heun --json OUT.json
    python benchmarks/sample.py --networks b2 --precision 32-true,bf16-mixed --compile off,on

Images come from the real module, sampler and guidance, of untrained weights, a block of them at a
time. All variants of a network are timed in turn, in one process, round after round. ``ratio`` is
the median over rounds of a variant's time over that of the same sampler and guidance, eager in
32-true, in the same round; ``ratio_precision`` is over eager in the same precision. Ratios do not
depend on ``--steps``, images per second do. ``evaluations`` are passes of the network per image.
``recompiles`` counts graphs that were compiled after the first block, ``graph_breaks`` all.

``--evaluation`` adds what each image of an evaluation of configs/digits_w2s.yaml costs: generation,
features, their sums; and the distance at the end.
"""

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import yaml
from common import OVERLAYS, ROOT, about, costs, parse, synchronize, write_json
from evaluation import DIGITS, evaluation
from torch._dynamo.utils import counters

from w2s_train.cli import keep_freed_memory
from w2s_train.command.run import compose
from w2s_train.command.trainer import quiet_lightning
from w2s_train.interpolant import LinearInterpolant
from w2s_train.models import DiT
from w2s_train.module import DiffusionModule
from w2s_train.sampler import Euler, EulerMaruyama, Heun, Sampler

BLOCKS = {"tiny": 64, "s2": 8, "b2": 4, "l2": 4, "xl2": 2}  # images in a block on a CPU
ON_GPU = 125  # images in a block, the module's default
SAMPLERS: dict[str, Callable[[int], Sampler]] = {
    "euler": Euler,
    "heun": Heun,
    "maruyama": lambda steps: EulerMaruyama(LinearInterpolant(), steps),
}
# Overlays of configs/guidance that need no file of their own.
GUIDANCES = ("none", "cfg", "autoguidance", "segmented", "adg", "tv_cfg")
PRECISIONS = ("32-true", "bf16-mixed")
EAGER = {"off": True, "on": False}


@dataclass(frozen=True)
class Variant:
    """One way to make images."""

    sampler: str
    guidance: str
    precision: str
    eager: bool


def modules(network: str, args: argparse.Namespace) -> list[DiffusionModule]:
    """Two modules of the same weights with the guidances that are timed; one will be compiled."""
    block = args.batch or (ON_GPU if torch.cuda.is_available() else BLOCKS[network])
    parts = [{"class_path": "w2s_train.guidance.Unguided"}]
    for name in args.guidances[1:]:
        text = (ROOT / "configs" / "guidance" / f"{name}.yaml").read_text()
        parts.append(yaml.safe_load(text)["model"]["guidance"])
    files = ["-c", DIGITS]
    if overlay := OVERLAYS.get(network):
        files += ["-c", str(ROOT / "configs" / "network" / f"{overlay}.yaml")]
        files += ["--model.network.init_args.input_size=32"]
        files += ["--model.network.init_args.in_channels=4"]
    found = list[DiffusionModule]()
    for switch in ("false", "true"):
        options = [f"--model.guidance={json.dumps(parts)}", f"--model.generation_block={block}"]
        options += [f"--model.compile={switch}", "--trainer.callbacks=null"]
        command = compose(["fit", *files, *options], run=False)
        found.append(command.model.to("cuda" if torch.cuda.is_available() else "cpu").eval())
    for mine, theirs in zip(*(module.parameters() for module in found), strict=True):
        mine.data = theirs.data  # all fit on one device
    return found


class Timed:
    """The variants of one network.

    Args:
        network: Its name.
        args: Of the command line.
    """

    def __init__(self, network: str, args: argparse.Namespace) -> None:
        self.network, self.args = network, args
        eager, compiled = modules(network, args)
        self.modules: dict[bool, DiffusionModule] = {True: eager, False: compiled}
        self.counted: dict[tuple[str, str], float] = {}
        for sampler, guidance in itertools.product(args.samplers, args.guidances):
            self.counted[sampler, guidance] = self._evaluations(sampler, guidance)
        compiled.setup("validate")  # compiles
        asked = itertools.product(args.samplers, args.guidances, args.precision, args.compile)
        self.variants = [Variant(s, g, p, EAGER[switch]) for s, g, p, switch in asked]

    def reference(self, variant: Variant, precision: str) -> Variant:
        """What a variant is compared with."""
        return replace(variant, precision=precision, eager=True)

    def block(self, variant: Variant) -> float:
        """Seconds of a block of images."""
        module = self.modules[variant.eager]
        module.sampler = SAMPLERS[variant.sampler](self.args.steps)
        seeds = list(range(module.generation_block))
        labels = [seed % module.network.null_class for seed in seeds]
        kind = module.device.type
        synchronize()
        began = time.perf_counter()
        with torch.autocast(kind, torch.bfloat16, enabled=variant.precision == "bf16-mixed"):
            module.generate(seeds, labels, self.args.guidances.index(variant.guidance))
        synchronize()
        return time.perf_counter() - began

    def _evaluations(self, sampler: str, guidance: str) -> float:
        """Passes per image; counted before anything is compiled."""
        module, rows = self.modules[True], 0
        networks = [part for part in module.modules() if isinstance(part, DiT)]

        def count(network: Any, inputs: tuple[Any, ...]) -> None:
            nonlocal rows
            rows += len(inputs[0])

        hooks = [network.register_forward_pre_hook(count) for network in networks]
        self.block(Variant(sampler, guidance, "32-true", True))
        for hook in hooks:
            hook.remove()
        return rows / module.generation_block

    def measure(self) -> list[dict[str, Any]]:
        """All variants, and those that they are compared with."""
        references = [
            self.reference(variant, precision)
            for variant in self.variants
            for precision in ("32-true", variant.precision)
        ]
        everything = list(dict.fromkeys([*self.variants, *references]))
        first = {variant: self._first(variant) for variant in everything}
        graphs = counters["stats"]["unique_graphs"]
        times: dict[Variant, list[float]] = {variant: [] for variant in everything}
        for i in range(self.args.rounds):
            print(f"{self.network}: round {i + 1} of {self.args.rounds}", flush=True)
            for variant in everything if i % 2 else reversed(everything):
                times[variant].append(self.block(variant))
        recompiles = counters["stats"]["unique_graphs"] - graphs
        return [self._entry(v, times, first[v], recompiles) for v in self.variants]

    def _first(self, variant: Variant) -> tuple[float, int | None]:
        """Seconds of the first block, which compiles, and bytes that a second one takes at most."""
        seconds = self.block(variant)
        if not torch.cuda.is_available():
            return seconds, None
        torch.cuda.reset_peak_memory_stats()
        self.block(variant)
        return seconds, torch.cuda.max_memory_allocated()

    def _entry(
        self,
        variant: Variant,
        times: dict[Variant, list[float]],
        first: tuple[float, int | None],
        recompiles: int,
    ) -> dict[str, Any]:
        mine, n = times[variant], self.modules[True].generation_block
        ratios = {
            name: [a / b for a, b in zip(mine, times[self.reference(variant, of)], strict=True)]
            for name, of in (("ratio", "32-true"), ("ratio_precision", variant.precision))
        }
        quartiles = {name: statistics.quantiles(found, n=4) for name, found in ratios.items()}
        seconds = statistics.median(mine)
        evaluations = self.counted[variant.sampler, variant.guidance]
        return {
            "network": self.network,
            "sampler": variant.sampler,
            "guidance": variant.guidance,
            "precision": variant.precision,
            "compile": not variant.eager,
            "batch": n,
            "steps": self.args.steps,
            "evaluations": evaluations,
            "seconds": seconds,
            "seconds_quartiles": statistics.quantiles(mine, n=4)[::2],
            **{name: found[1] for name, found in quartiles.items()},
            **{f"{name}_quartiles": found[::2] for name, found in quartiles.items()},
            "images_per_second": n / seconds,
            "evaluations_per_second": n * evaluations / seconds,
            "peak_memory_bytes": first[1],
            "compile_seconds": 0.0 if variant.eager else max(0.0, first[0] - seconds),
            "recompiles": recompiles,
            "graph_breaks": sum(counters["graph_break"].values()),
            "rounds": self.args.rounds,
        }


def print_table(entries: list[dict[str, Any]]) -> None:
    """One line per variant."""
    for e in entries:
        if "part" in e:
            parts = [f"{part} {e[f'{part}_ms']:.4f}" for part in ("generation", "features", "sums")]
            print(
                f"evaluation of digits, ms per image: {', '.join(parts)}; distance "
                f"{e['distance_ms']:.2f} ms; {e['images_per_second']:.0f} images/s"
            )
            continue
        low, high = e["ratio_quartiles"]
        print(
            f"{e['network']:5} {e['sampler']:9} {e['guidance']:13} {e['precision']:10} "
            f"{'compiled' if e['compile'] else 'eager':8} {e['images_per_second']:9.2f} images/s  "
            f"{e['evaluations']:5.1f} evaluations  {e['ratio']:.3f} ({low:.3f} to {high:.3f})  "
            f"{e['ratio_precision']:.3f} of its precision" + costs(e)
        )


def arguments() -> argparse.Namespace:
    """Those of the command line, checked."""
    lists: dict[str, tuple[str, Any]] = {
        "networks": ("tiny", BLOCKS),
        "samplers": ("euler", SAMPLERS),
        "guidances": ("none", GUIDANCES),
        "precision": ("32-true", PRECISIONS),
        "compile": ("off", EAGER),
    }
    numbers = {
        "rounds": (9, 3, "of blocks"),
        "steps": (4, 2, "of the solver"),
        "batch": (0, 0, "images in a block; 0 is each network's own"),
        "threads": (1, 1, "on the CPU"),
    }
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--evaluation", action="store_true", help="of the digits, too")
    args = parse(parser, lists, numbers)
    args.guidances = ["none", *(name for name in args.guidances if name != "none")]
    return args


def main() -> None:
    """Measure, print a table, write JSON."""
    args = arguments()
    quiet_lightning()
    keep_freed_memory()  # as the command does
    torch.set_num_threads(args.threads)
    entries: list[dict[str, Any]] = []
    for network in args.networks:
        entries += Timed(network, args).measure()
        if args.json:
            write_json(args.json, [entry | about() for entry in entries])
    if args.evaluation:
        entries.append(evaluation(args.rounds))
    print_table(entries)
    if args.json:
        write_json(args.json, [entry | about() for entry in entries])


if __name__ == "__main__":
    main()
