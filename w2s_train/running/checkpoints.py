"""When checkpoints are written, what they are compared with before, and which are kept.

Before each, all processes compare fingerprints: whether they hold the same tensors, bit for bit,
and whether all numbers are finite.
"""

import itertools
import time
from pathlib import Path
from typing import NamedTuple

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from w2s_train.checkpoint_file import newest_first, point_to, remove, step_of
from w2s_train.errors import DIVERGED, PEER_LOST, Stopped, UserError, one_line, require
from w2s_train.evaluation.scorer import gather
from w2s_train.running.checkpoint_io import CheckpointFiles

LEAST = 2  # files that are always kept: one of them may turn out to be damaged
BYTES_PER_SECOND = 200e6  # of writing, as long as nothing has been written
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
PERIOD = 65_521  # the largest prime below 2^16


class Fingerprint(NamedTuple):
    """Of a state dict: one row per tensor.

    Args:
        names: Of the tensors.
        sums: (tensors, 3) int64: the sum of the bits read as integers, the same with weights that
            depend on the place, and 1 where every number is finite.
    """

    names: list[str]
    sums: Tensor

    def not_finite(self) -> list[str]:
        """Names of tensors with numbers that are not finite."""
        return [name for name, row in zip(self.names, self.sums, strict=True) if not row[2]]

    def differences(self, other: "Fingerprint") -> list[str]:
        """Names of tensors that are not those of ``other``."""
        pairs = zip(self.names, self.sums, other.sums, strict=True)
        return [name for name, mine, theirs in pairs if not torch.equal(mine, theirs)]


@torch.no_grad()
def fingerprint(state: dict[str, object]) -> Fingerprint:
    """The fingerprint of the tensors of a state dict, made where they are and read once."""
    tensors = {name: x for name, x in state.items() if isinstance(x, Tensor)}
    sums = [_sums(x) for x in tensors.values()]
    return Fingerprint(list(tensors), torch.stack(sums).cpu())


def _sums(x: Tensor) -> Tensor:
    bits = x.contiguous().flatten().view(BITS[x.element_size()]).long()
    weights = torch.arange(len(bits), device=x.device) % PERIOD + 1
    return torch.stack([bits.sum(), (bits * weights).sum(), torch.isfinite(x).all().long()])


