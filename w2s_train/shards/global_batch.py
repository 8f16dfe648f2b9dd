"""How the global batch of a config becomes batches per process, so that it means the same run on
any number of processes: the same samples per optimizer step, the same number of optimizer steps.
"""

from typing import Any, NamedTuple

from w2s_train.errors import UserError


class Parts(NamedTuple):
    """What a process has of a global batch."""

    rows: int  # at a time
    number: int  # of parts, whose gradients are accumulated

    def describe(self, processes: int) -> str:
        """One line of factors."""
        return f"{processes} processes x {self.number} parts x {self.rows} rows"


def divide(global_batch_size: int, batch_size: int, processes: int) -> Parts:
    """global_batch_size = processes * number * rows, with the fewest parts of rows <= batch_size.

    Args:
        global_batch_size: Rows per optimizer step.
        batch_size: The most rows per process at a time.
        processes: Number of processes.

    Raises:
        UserError: Processes cannot have equal shares.
    """
    share, rest = divmod(global_batch_size, processes)
    if rest:
        raise UserError(
            f"global_batch_size={global_batch_size}: must be a multiple of the number of "
            f"processes, {processes}"
        )
    fewest = -(-share // batch_size)
    number = next(n for n in range(fewest, share + 1) if share % n == 0)
    return Parts(share // number, number)


def parts_for(trainer: Any, global_batch_size: int, batch_size: int) -> Parts:
    """The parts for the trainer's processes.

    Raises:
        UserError: They cannot have equal shares; or the trainer accumulates by itself.
    """
    given = trainer.accumulate_grad_batches
    if given != 1:
        raise UserError(
            f"accumulate_grad_batches={given}: must be left out beside data.global_batch_size="
            f"{global_batch_size}, from which it follows"
        )
    return divide(global_batch_size, batch_size, trainer.world_size)


def accumulate(trainer: Any, number: int) -> None:
    """Let the trainer step after every ``number`` batches; what it counts in batches are steps."""
    trainer.accumulate_grad_batches = number
    for name in ("val_check_interval", "limit_train_batches"):
        # With a time as interval the trainer has no such number.
        if isinstance(value := getattr(trainer, name, None), int):
            setattr(trainer, name, value * number)


def recount(trainer: Any) -> None:
    """Let the batches behind a run that goes on be those of its steps, in parts as they are now.

    On another number of processes a step was another number of batches, and the trainer steps,
    evaluates and ends epochs at multiples of that number.
    """
    progress, steps = trainer.fit_loop.epoch_loop.batch_progress, trainer.global_step
    before = progress.total.ready
    if before == steps * trainer.accumulate_grad_batches:
        return
    for counts in (progress.total, progress.current):
        # Checkpoints are those of whole steps.
        now = round(counts.ready * steps / before) * trainer.accumulate_grad_batches
        counts.increment_by(now - counts.ready)
