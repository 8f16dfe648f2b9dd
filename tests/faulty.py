"""The command, with a fault in one rank: python tests/faulty.py FAULT RANK fit ...

The fault happens at step 3. ``W2S_FAULT`` carries it to the processes that Lightning starts.
"""

import os
import signal
import sys
import time

from w2s_train.cli import main
from w2s_train.errors import UserError

STEP = 3


def stuck() -> None:
    while True:
        time.sleep(1)


def error() -> None:
    raise ValueError("a bad thing")


def user_error() -> None:
    raise UserError("data.x=1: must be 2")


FAULTS = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "stuck": stuck,
    "error": error,
}


def inject(fault: str, rank: int) -> None:
    """Patch what the rank calls."""
    from w2s_train.datamodule import ShardDataModule
    from w2s_train.module import DiffusionModule

    step, setup = DiffusionModule.training_step, ShardDataModule.setup
    loader = ShardDataModule.train_dataloader

    def training_step(self, batch, batch_idx):
        if self.trainer.global_rank == rank and self.global_step == STEP and fault in FAULTS:
            FAULTS[fault]()
        return step(self, batch, batch_idx)

    def slow(batches):
        for number, batch in enumerate(batches):
            if number == STEP:
                stuck()
            yield batch

    def train_dataloader(self):
        found = loader(self)
        if fault != "data" or self.trainer.global_rank != rank:
            return found
        return slow(found)

    def set_up(self, stage):
        if fault == "user_error" and self.trainer.global_rank == rank:
            user_error()
        setup(self, stage)

    DiffusionModule.training_step = training_step
    ShardDataModule.train_dataloader = train_dataloader
    ShardDataModule.setup = set_up


if __name__ == "__main__":
    fault, rank, *arguments = sys.argv[1:]
    if fault == "early" and os.environ.get("LOCAL_RANK", "0") == rank:
        sys.exit(f"error: {fault}")
    inject(fault, int(rank))
    main(arguments)
