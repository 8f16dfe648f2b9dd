"""Flags of Lightning's trainer that mean something else here, or nothing: docs/settings.md."""

from typing import Any

from lightning.pytorch.utilities import rank_zero_info

from w2s_train.errors import UserError

WHOLE = ("fsdp", "deepspeed", "model_parallel")  # strategies that split networks


def check_flags(trainer: Any) -> None:
    """Refuse what a trainer of endless data and resumable runs cannot do; say what has no effect.

    Args:
        trainer: The trainer's part of a parsed config.

    Raises:
        UserError: Such a flag is set.
    """
    rules = {
        "fast_dev_run": "must be false; --trainer.max_steps 2 with another "
        "--trainer.default_root_dir tries a config",
        "barebones": "must be false; guard, log and checkpoints are callbacks",
        "model_registry": "must be null; `lightning export` writes models",
        "num_sanity_val_steps": "must be 0; --trainer.val_check_interval 1 scores from step 1 on",
        "enable_checkpointing": "must be true; --checkpoint.every_n_train_steps says how often",
    }
    for name, rule in rules.items():
        value = getattr(trainer, name)
        if value is False if name == "enable_checkpointing" else value:
            raise UserError(f"trainer.{name}={value}: {rule}")
    strategy = trainer.strategy
    if isinstance(strategy, str) and strategy.startswith(WHOLE):
        raise UserError(
            f"trainer.strategy={strategy}: must keep whole networks on each process, such as ddp"
        )
    _check_epochs(trainer)
    if trainer.use_distributed_sampler:
        rank_zero_info(
            "trainer.use_distributed_sampler=True: changes nothing; data are dealt out to "
            "processes in any case"
        )


def _check_epochs(trainer: Any) -> None:
    """The trainer's epochs end after ``limit_train_batches`` batches, or never."""
    batches, interval = trainer.limit_train_batches, trainer.val_check_interval
    if isinstance(batches, int):
        if isinstance(interval, int) and trainer.check_val_every_n_epoch and interval > batches:
            raise UserError(
                f"trainer.val_check_interval={interval}: must be at most the batches of an epoch, "
                f"trainer.limit_train_batches={batches}, or counted across epochs by "
                "trainer.check_val_every_n_epoch null"
            )
        return
    for name in ("max_epochs", "min_epochs"):
        number = getattr(trainer, name)
        if number not in (None, -1):
            raise UserError(
                f"trainer.{name}={number}: must be left out, or come with a number of "
                "trainer.limit_train_batches: data have no end; trainer.max_steps ends a run, and "
                "an epoch is images / global batch steps"
            )