class Checkpoints:
    """Writes ``checkpoints/step-NNNNNN.ckpt``, after batches that complete an optimizer step only.

    (The gradients of half a step are in no checkpoint: what went on from there would lose a batch.)
    ``last.ckpt`` names the newest. Before each, all processes compare weights, averages and weak
    networks bit for bit, and none is written where one of these holds a number that is not finite.

    A write that fails is warned about, and training goes on; if it is the last one, it ends with
    an error.

    Args:
        every_n_train_steps: Optimizer steps between two checkpoints that stay.
        every_minutes: At most so long after the last one, another is written; of these, and of
            those before an evaluation and at a stop, the newest two files stay. None is never.
        keep: Of the first kind, only the newest so many stay, at least 2; None is all of them.

    Raises:
        UserError: A number out of its range.
    """

    def __init__(
        self,
        every_n_train_steps: int = 1000,
        every_minutes: float | None = 15.0,
        keep: int | None = None,
    ) -> None:
        require("every_n_train_steps", every_n_train_steps, "[1, inf)")
        if every_minutes is not None:
            require("every_minutes", every_minutes, "(0, inf)")
        if keep is not None:
            require("keep", keep, f"[{LEAST}, inf)")
        self.every_n_train_steps, self.keep = every_n_train_steps, keep
        self.every_minutes = every_minutes
        self.seconds = 0.0  # that a save takes from its beginning until it is on the disk

    def clear(self, trainer: Trainer) -> None:
        """Clear away what kills have left half written."""
        self.folder = Path(trainer.default_root_dir) / "checkpoints"
        if trainer.is_global_zero:
            for path in self.folder.glob("*.partial"):
                path.unlink(missing_ok=True)

    def start(self, trainer: Trainer, module: LightningModule) -> None:
        """Note where the run stands, also in the folder: it may have gone back in it."""
        self.when = time.monotonic()
        self.saved = -1  # the step of the last save, unless something has changed since
        start = Path(trainer.ckpt_path or "").resolve()
        starts = set(gather((trainer.global_step, start.name), trainer))
        if len(starts) > 1:
            raise Stopped(f"processes go on from different steps, {sorted(starts)}", PEER_LOST)
        ours = start.parent == self.folder.resolve() and step_of(start) >= 0
        if ours and trainer.is_global_zero:
            point_to(self.folder / "last.ckpt", start)
        tensors = itertools.chain(module.parameters(), module.buffers())
        self.seconds = 3 * sum(x.numel() * x.element_size() for x in tensors) / BYTES_PER_SECOND

    def wish(self, trainer: Trainer) -> bool:
        """Whether it is time for another one; the first process has the clock."""
        due = self.every_minutes is not None and (
            time.monotonic() - self.when > 60 * self.every_minutes
        )
        return due and trainer.is_global_zero

    def stays(self, step: int) -> bool:
        """Whether a checkpoint of this step is written in any case, and kept."""
        return step % self.every_n_train_steps == 0

    def changed(self) -> None:
        """Something has changed since the last save, though no step was taken."""
        self.saved = -1

    def save(self, trainer: Trainer, module: LightningModule) -> None:
        """Write a checkpoint of this step; on all processes together."""
        # Buffers, such as the statistics of a batch normalization, are of each process: DDP gives
        # all of them those of the first one, which are saved, before the next pass.
        own = dict(module.named_buffers())
        state = {name: x for name, x in module.state_dict().items() if name not in own}
        compare(fingerprint(state), trainer)
        self.report(trainer, wait=True)
        path, begun = self.folder / f"step-{trainer.global_step:06d}.ckpt", time.monotonic()

        def written() -> None:
            point_to(self.folder / "last.ckpt", path)
            self._tidy()
            self.seconds = time.monotonic() - begun

        trainer.save_checkpoint(path, weights_only=False, storage_options=written)
        self.when, self.saved = time.monotonic(), trainer.global_step

    def end(self, trainer: Trainer, module: LightningModule) -> None:
        """Save where training ended, stopped or not: the last step is rarely a round one."""
        if self.saved != trainer.global_step:
            self.save(trainer, module)
        self.finish(trainer)

    def finish(self, trainer: Trainer) -> None:
        """Wait until everything is on the disk; on all processes together."""
        error = self._files(trainer).finished(wait=True)
        message = trainer.strategy.broadcast(one_line(error) if error else "")
        if message:
            raise UserError(f"checkpoint: cannot be written; {message}; the one before is whole")

    def report(self, trainer: Trainer, *, wait: bool = False) -> None:
        """Warn of a file that could not be written."""
        if error := self._files(trainer).finished(wait=wait):
            self.saved = -1
            rank_zero_warn(f"a checkpoint was not written; training goes on ({one_line(error)})")

    def _files(self, trainer: Trainer) -> CheckpointFiles:
        files = trainer.strategy.checkpoint_io
        assert isinstance(files, CheckpointFiles), "the command sets it"
        return files

    def _tidy(self) -> None:
        """Delete what does not stay."""
        files = newest_first(self.folder)
        steps = [path for path in files if step_of(path) >= 0]
        round_ones = [path for path in steps if not step_of(path) % self.every_n_train_steps]
        for path in set(steps) - set(files[:LEAST]) - set(round_ones[: self.keep]):
            remove(path)


def validation_follows(trainer: Trainer, batch_idx: int) -> bool:
    """Whether the config has Lightning validate after this training batch."""
    by_epoch = trainer.check_val_every_n_epoch is not None
    index = batch_idx if by_epoch else trainer.fit_loop.total_batch_idx
    interval = trainer.val_check_batch
    if not interval or (index + 1) % interval:
        return False
    return trainer.enable_validation  # last: it looks for the module's methods at each call


def compare(mine: Fingerprint, trainer: Trainer) -> None:
    """Stop all processes if they differ, or if any number is not finite."""
    everyone: list[Fingerprint] = gather(mine, trainer)
    for rank, other in enumerate(everyone):
        if bad := other.not_finite():
            raise Stopped(
                f"step {trainer.global_step}: {bad[0]} and {len(bad) - 1} more tensors of rank "
                f"{rank} are not finite; no checkpoint was written",
                DIVERGED,
            )
        if different := everyone[0].differences(other):
            raise Stopped(
                f"step {trainer.global_step}: {different[0]} and {len(different) - 1} more tensors "
                f"of rank {rank} are not those of rank 0; no checkpoint was written",
                DIVERGED,
            )
