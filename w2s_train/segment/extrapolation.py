"""A target beyond the data's velocity, away from the weak prediction.

    target = v + scale * stopgrad(s - w),

with s the strong and w the weak prediction (Model Guidance, Tang et al., 2025; the SGG paper). The
general form, which covers MeanFlow's and GFT's targets as well, is

    target = omega * v + kappa * stopgrad(s) + (1 - omega - kappa) * stopgrad(w),

with kappa the scale; the fixed point is guidance by omega / (1 - kappa).
"""

import math
import warnings

import torch
from torch import Tensor

from w2s_train.errors import UserError
from w2s_train.interpolant import right_pad
from w2s_train.models import DiT
from w2s_train.schedule import Schedule
from w2s_train.segment.base import (
    Chosen,
    Rows,
    Segment,
    SegmentTerms,
    Statistic,
    StrongPass,
    at_least_0,
    mean_square,
)
from w2s_train.segment.guess import Guess
from w2s_train.weak.base import WeakSource

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
