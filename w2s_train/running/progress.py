"""Steps, loss, images per second and remaining time: a bar in a terminal, lines elsewhere."""

import math
import sys
import time
from typing import Any

from lightning import Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.trainer.states import TrainerFn
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar


class Progress(ProgressBar):
    """One bar over all optimizer steps, and one per validation.

    Args:
        every: Optimizer steps between two refreshes; the loss is the one logged last.
        seconds: Where standard output is no terminal, seconds between two lines.
    """

    def __init__(self, every: int = 20, seconds: float = 15.0) -> None:
        super().__init__()
        self.every, self.seconds = every, seconds
        self.enabled = True
        self.bar: Bar | None = None

    def disable(self) -> None:
        """Lightning's switch for processes other than the first."""
        self.enabled = False

    def enable(self) -> None:
        """Lightning's switch."""
        self.enabled = True

    # ---- fit -------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Open the bar at the step where the run stands."""
        self._open()
        self.task = self._task("train", trainer.max_steps, trainer.global_step)
        self._reset_clock(trainer)
        self.printed = time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Refresh."""
        step = trainer.global_step
        if not self.enabled or step % self.every or step == self.clock[0]:
            return
        begun_step, begun = self.clock
        per_second = (step - begun_step) / (time.monotonic() - begun)
        rows = len(batch["label"]) * trainer.world_size * trainer.accumulate_grad_batches
        loss = pl_module.last_metrics.get("train/loss", math.nan)  # the logged one: no waiting
        note = f"loss {loss:.4f}  {per_second * rows:,.0f} images/s"
        self._reset_clock(trainer)
        if self.bar is not None:
            self.bar.update(self.task, completed=step, note=note)
        elif time.monotonic() - self.printed > self.seconds:
            self.printed = time.monotonic()
            remaining = (trainer.max_steps - step) / per_second
            print(f"step {step}/{trainer.max_steps}  {note}  ETA {remaining:.0f} s", flush=True)

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Close the bar."""
        if self.bar is not None:
            self.bar.update(self.task, completed=trainer.global_step)
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        """Give the terminal back."""
        self._close()

    # ---- validate, test, predict -----------------------------------------------------------

    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Open a bar over this rank's images."""
        self._open()
        counts = trainer.num_test_batches if trainer.testing else trainer.num_val_batches
        self._start_generation(sum(counts))

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count the batch."""
        self.images += len(outputs)
        now, note = time.monotonic(), f"{self.images:,} images"
        if self.bar is not None:
            self.bar.update(self.generation, advance=1, note=note)
        elif self.enabled and now - self.printed > self.seconds:
            self.printed = now
            rate = self.images / (now - self.generation_began)
            print(f"{note} on this process, {rate:,.0f} a second", flush=True)

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Say how it went, and go back to training."""
        numbers = {k: v for k, v in pl_module.last_metrics.items() if k.startswith("val/")}
        numbers.pop("val/evaluation_share", None)  # of the evaluation before this one
        scores = "  ".join(f"{name} {value:.4f}" for name, value in numbers.items())
        seconds = time.monotonic() - self.generation_began
        if self.bar is not None:
            self.bar.remove_task(self.generation)
        if self.enabled:
            line = f"step {pl_module.steps_taken}: {scores or 'validated'}  ({seconds:.1f} s)"
            (self.bar.console.print if self.bar else print)(line)
        if trainer.state.fn != TrainerFn.FITTING:
            self._close()
        self._reset_clock(trainer)

    on_test_start = on_validation_start
    on_test_batch_end = on_validation_batch_end
    on_test_end = on_validation_end

    def on_predict_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Open a bar over this rank's images."""
        self._open()
        self._start_generation(sum(trainer.num_predict_batches))

    on_predict_batch_end = on_validation_batch_end

    def on_predict_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Close the bar."""
        self._close()

    # ---- helpers ---------------------------------------------------------------------------

    def _open(self) -> None:
        if self.bar is not None or not self.enabled or not sys.stdout.isatty():
            return
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        self.bar = Bar(*columns, TextColumn("{task.fields[note]}"), TimeRemainingColumn())
        self.bar.start()

    def _close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def _task(self, name: str, total: int | None, completed: int = 0) -> Any:
        if self.bar is None:
            return None
        return self.bar.add_task(name, total=total, completed=completed, note="")

    def _start_generation(self, batches: float) -> None:
        """A stream of unknown length has infinitely many batches."""
        self.generation = self._task("images", None if batches == math.inf else int(batches))
        self.generation_began = self.printed = time.monotonic()
        self.images = 0

    def _reset_clock(self, trainer: Trainer) -> None:
        self.clock = (trainer.global_step, time.monotonic())
