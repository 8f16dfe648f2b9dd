"""What all processes decide together, with one small collective per optimizer step."""

from collections.abc import Sequence

import torch
from torch import Tensor

from w2s_train.optim import send

WISHES = ("preempt", "interrupt", "save")


class Agreement:
    """Wishes of single processes become decisions of all of them, at the same step.

    They travel with numbers that have to be summed anyway: see `Guard`.
    """

    def __init__(self) -> None:
        self.wishes = dict.fromkeys(WISHES, False)  # of this process
        self.decided = dict.fromkeys(WISHES, False)  # of all, as far as is known

    def wish(self, **wishes: bool) -> None:
        """What this process wishes from now on, by name; others stay as they are."""
        self.wishes |= wishes

    def settle(self, numbers: Tensor) -> Tensor:
        """The sums (n + 3,) over processes of numbers (n,) and wishes; nothing is waited for.

        Args:
            numbers: Finite ones, as many on each process, where the process group works.
        """
        wishes = send([float(wish) for wish in self.wishes.values()], numbers.device)
        sums = torch.cat([numbers, wishes])
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(sums)
        return sums

    def decide(self, sums: Sequence[float]) -> None:
        """Take over the last three of what `settle` gave, now that the host knows it."""
        found = zip(WISHES, sums[-len(WISHES) :], strict=True)
        self.decided = {name: total > 0 for name, total in found}

    def saved(self) -> None:
        """What was wished for before is done, also where the host has only now heard of it."""
        self.wishes["save"] = self.decided["save"] = False

    @property
    def stop(self) -> bool:
        """Whether training is to end after this step."""
        return self.decided["preempt"] or self.decided["interrupt"]
