"""What all processes decide together, with one small collective per optimizer step."""

from collections.abc import Callable

import torch
from torch import Tensor

WISHES = ("preempt", "interrupt", "save")


class Agreement:
    """Wishes of single processes become decisions of all of them, at the same step.

    They travel with numbers that have to be summed anyway: see `Guard`.
    """

    look: Callable[[], None] | None = None  # has a last look at what this process was asked for

    def __init__(self) -> None:
        self.wishes = dict.fromkeys(WISHES, False)  # of this process
        self.decided = dict.fromkeys(WISHES, False)  # of all, since the last optimizer step

    def settle(self, numbers: Tensor) -> list[float]:
        """The sums of ``numbers`` (n,) over processes; wishes that any process has are decided.

        Waits for the device once.
        """
        if self.look is not None:
            self.look()
        wishes = numbers.new_tensor([float(self.wishes[name]) for name in WISHES])
        everything = torch.cat([numbers, wishes])
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(everything)
        *sums, preempt, interrupt, save = everything.tolist()
        self.decided = dict(zip(WISHES, (preempt > 0, interrupt > 0, save > 0), strict=True))
        return sums

    @property
    def stop(self) -> bool:
        """Whether training is to end after this step."""
        return self.decided["preempt"] or self.decided["interrupt"]
