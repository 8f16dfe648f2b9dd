"""Segments: what a range of timesteps adds to the target and to the loss.

`Extrapolation` moves the target beyond the data's velocity v, away from the weak prediction w:

    target = v + scale * stopgrad(s - w),

with s the strong prediction (Model Guidance, Tang et al., 2025; the SGG paper). The general form,
which covers MeanFlow's and GFT's targets as well, is

    target = omega * v + kappa * stopgrad(s) + (1 - omega - kappa) * stopgrad(w),

with kappa the scale; the fixed point is guidance by omega / (1 - kappa).

The scale may be drawn for each row and told to the network (`inbuilt.laws`): the choice of one is
then left to sampling. Segments with drawn scales w_k may overlap, with W their sum over a row:

    s* = E[v] + sum_k w_k / (1 - W) * (E[v] - w_k's weak).

`Consistency`, from a file of its own, is a penalty instead. Gradients stop in this file only.
"""

import abc
import math
import re
import warnings
from importlib import import_module
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from w2s_train.errors import UserError, require
from w2s_train.guideability.ratio import Difference
from w2s_train.inbuilt.laws import Drawn, check_fits
from w2s_train.interpolant import NoisySample, right_pad
from w2s_train.log import Log
from w2s_train.models import DiTOutput, Network
from w2s_train.schedule import Schedule
from w2s_train.weak.base import Step, WeakSource

Rows = slice | Tensor  # of a batch: a range, or an index (n,)
WARN_ABOVE = 0.6  # scales above it over-sharpened in every stability study known to us


