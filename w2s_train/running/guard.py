"""Bad numbers are found before the optimizer uses them, on all processes alike."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from w2s_train.checkpoint_file import damage, newest_first, read_file, step_of
from w2s_train.errors import DIVERGED, Stopped, require
from w2s_train.evaluation.scorer import gather
from w2s_train.optim import Readback
from w2s_train.posthoc.averages import PowerAverages
from w2s_train.running.agreement import Agreement

WINDOW = 100  # good steps that the averages look back; before so many, nothing is a spike
OVERFLOWS = 30  # of float16 in a row, after which the scale cannot be the reason
SHOWN = 3  # samples named on the terminal
NAMES = ("loss", "gradient")
SAVED = ("good", "skipped", "in_a_row", "backs", "good_before")


class Spikes:
    """Running averages of the sizes of several numbers over good steps, kept on the device.

    Args:
        limits: Times its average that make a number bad, one limit each; infinity is never.
    """

    def __init__(self, limits: list[float]) -> None:
        self.limits = torch.tensor(limits)
        self.restore([0.0] * len(limits), 0)

    def restore(self, averages: list[float], good: int) -> None:
        """Go on from averages over ``good`` steps."""
        self.state = torch.tensor([*averages, float(good)])

    def look(self, numbers: Tensor, broken: Tensor) -> tuple[Tensor, Tensor]:
        """Whether the step is good, () bool, and which numbers are spikes, (n,) bool.

        A good step is part of the averages from now on.

        Args:
            numbers: (n,), finite.
            broken: (n,) bool, which of them stand for numbers that are not finite.
        """
        # Moved once; from then on they are where the numbers are.
        state, self.limits = self.state.to(numbers.device), self.limits.to(numbers.device)
        averages, good, sizes = state[:-1], state[-1:], numbers.abs()
        known = averages > 0  # there is no limit to what was 0 so far
        limits = torch.where(known, averages * self.limits, torch.inf)
        spikes = (sizes > limits) & (good >= WINDOW)
        fine = ~(broken | spikes).any()
        # Among the first steps nothing is a spike, and no spike may hide those that come later.
        moved = averages + (torch.minimum(sizes, limits) - averages) / (good + 1).clamp(max=WINDOW)
        self.state = torch.where(fine, torch.cat([moved, good + 1]), state)
        return fine, spikes


@dataclass(frozen=True)
class Judged:
    """A step that was judged."""

    step: int  # counted from 1
    batches: list[tuple[int, int]]  # position in the run and rows of each of its parts


class Guard:
    """Looks at loss and gradient before each optimizer step.

    A step with a number that is not finite, or far above the running averages, is skipped: it
    changes neither weights nor optimizer nor averages nor weak networks nor the statistics that are
    logged. It is counted (``train/skipped_steps``) and recorded in ``bad_steps.jsonl`` of the run
    folder with the samples of its batch. After several in a row, weights, averages, weak networks
    and optimizer go back to the last good checkpoint, while steps and data go on, so that the run
    passes what hurt it (PaLM, Chowdhery et al., 2022, skip batches like this); if that has been
    tried, it ends with status 77.

    A step is judged where the numbers are. On an accelerator the host learns of it one step later,
    so that it never waits: the optimizer passes over a bad step by itself (see `optim`), while
    records, warnings and decisions of all processes are that step late. It waits if patience is 1.

    Args:
        loss_spike: Times the running average that make a loss bad; None is never.
        gradient_spike: The same for the norm of the gradient.
        patience: Bad steps in a row that are skipped before something else is done.
        rollbacks: How often the run goes back before it ends, unless 100 good steps lie between.
        enabled: False looks at nothing.

    Raises:
        UserError: A number out of its range.
    """

    def __init__(
        self,
        loss_spike: float | None = 4.0,
        gradient_spike: float | None = 30.0,
        patience: int = 10,
        rollbacks: int = 1,
        enabled: bool = True,
    ) -> None:
        for name, value in dict(loss_spike=loss_spike, gradient_spike=gradient_spike).items():
            if value is not None:
                require(name, value, "(1, inf)")
        require("patience", patience, "[1, inf)")
        require("rollbacks", rollbacks, "[0, inf)")
        self.spikes = Spikes([limit or math.inf for limit in (loss_spike, gradient_spike)])
        self.patience, self.rollbacks, self.enabled = patience, rollbacks, enabled
        self.agreement = Agreement()  # on more than the step: its numbers travel with the guard's
        self.late = False  # whether the host learns of a step only at the next one
        self.sent: list[tuple[Readback, Judged]] = []  # what it has still to learn
        self.good = self.skipped = self.in_a_row = self.overflows = 0
        self.backs, self.good_before = 0, 0  # how often it went back; good steps before that
        self.batches: list[tuple[int, int]] = []  # position and rows, since the last optimizer step

    def state_dict(self) -> dict[str, Any]:
        """What it has seen."""
        if self.sent:
            self.hear(self.trainer)  # a save stops for the device in any case
        averages = self.spikes.state[:-1].tolist()
        return {"averages": averages} | {name: getattr(self, name) for name in SAVED}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with it."""
        state = dict(state_dict)
        self.spikes.restore(state.pop("averages"), state["good"])
        vars(self).update(state)

    # ---- before the optimizer step ---------------------------------------------------------

    def start(self, trainer: Trainer) -> None:
        """A fit begins."""
        self.trainer = trainer
        # The loss scaler of float16 waits anyway, and the first bad step may be one too many.
        waits = trainer.precision == "16-mixed" or self.patience == 1
        self.late = waits_cost(trainer) and not waits

    def note(self, first: int, rows: int) -> None:
        """The step at hand uses so many samples from this position of the run on."""
        self.batches.append((first, rows))

    def judge(self, trainer: Trainer, loss: Tensor, norm: Tensor) -> bool | Tensor:
        """Whether the step is good: the same answer on all processes; () where the host is late.

        Float16 overflows now and then: the loss scaler skips that step and lowers its scale, which
        is no fault unless it goes on and on.

        Args:
            trainer: The trainer.
            loss: () of this process.
            norm: () of the gradient, which is that of all processes.
        """
        self.hear(trainer)
        pair = torch.stack([loss.float(), norm.float()])
        finite = pair.isfinite()
        numbers = torch.cat([torch.where(finite, pair, 0.0), (~finite).float()])
        sums = self.agreement.settle(numbers)
        means, averages = sums[:2] / trainer.world_size, self.spikes.state[:2].to(loss.device)
        good, spikes = self.spikes.look(means, sums[2:4] > 0)
        good = good | (not self.enabled)
        everything = torch.cat(
            [good[None].float(), pair, means, averages, spikes.float(), sums[2:]]
        )
        judged = Judged(trainer.global_step + 1, self.batches)
        self.sent, self.batches = [*self.sent, (Readback(everything), judged)], []
        return good if self.late else self.hear(trainer)

    def hear(self, trainer: Trainer) -> bool:
        """Learn of the steps that were judged; whether the last one was good."""
        good, (sent, self.sent) = True, (self.sent, [])
        for readback, judged in sent:
            good = self._hear(trainer, readback.take(), judged)
        return good

    def _hear(self, trainer: Trainer, numbers: list[float], judged: "Judged") -> bool:
        good, pair, means, averages = numbers[0], numbers[1:3], numbers[3:5], numbers[5:7]
        self.agreement.decide(numbers)
        spikes, broken = numbers[7:9], numbers[9:11]
        not_finite = [name for name, n in zip(NAMES, broken, strict=True) if n]
        overflow = not_finite == ["gradient"] and trainer.precision == "16-mixed"
        self.overflows = self.overflows + 1 if overflow else 0
        if good:
            self.in_a_row, self.good = 0, self.good + 1
        elif not 0 < self.overflows <= OVERFLOWS:
            reason = f"{' and '.join(not_finite)} not finite" if not_finite else ""
            reason = reason or _explain(means, averages, spikes)
            self._record(trainer, judged, reason, pair)
        return bool(good)

    def _record(self, trainer: Trainer, judged: "Judged", reason: str, pair: list[float]) -> None:
        """Count a bad step, and write down which samples it was made from."""
        self.in_a_row, self.skipped = self.in_a_row + 1, self.skipped + 1
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        samples = [name for first, rows in judged.batches for name in data.names(first, rows)]
        mine = {"rank": trainer.global_rank, "loss": str(pair[0]), "samples": samples}
        everyone = gather(mine, trainer)
        suspects = [each for each in everyone if not math.isfinite(float(each["loss"]))] or everyone
        entry = {"step": judged.step, "reason": reason, "gradient_norm": str(pair[1])}
        if trainer.is_global_zero:
            with open(Path(trainer.default_root_dir) / "bad_steps.jsonl", "a") as file:
                file.write(json.dumps({**entry, "ranks": suspects}) + "\n")
        ranks = ", ".join(str(each["rank"]) for each in suspects)
        some = ", ".join(suspects[0]["samples"][:SHOWN])
        rank_zero_warn(
            f"step {entry['step']} skipped: {reason} (rank {ranks}; samples {some}, ...: "
            "bad_steps.jsonl)"
        )
        module: Any = trainer.lightning_module
        module.record({"train/skipped_steps": self.skipped}, judged.step)

    # ---- after it --------------------------------------------------------------------------

    def out_of_patience(self, trainer: Trainer) -> bool:
        """Whether there were too many bad steps in a row."""
        if self.in_a_row:
            self.hear(trainer)
        return self.in_a_row >= self.patience

    def go_back(self, trainer: Trainer, module: LightningModule) -> None:
        """Go back to the last good checkpoint; all that were begun are on the disk."""
        path = self._last_good(trainer)
        again = self.good < self.good_before + WINDOW
        self.backs = self.backs + 1 if again else 1
        report = f"{self.in_a_row} bad steps in a row until step {trainer.global_step}"
        if not path or self.backs > self.rollbacks:
            raise Stopped(f"{report}; bad_steps.jsonl has their samples", DIVERGED)
        rank_zero_warn(f"{report}: weights go back to those of {path}, steps and data go on")
        self.good_before, self.in_a_row = self.good, 0
        folder = Path(trainer.default_root_dir)
        _load(trainer, module, read_file(folder / path))

    def _last_good(self, trainer: Trainer) -> str:
        """The newest checkpoint that is whole, relative to the run folder; "" if there is none.

        One that was saved among the bad steps has the weights that may be their reason; one of a
        later step is of a part of the run that was given up by going on from before it.
        """
        folder, found = Path(trainer.default_root_dir), ""
        if trainer.is_global_zero:
            steps = range(trainer.global_step - self.in_a_row + 1)
            files = newest_first(folder / "checkpoints")
            good = (path for path in files if step_of(path) in steps and not damage(path))
            found = str(first.relative_to(folder)) if (first := next(good, None)) else ""
        return trainer.strategy.broadcast(found)


def _explain(means: list[float], averages: list[float], spikes: list[float]) -> str:
    """Which numbers are spikes, and over what."""
    found = zip(("loss", "gradient norm"), means, averages, spikes, strict=True)
    reasons = [
        f"{n} {x:.4g} is {abs(x) / a:.1f} times the {a:.4g}" for n, x, a, is_one in found if is_one
    ]
    return f"{'; '.join(reasons)} of the running average"


def waits_cost(trainer: Trainer) -> bool:
    """Whether the device works on while the host goes ahead."""
    return trainer.strategy.root_device.type == "cuda"


def _load(trainer: Trainer, module: LightningModule, content: dict[str, Any]) -> None:
    """Weights, averages, weak networks and optimizers of a checkpoint; settings as they are now."""
    module.load_state_dict(content["state_dict"])
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, PowerAverages):
            callback.go_back(trainer, content)
    for optimizer, state in zip(trainer.optimizers, content["optimizer_states"], strict=True):
        settings = [
            {name: value for name, value in group.items() if name != "params"}
            for group in optimizer.param_groups
        ]
        optimizer.load_state_dict(state)
        for group, now in zip(optimizer.param_groups, settings, strict=True):
            group.update(now)
