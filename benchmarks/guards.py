"""What everything that guards a run costs per step, switched on and off in turns in one run.

    python benchmarks/guards.py [--rounds 600] [--steps 2] [--output benchmarks/guards.json]

Guards are: the look at loss and gradient before each step, the flag for signals and the time limit,
the watch over other processes, and the decision whether to save. "in_guards_ms" is the time inside
their code, which noise blurs less than the difference of steps. The step is that of
configs/digits_w2s.yaml on one process. Both kinds of blocks compute and log the same gradient norm.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from w2s_train.callbacks import Checkpoints, GracefulStop, Guard, Position
from w2s_train.callbacks.run_record import git_commit
from w2s_train.command import compose

GUARDS = (Checkpoints, GracefulStop, Guard, Position)
HOOKS = "on_train_batch_start on_before_backward on_after_backward on_train_batch_end".split()


class Switch(Callback):
    """Takes the guards out of the trainer in every other block of steps, and times steps.

    Args:
        steps: Per block.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.on = True
        self.blocks: dict[bool, list[float]] = {True: [], False: []}
        self.times: list[float] = []
        self.begun = 0.0
        self.inside = 0.0  # seconds in the guards' own code, in this block
        self.spent: list[float] = []

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, with its seconds added up."""

        def run(*arguments: Any) -> Any:
            begun = time.perf_counter()
            result = function(*arguments)
            self.inside += time.perf_counter() - begun
            return result

        return run

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Note both states."""
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        without = [each for each in callbacks if not isinstance(each, GUARDS)]
        self.callbacks = {True: callbacks, False: without}
        for each in set(callbacks) - set(without):
            for hook in HOOKS:
                setattr(each, hook, self.timed(getattr(each, hook)))
        self.judges = {True: self.timed(pl_module.judge), False: lambda loss, norm: True}

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Time the step before this one; switch at the end of a block."""
        now = time.perf_counter()
        if self.begun:
            self.times.append(now - self.begun)
        if len(self.times) == self.steps:
            self.blocks[self.on].append(statistics.median(self.times))
            if self.on:
                self.spent.append(self.inside / self.steps)
            self.inside = 0.0
            self.on, self.times = not self.on, []
            trainer.callbacks = self.callbacks[self.on]  # type: ignore[attr-defined]
        pl_module.judge = self.judges[self.on]
        self.begun = time.perf_counter()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave everything as it was found."""
        trainer.callbacks = self.callbacks[True]  # type: ignore[attr-defined]


def measure(rounds: int, steps: int) -> dict[str, Any]:
    """Milliseconds of a step with and without the guards, and quartiles of what they cost."""
    switch = Switch(steps)
    with tempfile.TemporaryDirectory() as folder:
        command = compose(
            ["fit", "-c", "configs/digits_w2s.yaml", "--trainer.default_root_dir", f"{folder}/run"]
            + ["--trainer.max_steps", str((2 * rounds + 1) * steps)]
            + ["--trainer.val_check_interval", "1000000", "--trainer.callbacks", "null"]
            + ["--checkpoint.every_n_train_steps", "1000000"],
            run=False,
        )
        callbacks: list[Callback] = command.trainer.callbacks  # type: ignore[attr-defined]
        callbacks.insert(0, switch)
        command.trainer.fit(command.model, datamodule=command.datamodule)
    pairs = list(zip(switch.blocks[True][1:], switch.blocks[False][1:], strict=False))
    costs = [1000 * (on - off) for on, off in pairs]
    shares = [on / off - 1 for on, off in pairs]
    return {
        "step_ms": {"on": _ms(on for on, _ in pairs), "off": _ms(off for _, off in pairs)},
        "cost_ms": [round(x, 4) for x in statistics.quantiles(costs, n=4)],
        "in_guards_ms": _ms(switch.spent),
        "cost_share": [round(x, 5) for x in statistics.quantiles(shares, n=4)],
        "rounds": len(pairs),
        "steps_per_block": steps,
        "commit": git_commit(),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _ms(seconds: Any) -> float:
    return round(1000 * statistics.median(seconds), 3)


def main() -> None:
    """Measure, print, and write if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=600)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    result = json.dumps(measure(given.rounds, given.steps), indent=1)
    print(result)
    if given.output:
        given.output.write_text(result + "\n")


if __name__ == "__main__":
    main()
