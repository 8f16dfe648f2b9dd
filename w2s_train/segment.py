"""Segments: what a range of timesteps adds to the target and to the loss.

Two forms are published. `Extrapolation` shifts the target,

    target = v + scale * stopgrad(s - w),

with s the strong and w the weak prediction (Model Guidance, Tang et al., 2025; the SGG paper).
`Consistency` is what the released SGG code does below its guidance range: the target stays v, and
weight * |s - w|^2 is added with gradients to both sides, which pulls the two together; the weak
side has no other loss there.

Gradients stop in this file only.
"""

import abc
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from w2s_train.errors import UserError
from w2s_train.interpolant import NoisySample, right_pad
from w2s_train.models import DiT, DiTOutput
from w2s_train.weak import WeakSource

Rows = slice | Tensor


@dataclass(frozen=True)
class Statistic:
    """One number per row (n,), to be reduced over the rows in ``mask`` (n,) and over steps."""

    values: Tensor
    mask: Tensor
    reduce: Literal["mean", "rms", "max"]  # "rms": the root of the mean of ``values``


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

    Raises:
        UserError: The range is empty, inverted or not inside [0, 1].
    """

    def __init__(self, low: float, high: float, weak: WeakSource) -> None:
        super().__init__()
        if not 0 <= low < 1:
            raise UserError(f"low={low}: must be in [0, 1)")
        if not low < high <= 1:
            raise UserError(f"high={high}: must be in ({low}, 1], above low={low}")
        self.low, self.high, self.weak = low, high, weak

    @property
    def name(self) -> str:
        """The range, for logs."""
        return f"t_{self.low:g}-{self.high:g}"

    def contains(self, t: Tensor) -> Tensor:
        """Which timesteps (B,) belong to the range: (B,) bool."""
        return (t >= self.low) & ((t < self.high) | (self.high == 1))

    def predict(
        self, network: DiT, noisy: NoisySample, y: Tensor, strong: DiTOutput, rows: Rows
    ) -> Tensor:
        """The weak velocity in float32: on all rows if trainable, else on ``rows`` only."""
        # The strong pass comes first, with gradients: autocast caches the half-precision weights of
        # the first pass, and one cached under no_grad would cut the gradient of the next.
        with torch.set_grad_enabled(self.weak.trainable and torch.is_grad_enabled()):
            if self.weak.trainable:
                return self.weak.predict(network, noisy, y, strong).float()
            return self.weak.predict(network, noisy.take(rows), y[rows], strong.take(rows)).float()

    @abc.abstractmethod
    def evaluate(
        self, network: DiT, noisy: NoisySample, y: Tensor, strong: DiTOutput, rows: Rows
    ) -> SegmentTerms:
        """This segment's part of target and loss, given the strong pass at all rows."""

    def report(self, strong: Tensor, weak: Tensor, inside: Tensor) -> dict[str, Statistic]:
        """RMS and maximum of strong, weak and their difference, for rows (n, C, H, W)."""
        named = dict(strong=strong.detach(), weak=weak.detach())
        named["difference"] = named["strong"] - named["weak"]
        statistics = {}
        for name, value in named.items():
            largest = value.abs().flatten(1).amax(1)
            statistics[f"{self.name}/{name}_rms"] = Statistic(mean_square(value), inside, "rms")
            statistics[f"{self.name}/{name}_max"] = Statistic(largest, inside, "max")
        return statistics


class Extrapolation(Segment):
    """target = v + scale * stopgrad(strong - weak); a trainable weak source learns plain v.

    Args:
        low: Start of the range, inclusive.
        high: End of the range, exclusive.
        scale: In [0, 1); guides by 1 / (1 - scale).
        weak: The weak source.
        weak_loss_weight: Weight of a trainable source's own loss |weak - v|^2, on all rows.

    Raises:
        UserError: A scale outside [0, 1), or a negative weight.
    """

    def __init__(
        self,
        low: float,
        high: float,
        scale: float,
        weak: WeakSource,
        weak_loss_weight: float = 0.2,
    ) -> None:
        super().__init__(low, high, weak)
        if not 0 <= scale < 1:
            raise UserError(f"scale={scale}: must be in [0, 1); at 1 the target has no fixed point")
        self.scale = scale
        self.weak_loss_weight = _weight("weak_loss_weight", weak_loss_weight)

    def evaluate(
        self, network: DiT, noisy: NoisySample, y: Tensor, strong: DiTOutput, rows: Rows
    ) -> SegmentTerms:
        weak, penalty = self.predict(network, noisy, y, strong, rows), None
        if self.weak.trainable:
            penalty = self.weak_loss_weight * mean_square(weak - noisy.v)
            weak = weak[rows]
        inside = self.contains(noisy.t[rows])
        difference = (strong.velocity[rows] - weak).detach()
        shift = self.scale * right_pad(inside, difference) * difference
        statistics = self.report(strong.velocity[rows], weak, inside)
        scale = torch.full_like(noisy.t[rows], 1 / (1 - self.scale))
        statistics[f"{self.name}/effective_scale"] = Statistic(scale, inside, "mean")
        return SegmentTerms(rows, shift, penalty, statistics)


class Consistency(Segment):
    """target = v, and weight * |strong - weak|^2 with gradients to both.

    Args:
        low: Start of the range, inclusive.
        high: End of the range, exclusive.
        weak: The weak source.
        weight: Weight of the penalty.

    Raises:
        UserError: A negative weight.
    """

    def __init__(self, low: float, high: float, weak: WeakSource, weight: float = 0.2) -> None:
        super().__init__(low, high, weak)
        self.weight = _weight("weight", weight)

    def evaluate(
        self, network: DiT, noisy: NoisySample, y: Tensor, strong: DiTOutput, rows: Rows
    ) -> SegmentTerms:
        weak = self.predict(network, noisy, y, strong, rows)
        rows = slice(None) if self.weak.trainable else rows
        inside, velocity = self.contains(noisy.t[rows]), strong.velocity[rows]
        penalty = velocity.new_zeros(len(noisy.t))
        # Multiplied, not selected: the graph must be the same whichever timesteps were drawn.
        penalty[rows] = self.weight * inside * mean_square(velocity - weak)
        return SegmentTerms(rows, None, penalty, self.report(velocity, weak, inside))


def _weight(name: str, value: float) -> float:
    if not 0 <= value < float("inf"):
        raise UserError(f"{name}={value}: must be a finite number, at least 0")
    return value
