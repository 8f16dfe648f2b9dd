"""Flags of Lightning's trainer that mean something else here, or nothing: docs/settings.md."""

import os
from collections.abc import Iterable
from typing import Any

from lightning.pytorch import callbacks as theirs
from lightning.pytorch.utilities import rank_zero_info

from w2s_train.errors import UserError

# Callbacks that change training beside the keys that say so: what to use instead.
INSTEAD: dict[type[theirs.Callback], str] = {
    theirs.GradientAccumulationScheduler: "trainer.accumulate_grad_batches",
    theirs.LearningRateFinder: "model.optimizer.init_args.lr",
    theirs.BatchSizeFinder: "data.batch_size",
    theirs.WeightAveraging: "model.ema_decay",
    theirs.StochasticWeightAveraging: "model.ema_decay, and model.scheduler for its rates",
    theirs.BaseFinetuning: "model.network.init_args.path, whose weights are all trained",
    theirs.ModelPruning: "model.network for a smaller one, or prune what `lightning export` writes",
}
REFUSED = ("fsdp", "deepspeed", "model_parallel", "ddp_spawn")  # strategies; the first three split
PRECISIONS = ("32-true", "32", "16-mixed", "16", "bf16-mixed", "bf16")  # of float32 weights


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
    if isinstance(strategy, str) and strategy.startswith(REFUSED):
        raise UserError(
            f"trainer.strategy={strategy}: must keep whole networks on each process, and start "
            "processes itself or by fork: ddp or ddp_fork"
        )
    check_precision(trainer.precision)
    batches = trainer.overfit_batches
    if batches < 0 or (batches > 1 and not float(batches).is_integer()):
        raise UserError(
            f"trainer.overfit_batches={batches}: must be a whole number of batches, at least 0, or "
            "a share of the data in [0, 1]"
        )
    _check_epochs(trainer)
    if trainer.use_distributed_sampler:
        rank_zero_info(
            "trainer.use_distributed_sampler=True: changes nothing; data are dealt out to "
            "processes in any case"
        )


def check_callbacks(callbacks: Iterable[theirs.Callback]) -> None:
    """Refuse those that change training or weights, which keys of the config do and record.

    Raises:
        UserError: There is one.
    """
    for each in callbacks:
        if instead := next((key for kind, key in INSTEAD.items() if isinstance(each, kind)), None):
            raise UserError(
                f"trainer.callbacks={type(each).__name__}: must leave training and weights as the "
                f"config says; use {instead}"
            )


def check_precision(precision: Any) -> None:
    """Refuse weights that are not float32.

    Raises:
        UserError: They would be.
    """
    if precision is not None and str(precision) not in PRECISIONS:
        raise UserError(
            f"trainer.precision={precision}: must keep float32 weights, such as bf16-mixed or "
            "32-true; averages of half-precision weights stand still"
        )


def seed_of(seed: int | bool | None) -> int:
    """The seed of a run; where none is given, that of the environment or 0, as Lightning's."""
    if seed is None or isinstance(seed, bool):
        given = os.environ.get("PL_GLOBAL_SEED", "0")
        return int(given) if given.isdecimal() else 0
    return int(seed)


def _check_epochs(trainer: Any) -> None:
    """The trainer's epochs end after ``limit_train_batches`` batches, or never."""
    batches, interval = trainer.limit_train_batches, trainer.val_check_interval
    # Some versions of the parser read 5 as 5.0 where a share is allowed, too.
    whole = batches is not None and (isinstance(batches, int) or batches > 1)
    if batches is not None and (not float(batches).is_integer() or batches < 1):
        raise UserError(
            f"trainer.limit_train_batches={batches}: must be a number of batches, at least 1, or "
            "left out"
        )
    if whole and interval is not None and interval > batches:
        if trainer.check_val_every_n_epoch:
            raise UserError(
                f"trainer.val_check_interval={interval}: must be at most the batches of an epoch, "
                f"trainer.limit_train_batches={batches}, or counted across epochs by "
                "trainer.check_val_every_n_epoch null"
            )
    for name in ("max_epochs", "min_epochs"):
        number = getattr(trainer, name)
        if number not in (None, -1) and (not whole or number < 1):
            raise UserError(
                f"trainer.{name}={number}: must be left out, or be at least 1 and come with a "
                "number of trainer.limit_train_batches: data have no end; trainer.max_steps ends a "
                "run, and an epoch is images / global batch steps"
            )
    for unit in ("steps", "epochs"):
        low, top = getattr(trainer, f"min_{unit}"), getattr(trainer, f"max_{unit}")
        if low and top and 0 < top < low:
            raise UserError(f"trainer.min_{unit}={low}: must be at most trainer.max_{unit}, {top}")
