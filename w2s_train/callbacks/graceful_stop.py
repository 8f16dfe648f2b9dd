"""A fit ends with a checkpoint, and Ctrl-C ends it at a step boundary."""

import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from w2s_train.errors import INTERRUPTED, PREEMPTED, UserError


class GracefulStop(Callback):
    """The first SIGINT sets a flag; a second one interrupts at once.

    All processes look at the flag together, every ``every`` batches, so that they stop at the same
    step. Every end of training writes ``checkpoints/last.ckpt``. A validation under way is finished
    first.

    Args:
        every: Batches between two looks; each look is a collective.

    Raises:
        UserError: ``every`` below 1.
    """

    def __init__(self, every: int = 10) -> None:
        if every < 1:
            raise UserError(f"every={every}: must be at least 1")
        self.every = every
        self.requested = self.stopped = False
        self.status = PREEMPTED

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Install the handler; only a main thread may."""
        if threading.current_thread() is threading.main_thread():
            self.previous = signal.signal(signal.SIGINT, self._request)
            signal.signal(signal.SIGUSR1, self._request)
            signal.signal(signal.SIGTERM, self._request)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the earlier handler back."""
        if hasattr(self, "previous"):
            signal.signal(signal.SIGINT, self.previous)

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        if number == signal.SIGINT:
            self.status = INTERRUPTED
        self.requested = True
        rank_zero_info("\nstopping after this step; press Ctrl-C again to stop at once")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop if any process was asked to."""
        if trainer.world_size > 1 and (batch_idx + 1) % self.every:
            return
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return  # gradients of half a step would be lost
        if not trainer.strategy.reduce_boolean_decision(self.requested, all=False):
            return
        self.stopped = trainer.should_stop = True
        trainer.limit_val_batches = 0  # Lightning would validate before it stops

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save where training ended, stopped or not: the last step is rarely a round one."""
        path = Path(trainer.default_root_dir) / "checkpoints" / "last.ckpt"
        trainer.save_checkpoint(path, weights_only=False)
        if self.stopped:
            rank_zero_info(f"stopped at step {trainer.global_step}; continue with --ckpt_path last")
