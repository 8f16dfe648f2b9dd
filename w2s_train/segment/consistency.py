"""A penalty that pulls strong and weak prediction together.

This is what the released SGG code does below its guidance range: the target stays v, and
weight * |s - w|^2 is added with gradients to both sides; the weak side has no other loss there.
"""

from w2s_train.schedule import Schedule
from w2s_train.segment.base import (
    Chosen,
    Segment,
    SegmentTerms,
    StrongPass,
    at_least_0,
    mean_square,
)
from w2s_train.weak.base import WeakSource


class Consistency(Segment):
    """target = v, and weight * |strong - weak|^2 with gradients to both.

    Args:
        low: Start of the range, inclusive.
        high: End of the range, exclusive.
        weak: The weak source.
        weight: Weight of the penalty.
        schedule: When it starts and how it grows; None is at once and constant.

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
    ) -> None:
        super().__init__(low, high, weak, schedule)
        self.weight = at_least_0("weight", weight)

    def describe(self) -> str:
        return (
            f"{self.low:g} <= t < {self.high:g}: consistency with {self.weak.describe()}, "
            f"weight {self.weight:g}"
        )

    def evaluate(self, strong: StrongPass, chosen: Chosen) -> SegmentTerms:
        weak, t = self.predict(strong, chosen.rows), strong.noisy.t
        rows = slice(None) if self.weak.trainable else chosen.rows
        inside, velocity = self.contains(t[rows]), strong.out.velocity[rows]
        penalty = velocity.new_zeros(len(t))
        # Multiplied, not selected: the graph must be the same whichever timesteps were drawn.
        weight = self.factor(strong.step) * self.weight
        penalty[rows] = weight * inside * mean_square(velocity - weak)
        v = strong.noisy.v[rows].float()
        return SegmentTerms(rows, None, penalty, self.report(velocity, weak, v, inside))
