"""What every segment offers: a range of timesteps, a weak source and a schedule.

Gradients stop in this folder only.

A control variate: most rows need no weak pass to be trained on the right target on average.

The shift of the target, scale (s - w), enters the gradient linearly. With a guess g of d = s - w at
all n rows of a segment, and the weak pass at m of them that are drawn at random,

    d' = g + (n / m) (d - g)  where w is known,    d' = g  elsewhere,

has the expectation d at every row, whatever the guess, as long as it does not depend on which rows
were drawn. Without a guess (g = 0) the variance per row is (n / m - 1) |d|^2; a guess leaves
(n / m - 1) |d - g|^2. (Control variates are standard in Monte Carlo; Owen, 2013, chapter 8.)

A target beyond the data's velocity, away from the weak prediction.

    target = v + scale * stopgrad(s - w),

with s the strong and w the weak prediction (Model Guidance, Tang et al., 2025; the SGG paper). The
general form, which covers MeanFlow's and GFT's targets as well, is

    target = omega * v + kappa * stopgrad(s) + (1 - omega - kappa) * stopgrad(w),

with kappa the scale; the fixed point is guidance by omega / (1 - kappa).

A penalty that pulls strong and weak prediction together.

This is what the released SGG code does below its guidance range: the target stays v, and
weight * |s - w|^2 is added with gradients to both sides; the weak side has no other loss there.
"""

import abc
import math
import warnings
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from w2s_train.errors import UserError
from w2s_train.interpolant import NoisySample, right_pad
from w2s_train.models import DiT, DiTOutput, FinalLayer
from w2s_train.schedule import Schedule, Timeline
from w2s_train.timesteps import at_least, chosen_first, subset
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


class Guess(nn.Module):
    """A head on the strong pass's last tokens that learns d = strong - weak by regression.

    It begins with zero. Its own loss |d - g|^2 at the rows that are evaluated reaches nothing else.

    Args:
        network: The network being trained.
    """

    def __init__(self, network: DiT) -> None:
        super().__init__()
        self.block = network.depth - 1
        self.head = FinalLayer(network.hidden_size, network.patch_size, network.in_channels)

    def complete(
        self, difference: Tensor, strong: StrongPass, chosen: Chosen
    ) -> tuple[Tensor, Tensor]:
        """The difference d' (n, C, H, W) at all rows, and the loss (B,) of the guess.

        Args:
            difference: d (m, C, H, W) at the evaluated rows.
            strong: The strong pass.
            chosen: Which rows these are.
        """
        hidden, cond = strong.out.hidden[self.block][chosen.rows], strong.out.cond[chosen.rows]
        guess = self.head(hidden.detach(), cond.detach()).float()
        n, m = len(guess), len(difference)
        places = torch.arange(n, device=guess.device) if chosen.places is None else chosen.places
        error, loss = difference - guess[places], torch.zeros_like(strong.noisy.t)
        loss[chosen.evaluated] = mean_square(error)
        weight = n / max(m, 1)
        return guess.detach().index_add(0, places, weight * error.detach()), loss


WARN_ABOVE = 0.6  # scales above it over-sharpened in every stability study known to us


