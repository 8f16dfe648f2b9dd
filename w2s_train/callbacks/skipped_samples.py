"""Counts and reports samples that could not be read."""

from collections import Counter
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from w2s_train.callbacks.scorer import gather
from w2s_train.errors import UserError

SHOWN = 5  # shards named in a report


class SkippedSamples(Callback):
    """Reports, at the end of each epoch of the data, how many samples of which shard were skipped.

    All processes count together, every ``log_every_n_steps`` steps, and stop together when the
    samples skipped in an epoch exceed the share ``data.max_skipped`` of it. The error comes when
    training has ended, so that the last step is saved.
    """

    def __init__(self) -> None:
        self.epoch = 0
        self.counts: Counter[str] = Counter()  # of this process since `_merge`, by shard
        self.reasons: dict[str, str] = {}  # the first one, by shard
        self.total: Counter[str] = Counter()  # of all processes in this epoch
        self.error = ""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the epoch where the run stands."""
        self.epoch = self._epoch(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count; now and then, compare."""
        for shard, key, reason in batch["skipped"]:
            self.counts[shard] += 1
            self.reasons.setdefault(shard, f"{key}: {reason}")
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return  # gradients of half a step would be lost by a stop
        epoch = self._epoch(trainer, pl_module)
        interval: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if epoch != self.epoch or trainer.global_step % interval == 0:
            self._merge(trainer)
        if self.error:
            trainer.should_stop = True
            trainer.limit_val_batches = 0  # Lightning would validate before it stops
        elif epoch != self.epoch:
            self._report(f"epoch {self.epoch} of the data")
            self.epoch, self.total = epoch, Counter()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report what the last, unfinished epoch has had.

        Raises:
            UserError: It was more than ``data.max_skipped`` allows.
        """
        self._merge(trainer)
        if self.error:
            raise UserError(self.error)
        self._report(f"epoch {self.epoch} of the data, so far")

    def _epoch(self, trainer: Trainer, pl_module: Any) -> int:
        return int(pl_module.images_seen // trainer.datamodule.order.samples)  # type: ignore[attr-defined]

    def _merge(self, trainer: Trainer) -> None:
        shares = gather((self.counts, self.reasons), trainer)
        self.counts = Counter()
        for counts, reasons in shares:
            self.total += counts
            self.reasons = reasons | self.reasons
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        skipped, limit = self.total.total(), data.max_skipped * data.order.samples
        if skipped > limit:
            self.error = (
                f"data.max_skipped={data.max_skipped}: {skipped:,} of {data.order.samples:,} "
                f"samples cannot be read ({self._text()})"
            )

    def _report(self, when: str) -> None:
        if self.total:
            rank_zero_warn(f"{when}: {self.total.total():,} samples skipped ({self._text()})")

    def _text(self) -> str:
        worst = self.total.most_common(SHOWN)
        parts = [f"{n:,} of {shard}, such as {self.reasons[shard]}" for shard, n in worst]
        rest = len(self.total) - len(worst)
        return "; ".join(parts) + (f"; and {rest} more shards" if rest else "")
