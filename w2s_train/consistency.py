"""The penalty that the released SGG code has below its guidance range; see `segment`."""

from torch import Tensor

from w2s_train.errors import require
from w2s_train.log import Log
from w2s_train.schedule import Schedule
from w2s_train.segment import Rows, Segment, Strong, mean_square
from w2s_train.weak.base import WeakSource


class Consistency(Segment):
    """target = v, and weight * |strong - weak|^2 with gradients to both.

    Args:
        low: Start of the range, inclusive.
        high: End of the range, exclusive.
        weak: The weak source.
        weight: Weight of the penalty.
        schedule: When it starts and how it grows; None is at once and constant.
        name: In logs, and as a key; None is its range.

    Raises:
        UserError: A negative weight.
    """

    def __init__(
        self,
        low: float,
        high: float,
        weak: WeakSource,
        weight: float = 0.2,
        schedule: Schedule | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(low, high, weak, schedule, name)
        self.weight = require("weight", weight, "[0, inf)")

    def describe(self) -> str:
        return f"{self.title}: consistency with {self.weak.describe()}, weight {self.weight:g}"

    def act(self, strong: Strong, rows: Rows, target: Tensor, log: Log) -> Tensor:
        inputs = self.weak_inputs(strong, rows)
        with self.gradients():
            weak = self.weak.predict_at(strong.network, *inputs).float()
        rows = slice(None) if self.weak.trainable else rows
        t, v, velocity = strong.noisy.t, strong.noisy.v[rows].float(), strong.out.velocity[rows]
        inside, penalty = self.contains(t[rows]), velocity.new_zeros(len(t))
        # Multiplied, not selected: the graph must be the same whichever timesteps were drawn.
        weight = self.factor(strong.step) * self.weight
        penalty[rows] = weight * inside * mean_square(velocity - weak)
        self.report(log, velocity, weak, v, inside)
        return penalty
