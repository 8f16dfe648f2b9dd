"""What the trainer and its callbacks add to a step of the raw loop, in turns in one run.

    python benchmarks/overhead.py [--rounds 200] [--steps 4] [--config CONFIG ...] [--json OUT.json]

"fit" is a step of a real fit with everything that a run has: callbacks, loggers, the guards, the
decision whether to save. "raw" is a loop over the same module and the same stream of data: forward,
backward, optimizer, averages, weak networks. Between two blocks of steps of the fit, the raw loop
takes as many. "cpu" is the time that the main thread had a processor, which other programs of a
shared machine do not lengthen; so is "inside", the milliseconds in the code of each callback, of
the parts of `Run`, of the loggers and of the module's own hooks.
"""

import argparse
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from common import about, parse, synchronize, write_json
from lightning import Callback, Trainer

from w2s_train.command.run import compose
from w2s_train.command.trainer import quiet_lightning
from w2s_train.errors import UserError
from w2s_train.running.run import Run

HOOKS = (
    "on_train_batch_start on_before_zero_grad on_before_backward on_after_backward "
    "on_before_optimizer_step on_train_batch_end"
).split()
MODULE_HOOKS = ("measure", "accept", "configure_gradient_clipping", "on_train_batch_end")
PARTS_OF_RUN = {
    "guard": ("note", "judge", "out_of_patience"),
    "checkpoints": ("wish", "report", "save"),
    "samples": ("note", "too_many"),
    "held_out": ("look",),
    "stop": ("take_time", "wishes"),
    "watch": ("begin", "at"),
    "blow_up": ("look",),
}
PARTS = ("fit", "raw", "difference")
WARM = 3  # blocks that are not counted


class Alternation(Callback):
    """Takes a block of steps in the raw loop after each block of the fit, and times both.

    Args:
        steps: Per block.
    """

    def __init__(self, steps: int) -> None:
        self.steps, self.seen = steps, 0
        self.began = np.zeros(2)
        self.fit: list[Any] = []  # seconds per step, of both clocks, one element a block
        self.raw: list[Any] = []
        self.inside: defaultdict[str, list[float]] = defaultdict(list)
        self.spent: defaultdict[str, float] = defaultdict(float)  # in this block
        self.nested = 0.0  # seconds in what the function at hand calls and is counted itself

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, with its own seconds added up."""

        def run(*arguments: Any, **options: Any) -> Any:
            outer, self.nested = self.nested, 0.0
            began = time.thread_time()
            result = function(*arguments, **options)
            seconds = time.thread_time() - began
            self.spent[name] += seconds - self.nested
            self.nested = outer + seconds
            return result

        return run

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Time what every step calls; get a stream of data for the raw loop."""
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        places: list[tuple[Any, tuple[str, ...]]] = [(pl_module, MODULE_HOOKS)]
        places += [(each, tuple(HOOKS)) for each in callbacks if each is not self]
        (run,) = (each for each in callbacks if isinstance(each, Run))
        places += [(getattr(run, part), names) for part, names in PARTS_OF_RUN.items()]
        places += [(each, ("log_metrics",)) for each in trainer.loggers]
        for place, hooks in places:
            for hook in hooks:
                setattr(place, hook, self.timed(type(place).__name__, getattr(place, hook)))
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        self.batches = iter(data.train_dataloader())

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """After a block of the fit, a block of the raw loop."""
        self.seen += 1
        if self.seen % self.steps:
            return
        if self.seen > self.steps:
            self.fit.append((_clocks() - self.began) / self.steps)
            for name in self.spent.keys() | self.inside.keys():
                self.inside[name].append(self.spent[name] / self.steps)
        began = _clocks()
        for _ in range(self.steps):
            self.raw_step(pl_module, trainer.optimizers[0])
        self.raw.append((_clocks() - began) / self.steps)
        self.spent.clear()
        self.began = _clocks()

    def raw_step(self, module: Any, optimizer: torch.optim.Optimizer) -> None:
        """What a loop without a trainer would do."""
        batch = next(self.batches)
        batch = {k: v.to(module.device) if torch.is_tensor(v) else v for k, v in batch.items()}

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss: torch.Tensor = module.training_step(batch, 0)
            loss.backward()
            module.configure_gradient_clipping(optimizer, module.trainer.gradient_clip_val)
            return loss

        module.optimizer_step(0, 0, optimizer, closure)


def measure(configs: list[str], rounds: int, steps: int) -> dict[str, Any]:
    """Milliseconds per step: medians over rounds, and quartiles of the differences."""
    alternation = Alternation(steps)
    with tempfile.TemporaryDirectory() as folder:
        files = [word for config in configs for word in ("-c", config)]
        command = compose(
            ["fit", *files, "--trainer.default_root_dir", f"{folder}/run"]
            + ["--trainer.max_steps", str((rounds + WARM + 1) * steps + 1)]
            + ["--trainer.val_check_interval", "1000000", "--trainer.callbacks", "null"]
            + ["--checkpoint.every_n_train_steps", "1000000", "--data.num_workers", "0"]
            + ["--trainer.accelerator", "auto", "--trainer.devices", "1"],
            run=False,
        )
        callbacks: list[Callback] = command.trainer.callbacks  # type: ignore[attr-defined]
        callbacks.insert(0, alternation)
        command.trainer.fit(command.model, datamodule=command.datamodule)
    # A block of the fit is compared with the mean of those of the raw loop before and after it.
    fit, raw = 1000 * np.array(alternation.fit[WARM:]), 1000 * np.array(alternation.raw[WARM:])
    differences = fit - (raw[:-1] + raw[1:]) / 2
    times = dict(zip(PARTS, (fit, raw, differences), strict=True))
    inside = {k: 1000 * statistics.mean(v[WARM:]) for k, v in alternation.inside.items()}
    return {
        "configs": configs,
        **{f"{name}_ms": _quartiles(found[:, 0]) for name, found in times.items()},
        **{f"{name}_cpu_ms": _quartiles(found[:, 1]) for name, found in times.items()},
        "inside_cpu_ms": {k: round(v, 4) for k, v in sorted(inside.items(), key=lambda kv: -kv[1])},
        "rounds": len(fit),
        "steps_per_block": steps,
    }


def _clocks() -> Any:
    """Seconds of the clock on the wall, when the device is done, and of this thread."""
    synchronize()
    return np.array([time.perf_counter(), time.thread_time()])


def _quartiles(numbers: Any) -> list[float]:
    return [round(x, 4) for x in statistics.quantiles(numbers.tolist(), n=4)]


def main() -> None:
    """Measure, print, and write if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--config", action="append", help="of the run; may be given again")
    numbers = {
        "rounds": (200, 3, "of blocks"),
        "steps": (4, 1, "per block"),
        "threads": (1, 1, "on the CPU"),
    }
    given = parse(parser, {}, numbers)
    quiet_lightning()
    torch.set_num_threads(given.threads)
    configs = given.config or ["configs/digits_w2s.yaml"]
    try:
        result = measure(configs, given.rounds, given.steps) | about()
    except (UserError, argparse.ArgumentError) as error:
        raise SystemExit(f"error: {' '.join(str(error).split())}") from error
    print("ms per step: lower quartile, median, upper quartile")
    for name in (f"{part}{clock}" for clock in ("_ms", "_cpu_ms") for part in PARTS):
        print(f"  {name:17}", *(f"{x:8.3f}" for x in result[name]))
    print("of that, the mean inside")
    for name, value in result["inside_cpu_ms"].items():
        print(f"  {name:20} {value:8.4f}")
    if given.json:
        write_json(given.json, [result])


if __name__ == "__main__":
    main()