class Strong(NamedTuple):
    """The network being trained, evaluated on a whole batch of B rows."""

    network: Network
    noisy: NoisySample
    y: Tensor  # (B,) labels, dropped ones replaced by the null class
    out: DiTOutput  # with the velocity in float32
    step: Step
    scales: dict[str, Tensor]  # (B,) of each segment whose scale is drawn
    found: list[Difference]  # by the segments


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
        name: In logs, and as a key; None is its range, such as t_0.2-1.

    Raises:
        UserError: The range is empty, inverted or not inside [0, 1]; a name that is no word.
    """

    watch_only = False  # whether it has no influence, see `look_on`

    def __init__(
        self,
        low: float,
        high: float,
        weak: WeakSource,
        schedule: Schedule | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__()
        self.low = require("low", low, "[0, 1)")
        if not low < high <= 1:
            raise UserError(f"high={high}: must be in ({low}, 1], above low={low}")
        if name is not None and not re.fullmatch(r"[A-Za-z][\w-]*", name, re.ASCII):
            raise UserError(f"name={name}: must be letters, digits, _ and -, a letter first")
        self.name = name or f"t_{low:g}-{high:g}"
        self.title = f"{f'{name}, ' if name else ''}{low:g} <= t < {high:g}"
        self.high, self.weak, self.schedule = high, weak, schedule or Schedule()
        self.only_labelled = weak.needs_label  # the difference is 0 where the label was dropped
        self.drawn: Drawn | None = None  # the law of the scale, if it is one
        self.planned: Schedule | None = None
        self.total: int | None = None

    def plan(self, total: int | None, last: int | None) -> None:
        """Learn how long plan and run will be, as `WeakSource.plan`; UserError: it never acts."""
        self.planned = self.schedule.plan(total, last, self.weak.plan(total, last))
        self.total = total

    def factor(self, step: Step) -> float:
        """What the schedule multiplies the strength by; 0 before it and the source begin."""
        if not self.weak.ready:
            return 0.0
        if self.planned is None:  # outside a run
            self.plan(None, None)
        assert self.planned is not None
        return self.planned.factor(step.number, self.total)

    def contains(self, t: Tensor) -> Tensor:
        """Which timesteps (B,) belong to the range: (B,) bool."""
        return (t >= self.low) & ((t < self.high) | (self.high == 1))

    @abc.abstractmethod
    def act(self, strong: Strong, rows: Rows, target: Tensor, log: Log) -> Tensor:
        """Move the target, and return this segment's own loss per row (B,).

        Args:
            strong: The strong pass at all rows.
            rows: The rows to act on; those whose timestep is outside the range are left alone.
            target: (B, C, H, W), changed in place at ``rows``.
            log: Takes the numbers to log.
        """

    @abc.abstractmethod
    def describe(self) -> str:
        """One line: range, weak source, strength."""

    def weak_inputs(self, strong: Strong, rows: Rows) -> tuple[NoisySample, Tensor, DiTOutput]:
        """What the weak source gets: all rows if it is trained, else ``rows``."""
        rows = slice(None) if self.weak.trainable else rows
        return strong.noisy.take(rows), strong.y[rows], strong.out.take(rows, self.weak.keep_hidden)

    def gradients(self) -> torch.set_grad_enabled:
        """For the weak pass: gradients if the source is trained.

        The strong pass comes first, with gradients: autocast caches the half-precision weights of
        the first pass, and one cached under no_grad would cut the gradient of the next.
        """
        return torch.set_grad_enabled(self.weak.trainable and torch.is_grad_enabled())

    def report(self, log: Log, strong: Tensor, weak: Tensor, v: Tensor, inside: Tensor) -> None:
        """Log RMS and maximum of strong, weak, v and strong - weak at rows (n, C, H, W)."""
        strong, weak = strong.detach(), weak.detach()
        numbers = torch.stack([strong, weak, v, strong - weak]).flatten(2)
        sides = [f"{self.name}/{side}" for side in ("strong", "weak", "velocity", "difference")]
        log.add(tuple(f"{side}_rms" for side in sides), numbers.square().mean(2), inside[None])
        log.add(tuple(f"{side}_max" for side in sides), numbers.abs().amax(2), inside[None])


class Extrapolation(Segment):
    """target = v + scale * stopgrad(strong - weak); a trainable weak source learns plain v.

    Scales above 0.6 are warned about, and 0.9 and above (0.8 for an average of the network)
    refused: in a two-dimensional study over-sharpening grows with the scale, and from there on it
    diverges for some sources; clipping gradients, a ramp or an interval did not rescue it, clipping
    the difference did.

    Args:
        low: Start of the range, inclusive.
        high: End of the range, exclusive.
        scale: kappa in the general form; guides by omega / (1 - scale). Or a law that it is drawn
            from, row by row; the network is told it then, under ``name``.
        weak: The weak source.
        weak_loss_weight: Weight of a trainable source's own loss |weak - v|^2, on all rows.
        omega: Weight of v in the general form.
        max_difference: Limit to the RMS of strong - weak, per row; None is no limit. The part of
            the shift that is due to omega, (omega - 1) (v - weak), is not limited.
        from_average: Take strong and weak in the difference from the running average of the
            network, as released Model Guidance code does, at the cost of one more forward pass.
        schedule: When it starts and how it grows; None is at once and constant.
        allow_unstable: Accept any scale.
        name: In logs, and as a key; None is its range.

    Raises:
        UserError: A number out of its range; ``from_average`` with a source that is trained.
    """

    def __init__(
        self,
        low: float,
        high: float,
        scale: float | Drawn,
        weak: WeakSource,
        weak_loss_weight: float = 0.2,
        omega: float = 1.0,
        max_difference: float | None = None,
        from_average: bool = False,
        schedule: Schedule | None = None,
        allow_unstable: bool = False,
        name: str | None = None,
    ) -> None:
        super().__init__(low, high, weak, schedule, name)
        if isinstance(scale, Drawn):
            self.drawn, scale = scale, scale.high
            check_fits(name, omega, from_average)
        self.scale = require("scale", scale, "[0, inf)")
        self.omega = require("omega", omega, "[0, inf)")
        self.only_labelled = weak.needs_label and omega == 1
        self.weak_loss_weight = require("weak_loss_weight", weak_loss_weight, "[0, inf)")
        if max_difference is not None:
            require("max_difference", max_difference, "(0, inf)")
        if from_average and weak.trainable:
            raise UserError(
                f"from_average={from_average}: {type(weak).__name__} is trained on the network "
                "itself, must be a weak source without parameters of its own"
            )
        self.max_difference, self.from_average = max_difference, from_average
        limit, guides, law = weak.scale_limit, self.effective_scale(), self.drawn
        if scale >= limit and not allow_unstable:
            said = f"{law} in {name}, which reaches {scale:g}" if law else f"{scale}"
            raise UserError(
                f"scale={said}: must be in [0, {limit}) for {type(weak).__name__}; "
                f"it guides by {guides:.3g}, and larger ones diverge (allow_unstable: true accepts)"
            )
        if guides > 1 / (1 - WARN_ABOVE) + 1e-9 and not self.drawn:
            warnings.warn(
                f"scale={scale}: guides by {guides:.3g}; above 2.5 (scale {WARN_ABOVE}) "
                "samples are often over-sharpened",
                stacklevel=2,
            )

    def effective_scale(self, factor: float = 1.0) -> float:
        """Guidance of the fixed point, omega / (1 - kappa), or infinite; factor: the schedule's."""
        kappa = factor * self.scale
        return (1 + factor * (self.omega - 1)) / (1 - kappa) if kappa < 1 else math.inf

    def describe(self) -> str:
        law = f"drawn, {self.drawn.describe()}, up to" if self.drawn else f"{self.scale:g},"
        return (
            f"{self.title}: {self.weak.describe()}, scale {law} "
            f"effective guidance scale {self.effective_scale():.3g}"
            + (", from the running average" if self.from_average else "")
            + (f", {self.schedule}" if self.schedule != Schedule() else "")
        )

    def act(self, strong: Strong, rows: Rows, target: Tensor, log: Log) -> Tensor:
        network, noisy, penalty = strong.network, strong.noisy, torch.zeros_like(strong.noisy.t)
        inputs, velocity = self.weak_inputs(strong, rows), strong.out.velocity[rows]
        with self.gradients():
            if self.from_average:
                assert strong.step.average is not None, "from_average needs the running average"
                network, (x, y, _) = strong.step.average, inputs
                out = network(x.x_t, x.t, y, keep_hidden=self.weak.keep_hidden)
                inputs, velocity = (x, y, out), out.velocity.float()
            weak = self.weak.predict_at(network, *inputs).float()
        if self.weak.trainable:
            penalty = self.weak_loss_weight * mean_square(weak - noisy.v)
            weak = weak[rows]
        velocity, weak, v = velocity.detach(), weak.detach(), noisy.v[rows].float()
        inside, factor = self.contains(noisy.t[rows]), self.factor(strong.step)
        guides = torch.full_like(noisy.t[rows], self.effective_scale(factor))
        goal, scale = 1 - 1 / guides, cast(Any, factor * self.scale)
        if self.drawn:
            goal = strong.scales[self.name][rows]
            total = torch.stack([*strong.scales.values()]).sum(0)[rows]
            inside, guides = inside & (goal > 0), 1 + goal / (1 - total)
            explained = mean_square(v / right_pad(1 - total, v))
            log.add((f"{self.name}/explained_rms",), explained[None], inside[None])
            scale = right_pad(goal, v)
        self.report(log, velocity, weak, v, inside)
        log.add((f"{self.name}/effective_scale",), guides[None], inside[None])
        difference, none = velocity - weak, self.from_average or self.max_difference is not None
        found = (self.name, rows, difference, v - velocity, inside, None if none else goal)
        strong.found.append(Difference(*found, drawn=self.drawn is not None))
        shift = scale * self.clip(difference)
        if self.omega != 1:
            shift = shift + factor * (self.omega - 1) * (v - weak)
        target[rows] += right_pad(inside, shift) * shift
        return penalty

    def clip(self, difference: Tensor) -> Tensor:
        """Shrink rows (n, C, H, W) whose RMS is above the limit to it."""
        if self.max_difference is None:
            return difference
        rms = mean_square(difference).sqrt()
        return difference * right_pad((self.max_difference / rms).clamp(max=1), difference)


def __getattr__(name: str) -> Any:
    if name == "Consistency":  # which moved into a file of its own
        return import_module("w2s_train.consistency").Consistency
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
