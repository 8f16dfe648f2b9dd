"""Recipes of one network, timed in turn, round after round; see step.py."""

import gc
import random
import statistics
import sys
import time
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from flops import peak_flops, step_flops
from timed import Setting, Timed
from torch._dynamo.utils import counters

from w2s_train.models import DiT

Entry = dict[str, Any]


@dataclass
class Times:
    """What was measured of one recipe."""

    first: float = 0.0  # seconds of the first block
    first_steps: int = 1
    steps: list[float] = field(default_factory=list)  # seconds per step, by round
    recompiles: int = 0
    graph_breaks: int = 0
    peak_memory: int | None = None


def say(message: str) -> None:
    """Progress, beside the table."""
    print(message, file=sys.stderr, flush=True)


def _graphs() -> tuple[int, int]:
    """Graphs compiled and graph breaks so far."""
    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


class Comparison:
    """Recipes of one network in one precision, compiled or not.

    Args:
        setting: What they have in common.
        recipes: The first is the baseline.
        rounds: How many.
        limit: Seconds after which no round begins, if there were three; half of them are for the
            first blocks, and recipes that do not get one are left out. 0 is no limit.
    """

    def __init__(self, setting: Setting, recipes: list[str], rounds: int, limit: float) -> None:
        self.setting, self.rounds, self.limit = setting, rounds, limit
        self.recipes, self.began = recipes, time.monotonic()
        self.name = f"{setting.network} {setting.precision} compile={setting.compile}"
        self.timed: dict[str, Timed] = {}
        self.times: dict[str, Times] = {}

    def _over(self, share: float) -> bool:
        return 0 < self.limit * share < time.monotonic() - self.began

    def warm_up(self) -> None:
        """Build every recipe and take its first steps, which compile and allocate."""
        torch._dynamo.reset()
        for i, recipe in enumerate(self.recipes):
            if i > 1 and self._over(0.5):
                say(f"{self.name}: no time for {', '.join(self.recipes[i:])}: left out")
                return
            say(f"{self.name}: first steps of {recipe}, {i + 1} of {len(self.recipes)}")
            timed, times = Timed(recipe, self.setting), Times()
            if i:
                timed.share(self.timed["none"])
            breaks = _graphs()[1]
            times.first_steps = max(timed.steps, 3 if self.setting.compile else 1)
            times.first = timed.block(times.first_steps)
            times.graph_breaks = _graphs()[1] - breaks
            if i:
                timed.share_optimizer(self.timed["none"])
            times.peak_memory = timed.peak_memory()
            self.timed[recipe], self.times[recipe] = timed, times

    def run(self) -> list[Entry]:
        """Warm up, time round after round, and give what was found."""
        self.warm_up()
        order, began = list(self.timed), time.monotonic()
        for i in range(self.rounds):
            if i >= 3 and self._over(1):
                say(f"{self.name}: no time for more than {i} of {self.rounds} rounds")
                break
            random.Random(i).shuffle(order)  # a drift of the machine favours no recipe
            for recipe in order:
                self._block(recipe)
            left = (time.monotonic() - began) / (i + 1) * (self.rounds - i - 1)
            say(f"{self.name}: round {i + 1} of {self.rounds}, {left:.0f} s left")
        if not all(timed.finite() for timed in self.timed.values()):
            raise SystemExit(f"error: {self.name}: the weights are not finite any more")
        peak = peak_flops(self.setting.device, self.setting.precision)
        return [self._entry(recipe, *peak) for recipe in self.timed]

    def _block(self, recipe: str) -> None:
        timed, times = self.timed[recipe], self.times[recipe]
        graphs, breaks = _graphs()
        times.steps.append(timed.block() / timed.steps)
        times.recompiles += _graphs()[0] - graphs
        times.graph_breaks += _graphs()[1] - breaks

    def _entry(self, recipe: str, peak: float, source: str) -> Entry:
        setting, timed, times = self.setting, self.timed[recipe], self.times[recipe]
        pairs = zip(times.steps, self.times["none"].steps, strict=True)
        fast, seconds, slow = statistics.quantiles(times.steps, n=4)
        low, ratio, high = statistics.quantiles([mine / none for mine, none in pairs], n=4)
        flops = step_flops(cast(DiT, timed.module.network), setting.batch) / seconds
        extra = times.first - times.first_steps * seconds
        return {
            "network": setting.network,
            "recipe": recipe,
            "precision": setting.precision,
            "compile": setting.compile,
            "options": setting.options,
            "batch": setting.batch,
            "seconds": seconds,
            "seconds_quartiles": [fast, slow],
            "ratio": ratio,
            "ratio_quartiles": [low, high],
            "rounds": len(times.steps),
            "steps_per_round": timed.steps,
            "images_per_second": setting.batch / seconds,
            "model_flops_per_second": flops,
            "mfu": flops / peak,
            "peak_flops": peak,
            "peak_source": source,
            "peak_memory_bytes": times.peak_memory,
            "compile_seconds": max(extra, 0.0) if setting.compile else 0.0,
            "recompiles": times.recompiles,
            "graph_breaks": times.graph_breaks,
        }


def measure(setting: Setting, recipes: list[str], rounds: int, limit: float) -> list[Entry]:
    """One comparison; with half the batch for as long as it does not fit the device."""
    while True:
        try:
            return Comparison(setting, recipes, rounds, limit).run()
        except torch.OutOfMemoryError:
            if setting.batch == 1:
                raise
        # Out here nothing holds what was allocated.
        gc.collect()
        torch.cuda.empty_cache()
        say(f"{setting.network}: out of memory with batch {setting.batch}: half of it is taken")
        setting = replace(setting, batch=setting.batch // 2)
