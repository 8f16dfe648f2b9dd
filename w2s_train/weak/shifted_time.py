"""The network at a time that is not that of its input."""

from torch import Tensor

from w2s_train.errors import require
from w2s_train.interpolant import NoisySample
from w2s_train.models import DiTOutput, Network
from w2s_train.weak.base import WeakSource


class ShiftedTime(WeakSource):
    """The same network, label and x_t, told t + shift (self-guidance, arXiv 2412.05827).

    A network that takes its input for noisier than it is removes too much of it. Where t + shift
    leaves [0, 1] it is told the end; at t = 1 a positive shift makes no difference.

    Args:
        shift: In (-1, 1); 0.01 is ten of a thousand steps.

    Raises:
        UserError: A shift out of its range.
    """

    def __init__(self, shift: float = 0.01) -> None:
        super().__init__()
        self.shift = require("shift", shift, "(-1, 1)")

    def describe(self) -> str:
        return f"ShiftedTime({self.shift:g})"

    def predict(self, network: Network, noisy: NoisySample, y: Tensor, strong: DiTOutput) -> Tensor:
        return network(noisy.x_t, (noisy.t + self.shift).clamp(0, 1), y).velocity
