"""Of the samples of a run: which could not be read, and what is drawn along with the others."""

import itertools
from collections import Counter
from typing import Any

import numpy as np
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from w2s_train.errors import UserError
from w2s_train.evaluation.scorer import gather
from w2s_train.secrets import redacted
from w2s_train.shards.dataset import Skipped

SHOWN = 5  # shards named in a report


def reseed(seed: int, rank: int, batch: int, device: torch.device) -> None:
    """Seed the generators of host and device, so that draws depend on (seed, rank, batch) alone.

    A resumed run then draws what it would have drawn; ranks have independent streams (the idea is
    EDM2's).

    Args:
        seed: Of the run.
        rank: Of this process.
        batch: Training batches before this one.
        device: Of the module.
    """
    number = int(np.random.SeedSequence((seed, rank, batch)).generate_state(1)[0])
    # `torch.manual_seed` would format a stack trace for each kind of device that is not in use.
    torch.default_generator.manual_seed(number)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(number)


class SkippedSamples:
    """Reports, at the end of each epoch of the data, how many samples of which shard were skipped.

    All processes count together, every ``log_every_n_steps`` steps, and stop together when the
    samples skipped in an epoch exceed the share ``data.max_skipped`` of it. The error comes when
    training has ended, so that the last step is saved.
    """

    def __init__(self) -> None:
        self.epoch = 0
        self.new: list[Skipped] = []  # of this process, since the last `merge`
        self.counts: Counter[tuple[int, str]] = Counter()  # of all processes, by epoch and shard
        self.reasons: dict[str, str] = {}  # the first one, by shard
        self.error = ""

    def state_dict(self) -> dict[str, Any]:
        """What is counted of the epoch that has not ended, as of the last `merge`."""
        counts = [[epoch, shard, n] for (epoch, shard), n in self.counts.items()]
        return {"counts": counts, "reasons": dict(self.reasons)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting; every process has the same counts."""
        self.counts = Counter({(epoch, shard): n for epoch, shard, n in state_dict["counts"]})
        self.reasons = dict(state_dict["reasons"])

    def start(self, trainer: Trainer, module: LightningModule) -> None:
        """Find the epoch where the run stands; those before it are told."""
        self.epoch = self._epoch(trainer, module)
        self.counts = Counter({key: n for key, n in self.counts.items() if key[0] >= self.epoch})

    def note(self, skipped: list[Skipped]) -> None:
        """Of a batch of this process."""
        self.new += skipped

    def too_many(self, trainer: Trainer, module: LightningModule) -> bool:
        """After a step: now and then, compare; report an epoch; whether the limit is passed."""
        epoch = self._epoch(trainer, module)
        interval: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if epoch != self.epoch or trainer.global_step % interval == 0:
            self.merge(trainer)
        if self.error:
            return True
        for done in range(self.epoch, epoch):
            for shard in self._report(done, f"epoch {done} of the data"):
                del self.counts[done, shard]
        self.epoch = epoch
        return False

    def end(self, trainer: Trainer) -> None:
        """Report what the last, unfinished epoch has had; the next start goes on counting."""
        self.merge(trainer)
        if not self.error:
            self._report(self.epoch, f"epoch {self.epoch} of the data, so far")

    def check(self) -> None:
        """End with an error, now that the last step is saved."""
        if self.error:
            raise UserError(self.error)

    def _epoch(self, trainer: Trainer, module: Any) -> int:
        return int(module.images_seen // trainer.datamodule.order.samples)  # type: ignore[attr-defined]

    def merge(self, trainer: Trainer) -> None:
        """Put the counts of all processes together, and see whether an epoch has too many now."""
        new = list(itertools.chain(*gather(self.new, trainer)))
        self.new = []
        for each in new:
            shard = redacted(each.shard)  # goes into checkpoints
            self.counts[each.epoch, shard] += 1
            self.reasons.setdefault(shard, redacted(f"{each.key}: {each.reason}"))
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        samples = data.order.samples
        for epoch in sorted({each.epoch for each in new}):  # data may be mended between two starts
            found = self._of(epoch)
            if found.total() > data.max_skipped * samples:
                self.error = (
                    f"data.max_skipped={data.max_skipped}: {found.total():,} of {samples:,} "
                    f"samples cannot be read ({self._text(found)})"
                )

    def _of(self, epoch: int) -> Counter[str]:
        """Skipped samples of an epoch by shard."""
        return Counter({shard: n for (e, shard), n in self.counts.items() if e == epoch})

    def _report(self, epoch: int, when: str) -> Counter[str]:
        found = self._of(epoch)
        if found:
            rank_zero_info(f"{when}: {found.total():,} samples skipped ({self._text(found)})")
        return found

    def _text(self, found: Counter[str]) -> str:
        worst = found.most_common(SHOWN)
        parts = [f"{n:,} of {shard}, such as {self.reasons[shard]}" for shard, n in worst]
        rest = len(found) - len(worst)
        return "; ".join(parts) + (f"; and {rest} more shards" if rest else "")
