"""What all processes decide together, with one small collective per optimizer step."""

from collections.abc import Callable

import torch

WISHES = ("preempt", "interrupt", "save")


class Agreement:
    """Wishes of single processes become decisions of all of them, at the same step.

    They travel with numbers that have to be summed anyway: see `Guard`.
    """

    look: Callable[[], None] | None = None  # has a last look at what this process was asked for

    def __init__(self) -> None:
        self.wishes = dict.fromkeys(WISHES, False)  # of this process
        self.decided = dict.fromkeys(WISHES, False)  # of all, since the last optimizer step

    def settle(self, numbers: list[float], device: torch.device) -> list[float]:
        """The sums of ``numbers`` over processes; wishes that any process has are decided.

        Args:
            numbers: Finite ones, as many on each process.
            device: Where the process group works.
        """
        if self.look is not None:
            self.look()
        if not torch.distributed.is_initialized():
            self.decided = dict(self.wishes)
            return numbers
        wishes = [float(wish) for wish in self.wishes.values()]
        everything = torch.tensor([*numbers, *wishes], device=device)
        torch.distributed.all_reduce(everything)
        sums = everything.tolist()
        found = zip(self.wishes, sums[len(numbers) :], strict=True)
        self.decided = {name: total > 0 for name, total in found}
        return sums[: len(numbers)]

    @property
    def stop(self) -> bool:
        """Whether training is to end after this step."""
        return self.decided["preempt"] or self.decided["interrupt"]
