"""The command, with a fault in one rank: python tests/faulty.py FAULT RANK fit ...

The fault happens at step 3, in an evaluation, in setup ("user_error"), or before the processes meet
("early").
"""

import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any, NoReturn

from w2s_train.cli import main
from w2s_train.errors import UserError

STEP = 3


def announce() -> None:
    """Say who it is, and when."""
    os.write(1, f"FAULT {os.getpid()} {time.time()}\n".encode())


def stuck() -> NoReturn:
    while True:
        time.sleep(1)


def error() -> NoReturn:
    raise ValueError("a bad thing")


IN_STEP = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "stuck": stuck,
    "error": error,
}


def bad_loss(
    at: dict[int, float], rank: int | None = None, patch: Callable[..., Any] = setattr
) -> None:
    """Have the loss of one process multiplied, by optimizer step, and with it the gradient."""
    from w2s_train.module import DiffusionModule

    step, measure = DiffusionModule.training_step, DiffusionModule.measure

    def factor(module) -> float:
        return at.get(module.global_step, 1.0) if rank in (None, module.global_rank) else 1.0

    def training_step(self, batch, batch_idx):
        return step(self, batch, batch_idx) * factor(self)

    def measured(self, optimizer):
        loss, norm = measure(self, optimizer)
        return loss * factor(self), norm

    patch(DiffusionModule, "training_step", training_step)
    patch(DiffusionModule, "measure", measured)


def inject(fault: str, rank: int) -> None:
    """Patch what the rank calls."""
    from w2s_train.datamodule import ShardDataModule
    from w2s_train.module import DiffusionModule

    step, set_up = DiffusionModule.training_step, ShardDataModule.setup
    loader = ShardDataModule.train_dataloader

    def training_step(self, batch, batch_idx):
        if self.trainer.global_rank == rank and self.global_step == STEP and fault in IN_STEP:
            announce()
            IN_STEP[fault]()
        return step(self, batch, batch_idx)

    def until_stuck(batches):
        for number, batch in enumerate(batches):
            if number == STEP:
                announce()
                stuck()
            yield batch

    def train_dataloader(self):
        here = fault == "data" and self.trainer.global_rank == rank
        return until_stuck(loader(self)) if here else loader(self)

    def setup(self, stage):
        if fault == "user_error" and self.trainer.global_rank == rank:
            announce()
            raise UserError("data.x=1: must be 2")
        set_up(self, stage)

    generation = DiffusionModule.validation_step

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        if fault == "evaluation" and self.trainer.global_rank == rank and batch_idx == 2:
            announce()
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.1)
        return generation(self, batch, batch_idx, dataloader_idx)

    DiffusionModule.training_step = training_step
    DiffusionModule.validation_step = validation_step
    ShardDataModule.train_dataloader = train_dataloader
    ShardDataModule.setup = setup


if __name__ == "__main__":
    fault, rank, *arguments = sys.argv[1:]
    if fault == "early" and os.environ.get("LOCAL_RANK", "0") == rank:
        announce()
        sys.exit(1)
    inject(fault, int(rank))
    main(arguments)
