"""Lightning's checkpoints, at optimizer steps only."""

from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint


class StepCheckpoint(ModelCheckpoint):
    """Saves after batches that complete an optimizer step, and after no others.

    With accumulated gradients, Lightning's own saves once more in the middle of the first step
    after a resume. The gradients of half a step are in no checkpoint: what goes on from there has
    lost a batch. Arguments are those of `ModelCheckpoint`.
    """

    step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note where the run stands."""
        super().on_train_start(trainer, pl_module)
        self.step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save, where that is due."""
        if trainer.global_step > self.step:
            self.step = trainer.global_step
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
