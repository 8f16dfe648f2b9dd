"""Signals and the time limit ask a run to stop: why, and with which status it ends."""

import signal
import time
from datetime import timedelta

from lightning import Trainer
from lightning.pytorch.callbacks import Timer

from w2s_train.errors import INTERRUPTED, PREEMPTED, UserError
from w2s_train.signals import PREEMPTION, REQUESTS


class Stop:
    """SIGUSR1, SIGTERM, SIGINT and the time limit set a flag; all processes look at it together.

    Training ends after the step at hand (on an accelerator after the next), with a checkpoint. An
    evaluation is left after the batch at hand: what it has so far is kept, and the next start goes
    on with it. A second SIGINT interrupts at once.

    Args:
        max_time: Of this start (DD:HH:MM:SS), counted from the beginning of the process; None is
            no limit. The run ends early enough to save: by twice what a save has taken so far and
            three steps.

    Raises:
        UserError: No time at all.
    """

    def __init__(self, max_time: str | timedelta | dict[str, int] | None = None) -> None:
        self.limit = Timer(max_time).time_remaining()  # which reads it; nothing was used up yet
        if self.limit is not None and self.limit <= 0:
            raise UserError(f"trainer.max_time={max_time}: must be longer than nothing")
        self.status = 0  # with which the command ends
        self.longest, self.begun = 0.0, 0.0  # seconds of a step or batch, and when this one began

    def listen(self) -> None:
        """Note signals; the command has done so before, but for SIGINT."""
        REQUESTS.listen(signal.SIGINT, *PREEMPTION)

    def take_time(self) -> None:
        """A step or a batch of an evaluation ends, and another one begins."""
        now = time.monotonic()
        if self.begun:
            self.longest = max(self.longest, now - self.begun)
        self.begun = now

    def forget_time(self) -> None:
        """What comes next is no step: an evaluation."""
        self.begun = 0.0

    def wishes(self, saving: float) -> dict[str, bool]:
        """What this process was asked for.

        Args:
            saving: Seconds that a save takes.
        """
        passed, limit = time.monotonic() - REQUESTS.started, self.limit
        time_is_up = limit is not None and limit - passed < 2 * saving + 3 * self.longest
        return {"preempt": REQUESTS.preempted or time_is_up, "interrupt": REQUESTS.interrupted}

    def decide(self, *, preempt: bool) -> None:
        """All processes end: preempted, or interrupted."""
        self.status = PREEMPTED if preempt else INTERRUPTED

    @staticmethod
    def end_training(trainer: Trainer) -> None:
        """Have Lightning end after this batch, whatever keeps it, and without an evaluation."""
        trainer.should_stop = True
        trainer.fit_loop.min_epochs, trainer.fit_loop.epoch_loop.min_steps = 0, None
        trainer.limit_val_batches = 0  # Lightning would validate before it stops
