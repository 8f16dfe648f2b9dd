"""Signals and the time limit end a run at one step of all processes, with a checkpoint."""

import signal
import time
from datetime import timedelta
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.utilities import rank_zero_info

from w2s_train.errors import INTERRUPTED, PREEMPTED, Stopped, UserError
from w2s_train.evaluation.scorer import ResumableEvaluation, callbacks_of
from w2s_train.running.agreement import Agreement
from w2s_train.running.checkpoints import Checkpoints, validation_follows
from w2s_train.signals import PREEMPTION, REQUESTS


class GracefulStop(Callback):
    """SIGUSR1, SIGTERM, SIGINT and the time limit set a flag; all processes look at it together.

    Training ends after the step at hand, with a checkpoint. An evaluation is left after the batch
    at hand: what it has so far is kept, and the next start goes on with it. A second SIGINT
    interrupts at once.

    Args:
        agreement: Shared with the guard.
        max_time: Of this start (DD:HH:MM:SS), counted from the beginning of the process; None is
            no limit. The run ends early enough to save: by twice what a save has taken so far and
            three steps.
    """

    def __init__(
        self, agreement: Agreement, max_time: str | timedelta | dict[str, int] | None = None
    ) -> None:
        self.agreement = agreement
        self.limit = Timer(max_time).time_remaining()  # which reads it; nothing was used up yet
        if self.limit is not None and self.limit <= 0:
            raise UserError(f"trainer.max_time={max_time}: must be longer than nothing")
        self.status = 0  # with which the command ends
        self.steps = 0  # before the batch at hand
        self.longest, self.begun = 0.0, 0.0  # seconds of a step or batch, and when this one began

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Listen; the command has done so before, but for SIGINT.

        What only writes images has nothing to save, and ends at once.
        """
        if stage != "predict":
            REQUESTS.listen(signal.SIGINT, *PREEMPTION)
            self.agreement.look = lambda: self._wish(trainer)

    # ---- training --------------------------------------------------------------------------

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Measure steps."""
        self._take_time()
        self.steps = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop if any process was asked to."""
        accumulating = trainer.global_step == self.steps  # its gradients would be lost
        if accumulating or not self.agreement.stop:
            return
        self._stop(interrupted=not self.agreement.decided["preempt"])
        if validation_follows(trainer, batch_idx):
            return  # it is begun, and left: the next start finds it under way
        trainer.should_stop = True
        trainer.fit_loop.min_epochs, trainer.fit_loop.epoch_loop.min_steps = 0, None  # not now
        trainer.limit_val_batches = 0  # Lightning would validate before it stops

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say how to go on."""
        if self.status:
            rank_zero_info(f"stopped at step {trainer.global_step}; continue with --ckpt_path last")

    # ---- evaluation ------------------------------------------------------------------------

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure batches."""
        self.begun = 0.0

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Leave if this process was asked to; the others do so at their next batch, or at the end.

        Raises:
            Stopped: What there is so far has been kept.
        """
        self._take_time()
        asked = REQUESTS.preempted or REQUESTS.interrupted or self._time_is_up(trainer)
        if self.status or asked:
            self._leave_together(trainer)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave with those that were asked to before they had finished.

        Raises:
            Stopped: What there is so far has been kept.
        """
        self._leave_together(trainer)

    on_test_start = on_validation_start
    on_test_batch_end = on_validation_batch_end
    on_test_epoch_end = on_validation_epoch_end

    def _leave_together(self, trainer: Trainer) -> None:
        """The first collective after the batches, for those that leave and those that do not."""
        nothing = torch.zeros(0, device=trainer.strategy.root_device)
        self.agreement.decide(self.agreement.settle(nothing).tolist())
        if self.agreement.stop:
            self._stop(interrupted=not self.agreement.decided["preempt"])
        if not self.status:
            return
        for evaluation in callbacks_of(trainer, ResumableEvaluation):
            evaluation.save(trainer)
        for checkpoints in callbacks_of(trainer, Checkpoints):
            checkpoints.finish(trainer)
        raise Stopped("in the middle of an evaluation; the next start goes on with it", self.status)

    def _wish(self, trainer: Trainer) -> None:
        self.agreement.wishes["preempt"] = REQUESTS.preempted or self._time_is_up(trainer)
        self.agreement.wishes["interrupt"] = REQUESTS.interrupted

    # ---- time ------------------------------------------------------------------------------

    def _stop(self, *, interrupted: bool) -> None:
        self.status = INTERRUPTED if interrupted else PREEMPTED

    def _take_time(self) -> None:
        now = time.monotonic()
        if self.begun:
            self.longest = max(self.longest, now - self.begun)
        self.begun = now

    def _time_is_up(self, trainer: Trainer) -> bool:
        if self.limit is None:
            return False
        saving = max((each.seconds for each in callbacks_of(trainer, Checkpoints)), default=0.0)
        left = self.limit - (time.monotonic() - REQUESTS.started)
        return left < 2 * saving + 3 * self.longest
