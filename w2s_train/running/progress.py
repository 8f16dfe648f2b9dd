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
    """One bar over all optimizer steps, and one per validation or prediction.

    Args:
        every: Optimizer steps between two refreshes; the loss is the one logged last.
        seconds: Where standard output is no terminal, seconds between two lines.
    """

    def __init__(self, every: int = 20, seconds: float = 15.0) -> None:
        super().__init__()
        self.every, self.seconds, self.enabled = every, seconds, True
        self.bar: Bar | None = None

    def disable(self) -> None:
        """Lightning's switch for processes other than the first."""
        self.enabled = False

    def enable(self) -> None:
        """Lightning's switch."""
        self.enabled = True

    # ---- training --------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.task = self._task("train", max(trainer.max_steps, 0) or None, trainer.global_step)
        self.printed = time.monotonic()
        self._start_clock(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step, (begun_step, begun) = trainer.global_step, self.clock
        if not self.enabled or step % self.every or step == begun_step:
            return
        per_second = (step - begun_step) / (time.monotonic() - begun)
        rows = len(batch["label"]) * trainer.world_size * trainer.accumulate_grad_batches
        loss = pl_module.last_metrics.get("train/loss")  # the logged one: no waiting
        shown = "–" if loss is None else f"{loss:.4f}"
        note = f"loss {shown}  {per_second * rows:,.0f} images/s"
        self._start_clock(trainer)
        if self.bar is not None:
            self.bar.update(self.task, completed=step, note=note)
        elif self._is_time():
            last, eta = "", ""
            if trainer.max_steps > 0:
                seconds = (trainer.max_steps - step) / per_second
                last, eta = f"/{trainer.max_steps}", f"  ETA {seconds:.0f} s"
            print(f"step {step}{last}  {note}{eta}", flush=True)

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        if self.bar is not None:
            self.bar.update(self.task, completed=trainer.global_step)
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        self._close()

    # ---- images of this process ------------------------------------------------------------

    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        kind = "predict" if trainer.predicting else "test" if trainer.testing else "val"
        batches = sum(getattr(trainer, f"num_{kind}_batches"))  # infinite where nobody knows
        self.generation = self._task("images", None if batches == math.inf else int(batches))
        self.generation_began = self.printed = time.monotonic()
        self.images = 0

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self.images += len(outputs)
        note = f"{self.images:,} images"
        if self.bar is not None:
            self.bar.update(self.generation, advance=1, note=note)
        elif self.enabled and self._is_time():
            rate = self.images / (time.monotonic() - self.generation_began)
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
        self._start_clock(trainer)

    def on_predict_end(self, trainer: Trainer, pl_module: Any) -> None:
        self._close()

    on_test_start = on_predict_start = on_validation_start
    on_test_batch_end = on_predict_batch_end = on_validation_batch_end
    on_test_end = on_validation_end

    # ---- helpers ---------------------------------------------------------------------------

    def _task(self, name: str, total: int | None, completed: int = 0) -> Any:
        """One more line of the bar, which is opened for the first; None where there is none."""
        if self.bar is None and self.enabled and sys.stdout.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
            self.bar = Bar(*columns, TextColumn("{task.fields[note]}"), TimeRemainingColumn())
            self.bar.start()
        if self.bar is None:
            return None
        return self.bar.add_task(name, total=total, completed=completed, note="")

    def _close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def _start_clock(self, trainer: Trainer) -> None:
        self.clock = (trainer.global_step, time.monotonic())

    def _is_time(self) -> bool:
        """Whether another line is due, which is then printed."""
        now = time.monotonic()
        due = now - self.printed > self.seconds
        self.printed = now if due else self.printed
        return due
