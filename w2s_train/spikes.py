"""Running averages that tell a spike, kept on the device."""

import torch
from torch import Tensor

WINDOW = 100  # good steps that the averages look back; before so many, nothing is a spike


class Spikes:
    """Averages of the sizes of several numbers over good steps.

    Args:
        limits: Times its average that make a number bad, one limit each; infinity is never.
    """

    def __init__(self, limits: list[float]) -> None:
        self.limits = torch.tensor(limits)
        self.restore([0.0] * len(limits), 0)

    def restore(self, averages: list[float], good: int) -> None:
        """Go on from averages over ``good`` steps."""
        self.state = torch.tensor([*averages, float(good)])

    def look(self, numbers: Tensor, broken: Tensor) -> tuple[Tensor, Tensor]:
        """Whether the step is good, () bool, and which numbers are spikes, (n,) bool.

        A good step is part of the averages from now on.

        Args:
            numbers: (n,), finite.
            broken: (n,) bool, which of them stand for numbers that are not finite.
        """
        # Moved once; from then on they are where the numbers are.
        state, self.limits = self.state.to(numbers.device), self.limits.to(numbers.device)
        averages, good, sizes = state[:-1], state[-1:], numbers.abs()
        known = averages > 0  # there is no limit to what was 0 so far
        limits = torch.where(known, averages * self.limits, torch.inf)
        spikes = (sizes > limits) & (good >= WINDOW)
        fine = ~(broken | spikes).any()
        # Among the first steps nothing is a spike, and no spike may hide those that come later.
        moved = averages + (torch.minimum(sizes, limits) - averages) / (good + 1).clamp(max=WINDOW)
        self.state = torch.where(fine, torch.cat([moved, good + 1]), state)
        return fine, spikes
