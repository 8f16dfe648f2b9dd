"""What every segment offers: a range of timesteps, a weak source and a schedule.

Gradients stop in this folder only.
"""

import abc
import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from w2s_train.errors import UserError
from w2s_train.interpolant import NoisySample
from w2s_train.models import DiT, DiTOutput
from w2s_train.schedule import Schedule, Timeline
from w2s_train.weak.base import Step, WeakSource

Rows = slice | Tensor


@dataclass(frozen=True)
class Statistic:
    """One number per row (n,), to be reduced over the rows in ``mask`` (n,) and over steps."""

    values: Tensor
    mask: Tensor
    reduce: Literal["mean", "rms", "max"]  # "rms": the root of the mean of ``values``


@dataclass(frozen=True)
class StrongPass:
    """The network being trained, evaluated on a whole batch of B rows."""

    network: DiT
    noisy: NoisySample
    y: Tensor  # (B,) labels, dropped ones replaced by the null class
    out: DiTOutput  # with the velocity in float32
    step: Step


@dataclass(frozen=True)
class SegmentTerms:
    """What a segment contributes, and what it reports."""

    rows: Rows  # the rows that `shift` is for
    shift: Tensor | None  # (n, C, H, W), added to the target at those rows
    penalty: Tensor | None  # (B,), added to the loss
    statistics: dict[str, Statistic]


def mean_square(x: Tensor) -> Tensor:
    """Mean of squares over channels and pixels: (B, C, H, W) -> (B,)."""
    return x.square().flatten(1).mean(1)


class Segment(nn.Module, abc.ABC):
    """A range of timesteps with one weak source.

    Args:
        low: Start of the range, inclusive, in [0, 1).
        high: End of the range, exclusive, in (low, 1]; 1 itself belongs to the last segment.
        weak: The weak source.
        schedule: When it starts and how it grows; None is at once and constant.

    Raises:
        UserError: The range is empty, inverted or not inside [0, 1].
    """

    def __init__(
        self, low: float, high: float, weak: WeakSource, schedule: Schedule | None = None
    ) -> None:
        super().__init__()
        if not 0 <= low < 1:
            raise UserError(f"low={low}: must be in [0, 1)")
        if not low < high <= 1:
            raise UserError(f"high={high}: must be in ({low}, 1], above low={low}")
        self.low, self.high, self.weak = low, high, weak
        self.schedule = schedule or Schedule()
        self.timeline = Timeline()

    def plan(self, timeline: Timeline) -> None:
        """Learn how long the run will be; called before it starts.

        Raises:
            UserError: The segment would never act.
        """
        self.weak.plan(timeline)
        self.timeline = timeline
        self.schedule.check(timeline)

    def factor(self, step: Step) -> float:
        """What the schedule multiplies the strength by; 0 before it and the source begin."""
        if not self.weak.ready:
            return 0.0
        return self.schedule.factor(step.number, self.timeline, self.weak.first_step)

    @property
    def name(self) -> str:
        """The range, for logs."""
        return f"t_{self.low:g}-{self.high:g}"

    def contains(self, t: Tensor) -> Tensor:
        """Which timesteps (B,) belong to the range: (B,) bool."""
        return (t >= self.low) & ((t < self.high) | (self.high == 1))

    def predict(self, strong: StrongPass, rows: Rows) -> Tensor:
        """The weak velocity in float32: on all rows if trainable, else on ``rows`` only."""
        # The strong pass comes first, with gradients: autocast caches the half-precision weights of
        # the first pass, and one cached under no_grad would cut the gradient of the next.
        with torch.set_grad_enabled(self.weak.trainable and torch.is_grad_enabled()):
            if self.weak.trainable:
                rows = slice(None)
            noisy, y, out = strong.noisy.take(rows), strong.y[rows], strong.out.take(rows)
            return self.weak.predict(strong.network, noisy, y, out).float()

    @abc.abstractmethod
    def evaluate(self, strong: StrongPass, rows: Rows) -> SegmentTerms:
        """This segment's part of target and loss, given the strong pass at all rows."""

    @abc.abstractmethod
    def describe(self) -> str:
        """One line: range, weak source, strength."""

    def report(
        self, strong: Tensor, weak: Tensor, v: Tensor, inside: Tensor
    ) -> dict[str, Statistic]:
        """RMS and maximum of strong, weak, their difference and v, for rows (n, C, H, W)."""
        named = dict(strong=strong.detach(), weak=weak.detach(), velocity=v.float())
        named["difference"] = named["strong"] - named["weak"]
        statistics = {}
        for name, value in named.items():
            largest = value.abs().flatten(1).amax(1)
            statistics[f"{self.name}/{name}_rms"] = Statistic(mean_square(value), inside, "rms")
            statistics[f"{self.name}/{name}_max"] = Statistic(largest, inside, "max")
        return statistics


def at_least_0(name: str, value: float) -> float:
    """``value`` itself.

    Raises:
        UserError: It is negative or not finite.
    """
    if not 0 <= value < math.inf:
        raise UserError(f"{name}={value}: must be a finite number, at least 0")
    return value
