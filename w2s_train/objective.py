"""The equation: what the network is trained towards.

With the interpolant's velocity v, the strong prediction s (the network being trained) and the weak
prediction w of the segment that a timestep falls into, the network minimizes

    E || s - target ||^2,        target = v + scale * stopgrad(s - w).

The target moves with the network. Setting s = E[v] + scale (s - w) gives the fixed point

    s* = w + (E[v] - w) / (1 - scale),

guidance by 1 / (1 - scale) built into the weights: 0.3 is 1.43, 0.5 is 2, 0.6 is 2.5. At scale 1
there is no fixed point. Outside all segments the target is v: plain flow matching. `segment/` has
the general form.
"""

import abc
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from w2s_train.errors import UserError
from w2s_train.interpolant import Interpolant, NoisySample
from w2s_train.models import DiT
from w2s_train.schedule import Timeline
from w2s_train.segment import Chosen, Segment, Statistic, StrongPass, mean_square
from w2s_train.timesteps import TimestepDistribution
from w2s_train.weak.base import Step

FIRST_STEP = Step()


@dataclass(frozen=True)
class Losses:
    """The result of one evaluation of the objective."""

    total: Tensor  # (), what is minimized
    per_sample: Tensor  # (B,), its rows, detached
    statistics: list[Statistic]  # what is logged


class Objective(nn.Module, abc.ABC):
    """What a network is trained towards; without segments unless a subclass has some.

    Args:
        interpolant: How data and noise are mixed.
        timesteps: Where training timesteps are drawn from.
    """

    def __init__(self, interpolant: Interpolant, timesteps: TimestepDistribution) -> None:
        super().__init__()
        self.interpolant, self.timesteps = interpolant, timesteps
        self.segments: Sequence[Segment] = ()

    def bind(self, network: DiT, label_dropout: float = 0.0) -> None:  # noqa: B027
        """Introduce what has weights of its own to the network; once, before training.

        Args:
            network: The network being trained.
            label_dropout: Share of labels that `rows.spread` replaces by the null class.
        """

    def plan(self, max_steps: int | None) -> None:  # noqa: B027
        """Learn how long the run will be, in optimizer steps; before it starts.

        Raises:
            UserError: A step of a schedule or of a weak source that lies after the last one.
        """

    def after_step(self, network: DiT, step: Step) -> None:  # noqa: B027
        """Let what follows the network do so; after each optimizer step."""

    @abc.abstractmethod
    def forward(self, network: DiT, x: Tensor, y: Tensor, step: Step = FIRST_STEP) -> Losses:
        """Draw timesteps and noise, and evaluate.

        Args:
            network: The network being trained.
            x: Data (B, C, H, W).
            y: Labels (B,) int64, dropped ones already replaced by the null class.
            step: Where training stands.
        """


