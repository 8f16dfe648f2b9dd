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
from w2s_train.rows import at_least, chosen_first, subset
from w2s_train.schedule import Schedule, Timeline
from w2s_train.weak.base import Step, WeakSource

Rows = slice | Tensor


@dataclass(frozen=True)
class Statistic:
    """K numbers per row, to be reduced over rows and over steps."""

    names: tuple[str, ...]  # K
    values: Tensor  # (K, n), or (1, n) for all
    mask: Tensor  # (K, n) bool, or (1, n) for all: the rows that count
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
class Chosen:
    """The rows that a segment acts on, and those of them that its weak source sees."""

    rows: Rows
    places: Tensor | None = None  # (m,) int64 among ``rows``; None is all

    @property
    def evaluated(self) -> Rows:
        """The rows that the weak source sees."""
        if self.places is None:
            return self.rows
        if isinstance(self.rows, slice):
            return self.rows.start + self.places
        return self.rows[self.places]


@dataclass(frozen=True)
class SegmentTerms:
    """What a segment contributes, and what it reports."""

    rows: Rows  # the rows that `shift` is for
    shift: Tensor | None  # (n, C, H, W), added to the target at those rows
    penalty: Tensor | None  # (B,), added to the loss
    statistics: list[Statistic]


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

    share: float = 1.0  # of the rows that it acts on, how many the weak source sees

    def __init__(
        self, low: float, high: float, weak: WeakSource, schedule: Schedule | None = None
    ) -> None:
        super().__init__()
        if not 0 <= low < 1:
            raise UserError(f"low={low}: must be in [0, 1)")
        if not low < high <= 1:
            raise UserError(f"high={high}: must be in ({low}, 1], above low={low}")
        self.low, self.high, self.weak = low, high, weak
        self.only_labelled = weak.needs_label  # the difference is 0 where the label was dropped
        self.schedule = schedule or Schedule()
        self.timeline = Timeline()

    def bind(self, network: DiT) -> None:
        """Meet the network; once, before training."""
        self.weak.bind(network)

    @property
    def keep_hidden(self) -> tuple[int, ...]:
        """Blocks whose tokens the strong pass must keep."""
        return self.weak.keep_hidden

    @property
    def learns(self) -> bool:
        """Whether the loss reaches parameters of its own; then it is evaluated at every step."""
        return self.weak.trainable

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

    def choose(self, rows: slice, labelled: Tensor, label_dropout: float) -> Chosen:
        """The rows to act on and those that the weak source is to see, as many at every step.

        Args:
            rows: All rows of the segment.
            labelled: Which rows (B,) of the batch have a label.
            label_dropout: The share that has none, as `rows.spread` chooses them.
        """
        n, index = rows.stop - rows.start, None
        if self.only_labelled and (dropped := at_least(n, label_dropout)):
            n -= dropped
            index = rows.start + chosen_first(labelled[rows], n)
        m = max(round(self.share * n), 1)
        places = subset(n, m, labelled.device) if self.share < 1 and n else None
        return Chosen(rows if index is None else index, places)

    def predict(self, strong: StrongPass, rows: Rows) -> Tensor:
        """The weak velocity in float32: on all rows if trainable, else on ``rows`` only."""
        # The strong pass comes first, with gradients: autocast caches the half-precision weights of
        # the first pass, and one cached under no_grad would cut the gradient of the next.
        with torch.set_grad_enabled(self.weak.trainable and torch.is_grad_enabled()):
            if self.weak.trainable:
                rows = slice(None)
            noisy, y = strong.noisy.take(rows), strong.y[rows]
            out = strong.out.take(rows, self.weak.keep_hidden)
            return self.weak.predict(strong.network, noisy, y, out).float()

    @abc.abstractmethod
    def evaluate(self, strong: StrongPass, chosen: Chosen) -> SegmentTerms:
        """This segment's part of target and loss, given the strong pass at all rows."""

    @abc.abstractmethod
    def describe(self) -> str:
        """One line: range, weak source, strength."""

    def report(self, strong: Tensor, weak: Tensor, v: Tensor, inside: Tensor) -> list[Statistic]:
        """RMS and maximum of strong, weak, their difference and v, for rows (n, C, H, W)."""
        strong, weak = strong.detach(), weak.detach()
        sides = ("strong", "weak", "velocity", "difference")
        numbers = torch.stack([strong, weak, v.float(), strong - weak]).flatten(2)
        return [
            Statistic(self._names(sides, "rms"), numbers.square().mean(2), inside[None], "rms"),
            Statistic(self._names(sides, "max"), numbers.abs().amax(2), inside[None], "max"),
        ]

    def _names(self, sides: tuple[str, ...], kind: str) -> tuple[str, ...]:
        return tuple(f"{self.name}/{side}_{kind}" for side in sides)


def at_least_0(name: str, value: float) -> float:
    """``value`` itself.

    Raises:
        UserError: It is negative or not finite.
    """
    if not 0 <= value < math.inf:
        raise UserError(f"{name}={value}: must be a finite number, at least 0")
    return value
