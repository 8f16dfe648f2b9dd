"""Draws that depend on (seed, rank, batch) alone."""

from typing import Any

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer


class StepSeed(Callback):
    """Reseeds before every training batch, so that a resumed run draws what it would have drawn.

    Different ranks get independent streams (the idea is EDM2's).

    Args:
        seed: Of the run.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Seed the generators of the host and of the module's device."""
        entropy = (self.seed, trainer.global_rank, trainer.fit_loop.total_batch_idx)
        seed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
        # `torch.manual_seed` would format a stack trace for each kind of device that is not in use.
        torch.default_generator.manual_seed(seed)
        if pl_module.device.type != "cpu":
            torch.get_device_module(pl_module.device).manual_seed(seed)