class WeakToStrongObjective(Objective):
    """The training objective.

    Args:
        interpolant: How data and noise are mixed.
        timesteps: Where training timesteps are drawn from.
        segments: Ranges of timesteps with their weak sources; None or empty is flow matching.
        total_steps: Optimizer steps of the plan that schedules given as shares refer to; None for
            ``trainer.max_steps``. Stated, a run may be cut short or extended without moving them.

    Raises:
        UserError: Two segments overlap, or a plan of no steps.
    """

    def __init__(
        self,
        interpolant: Interpolant,
        timesteps: TimestepDistribution,
        segments: list[Segment] | None = None,
        total_steps: int | None = None,
    ) -> None:
        super().__init__(interpolant, timesteps)
        if total_steps is not None and total_steps < 1:
            raise UserError(f"total_steps={total_steps}: must be at least 1")
        self.total_steps, self.label_dropout = total_steps, 0.0
        ordered = sorted(segments or [], key=lambda segment: segment.low)
        for before, after in zip(ordered, ordered[1:], strict=False):
            if after.low < before.high:
                raise UserError(
                    f"segments=[{before.low}, {before.high}) and [{after.low}, {after.high}): "
                    "must not overlap"
                )
        self.segments = nn.ModuleList(ordered)  # type: ignore[assignment]

    def bind(self, network: DiT, label_dropout: float = 0.0) -> None:
        self.label_dropout = label_dropout
        for segment in self.segments:
            segment.bind(network)

    def plan(self, max_steps: int | None) -> None:
        for segment in self.segments:
            segment.plan(Timeline(self.total_steps or max_steps, max_steps))
        if self.segments and self.total_steps and max_steps and max_steps > self.total_steps:
            warnings.warn(
                f"total_steps={self.total_steps}: is shorter than this run, {max_steps}; shares of "
                "the plan and alpha refer to total_steps",
                stacklevel=2,
            )

    def after_step(self, network: DiT, step: Step) -> None:
        for segment in self.segments:
            segment.weak.after_step(network, step)
            if segment.weak.learns_at(step):
                x, y = self.last_batch
                segment.weak.learn(self.draw(x), y, step)

    def draw(self, x: Tensor) -> NoisySample:
        """Noisy samples of data (B, C, H, W), at timesteps in ascending order."""
        t = self.timesteps.draw(len(x), x.device, self.interpolant)
        return self.interpolant.corrupt(x, torch.randn_like(x), t)

    def forward(self, network: DiT, x: Tensor, y: Tensor, step: Step = FIRST_STEP) -> Losses:
        noisy = self.draw(x)
        self.last_batch = (x, y)
        labelled, chosen = y != network.null_class, list[Chosen]()
        for segment in self.segments:
            rows = self.timesteps.rows(segment.low, segment.high, len(x), self.interpolant)
            chosen.append(segment.choose(rows, labelled, self.label_dropout))
        return self.evaluate(network, noisy, y, chosen, step)

    def evaluate(
        self,
        network: DiT,
        noisy: NoisySample,
        y: Tensor,
        chosen: list[Chosen] | None = None,
        step: Step = FIRST_STEP,
    ) -> Losses:
        """The losses at given noisy samples.

        Args:
            network: The network being trained.
            noisy: Noisy samples, B rows.
            y: Labels (B,) int64.
            chosen: Per segment, the rows to evaluate it on; None for all that it has, which are
                looked up, for timesteps in any order.
            step: Where training stands.
        """
        keep = {block for segment in self.segments for block in segment.keep_hidden}
        out = network(noisy.x_t, noisy.t, y, keep_hidden=keep)
        strong = StrongPass(network, noisy, y, out._replace(velocity=out.velocity.float()), step)
        target, penalties = noisy.v.float().clone(), list[Tensor]()
        statistics = list[Statistic]()
        for i, segment in enumerate(self.segments):
            rows = chosen[i] if chosen else Chosen(segment.contains(noisy.t).nonzero().squeeze(1))
            idle = len(noisy.t[rows.rows]) == 0 or segment.factor(step) == 0
            if idle and not segment.learns:
                continue
            terms = segment.evaluate(strong, rows)
            statistics += terms.statistics
            if terms.shift is not None:
                target[terms.rows] += terms.shift
            if terms.penalty is not None:
                penalties.append(terms.penalty)
        strong_loss = mean_square(strong.out.velocity - target)
        per_sample = sum(penalties, start=strong_loss)
        statistics += self._loss_statistics(per_sample.detach(), strong_loss.detach(), noisy.t)
        return Losses(per_sample.mean(), per_sample.detach(), statistics)

    def _loss_statistics(self, total: Tensor, strong: Tensor, t: Tensor) -> list[Statistic]:
        """The whole loss, and the strong one per quarter of time and per segment."""
        everywhere = torch.ones_like(t, dtype=torch.bool)
        quarter = (t * 4).long().clamp(0, 3)
        parts = {"": everywhere}
        parts |= {f"quarter_{q / 4:g}-{(q + 1) / 4:g}/": quarter == q for q in range(4)}
        parts |= {f"{segment.name}/": segment.contains(t) for segment in self.segments}
        names = tuple(f"{part}strong_loss" for part in parts)
        return [
            Statistic(("loss",), total[None], everywhere[None], "mean"),
            Statistic(names, strong[None], torch.stack(list(parts.values())), "mean"),
        ]