class Extrapolation(Segment):
    """target = v + scale * stopgrad(strong - weak); a trainable weak source learns plain v.

    Scales above 0.6 are warned about, and 0.9 and above (0.8 for an average of the network)
    refused: in a two-dimensional study over-sharpening grows with the scale, and from there on it
    diverges for some sources; clipping gradients, a ramp or an interval did not rescue it, clipping
    the difference did.

    Args:
        low: Start of the range, inclusive.
        high: End of the range, exclusive.
        scale: kappa in the general form; guides by omega / (1 - scale).
        weak: The weak source.
        weak_loss_weight: Weight of a trainable source's own loss |weak - v|^2, on all rows.
        omega: Weight of v in the general form.
        max_difference: Limit to the RMS of strong - weak, per row; None is no limit. The part of
            the shift that is due to omega, (omega - 1) (v - weak), is not limited.
        from_average: Take strong and weak in the difference from the running average of the
            network, as released Model Guidance code does, at the cost of one more forward pass.
        schedule: When it starts and how it grows; None is at once and constant.
        share: Of its rows, how many the weak source is evaluated on, in (0, 1]; drawn anew at every
            step. See `Guess` for the others; the expectation of the gradient stays.
        allow_unstable: Accept any scale.

    Raises:
        UserError: A number out of its range; ``from_average`` with a source that is trained; a
            ``share`` below 1 with one, or with an ``omega``.
    """

    def __init__(
        self,
        low: float,
        high: float,
        scale: float,
        weak: WeakSource,
        weak_loss_weight: float = 0.2,
        omega: float = 1.0,
        max_difference: float | None = None,
        from_average: bool = False,
        schedule: Schedule | None = None,
        share: float = 1.0,
        allow_unstable: bool = False,
    ) -> None:
        super().__init__(low, high, weak, schedule)
        if not 0 < share <= 1:
            raise UserError(f"share={share}: must be in (0, 1]")
        if share < 1 and (weak.trainable or omega != 1):
            why = f"omega={omega}" if omega != 1 else f"{type(weak).__name__} learns on every row"
            raise UserError(f"share={share}: must be 1, {why}")
        self.share = share
        self.scale, self.omega = at_least_0("scale", scale), at_least_0("omega", omega)
        self.only_labelled = weak.needs_label and omega == 1
        self.weak_loss_weight = at_least_0("weak_loss_weight", weak_loss_weight)
        if max_difference is not None and not 0 < max_difference < math.inf:
            raise UserError(f"max_difference={max_difference}: must be a finite number above 0")
        if from_average and weak.trainable:
            raise UserError(
                f"from_average={from_average}: {type(weak).__name__} is trained on the network "
                "itself, must be a weak source without parameters of its own"
            )
        self.max_difference, self.from_average = max_difference, from_average
        self._guard(allow_unstable)

    def _guard(self, allow_unstable: bool) -> None:
        limit, guides = self.weak.scale_limit, self.effective_scale()
        if self.scale >= limit and not allow_unstable:
            raise UserError(
                f"scale={self.scale}: must be in [0, {limit}) for {type(self.weak).__name__}; it "
                f"guides by {guides:.3g}, and larger ones diverge (allow_unstable: true accepts it)"
            )
        if guides > 1 / (1 - WARN_ABOVE) + 1e-9:
            warnings.warn(
                f"scale={self.scale}: guides by {guides:.3g}; above 2.5 (scale {WARN_ABOVE}) "
                "samples are often over-sharpened",
                stacklevel=3,
            )

    def effective_scale(self, factor: float = 1.0) -> float:
        """The guidance scale of the fixed point, omega / (1 - kappa); infinite where there is none.

        Args:
            factor: Of the schedule.
        """
        kappa = factor * self.scale
        return (1 + factor * (self.omega - 1)) / (1 - kappa) if kappa < 1 else math.inf

    def describe(self) -> str:
        return (
            f"{self.low:g} <= t < {self.high:g}: {self.weak.describe()}, scale {self.scale:g}, "
            f"effective guidance scale {self.effective_scale():.3g}"
            + (", from the running average" if self.from_average else "")
            + (f", on {self.share:g} of the rows" if self.share < 1 else "")
            + (f", {self.schedule}" if self.schedule != Schedule() else "")
        )

    def bind(self, network: DiT) -> None:
        super().bind(network)
        if self.share < 1:
            self.guess = Guess(network)

    @property
    def keep_hidden(self) -> tuple[int, ...]:
        return super().keep_hidden + ((self.guess.block,) if self.share < 1 else ())

    @property
    def learns(self) -> bool:
        return super().learns or self.share < 1

    def evaluate(self, strong: StrongPass, chosen: Chosen) -> SegmentTerms:
        noisy, rows, penalty = strong.noisy, chosen.evaluated, None
        factor = self.factor(strong.step)
        velocity, weak = self._pair(strong, rows)
        if self.weak.trainable:
            penalty = self.weak_loss_weight * mean_square(weak - noisy.v)
            weak = weak[rows]
        velocity, weak, v = velocity.detach(), weak.detach(), noisy.v[rows].float()
        statistics = self._statistics(velocity, weak, v, noisy.t[rows], factor)
        difference = self._clip(velocity - weak)
        if self.share < 1:
            difference, penalty = self.guess.complete(difference, strong, chosen)
            values, inside = penalty.detach()[rows][None], self.contains(noisy.t[rows])[None]
            name = f"{self.name}/guess_error_rms"
            statistics.append(Statistic((name,), values, inside, "rms"))
            rows = chosen.rows
        shift = factor * self.scale * difference
        if self.omega != 1:
            shift = shift + factor * (self.omega - 1) * (v - weak)
        shift = right_pad(self.contains(noisy.t[rows]), shift) * shift
        return SegmentTerms(rows, shift, penalty, statistics)

    def _statistics(
        self, strong: Tensor, weak: Tensor, v: Tensor, t: Tensor, factor: float
    ) -> list[Statistic]:
        inside = self.contains(t)
        guides = torch.full_like(t, self.effective_scale(factor))[None]
        scale = Statistic((f"{self.name}/effective_scale",), guides, inside[None], "mean")
        return [*self.report(strong, weak, v, inside), scale]

    def _pair(self, strong: StrongPass, rows: Rows) -> tuple[Tensor, Tensor]:
        """Strong at ``rows`` and weak (at all rows if trainable), whose difference guides."""
        if not self.from_average:
            return strong.out.velocity[rows], self.predict(strong, rows)
        average, noisy, y = strong.step.average, strong.noisy.take(rows), strong.y[rows]
        assert average is not None, "from_average needs the running average"
        with torch.no_grad():
            out = average(noisy.x_t, noisy.t, y, keep_hidden=self.weak.keep_hidden)
            weak = self.weak.predict(average, noisy, y, out)
        return out.velocity.float(), weak.float()

    def _clip(self, difference: Tensor) -> Tensor:
        """Shrink rows (n, C, H, W) whose RMS is above the limit to it."""
        if self.max_difference is None:
            return difference
        rms = mean_square(difference).sqrt()
        return difference * right_pad((self.max_difference / rms).clamp(max=1), difference)


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
