"""The equation: what the network is trained towards.

With the interpolant's velocity v, the strong prediction s (the network being trained) and the weak
prediction w of the segment that a timestep falls into, the network minimizes

    E || s - target ||^2,        target = v + scale * stopgrad(s - w).

The target moves with the network. Setting s = E[v] + scale (s - w) gives the fixed point

    s* = w + (E[v] - w) / (1 - scale),

guidance by 1 / (1 - scale) built into the weights: 0.3 is 1.43, 0.5 is 2, 0.6 is 2.5. At scale 1
there is no fixed point. Outside all segments the target is v: plain flow matching.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from w2s_train.errors import UserError
from w2s_train.interpolant import Interpolant, NoisySample
from w2s_train.models import DiT
from w2s_train.segment import Segment, Statistic, mean_square
from w2s_train.timesteps import TimestepDistribution


@dataclass(frozen=True)
class Losses:
    """The result of one evaluation of the objective."""

    total: Tensor  # (), what is minimized
    per_sample: Tensor  # (B,), its rows, detached
    statistics: dict[str, Statistic]  # what is logged


class WeakToStrongObjective(nn.Module):
    """The training objective.

    Args:
        interpolant: How data and noise are mixed.
        timesteps: Where training timesteps are drawn from.
        segments: Ranges of timesteps with their weak sources; None or empty is flow matching.

    Raises:
        UserError: Two segments overlap.
    """

    def __init__(
        self,
        interpolant: Interpolant,
        timesteps: TimestepDistribution,
        segments: list[Segment] | None = None,
    ) -> None:
        super().__init__()
        self.interpolant, self.timesteps = interpolant, timesteps
        ordered = sorted(segments or [], key=lambda segment: segment.low)
        for before, after in zip(ordered, ordered[1:], strict=False):
            if after.low < before.high:
                raise UserError(
                    f"segments=[{before.low}, {before.high}) and [{after.low}, {after.high}): "
                    "must not overlap"
                )
        self.segments: Sequence[Segment] = nn.ModuleList(ordered)  # type: ignore[assignment]

    def bind(self, network: DiT) -> None:
        """Introduce the weak sources to the network; once, before training."""
        for segment in self.segments:
            segment.weak.bind(network)

    def after_step(self, network: DiT) -> None:
        """Let the weak sources follow; after each optimizer step."""
        for segment in self.segments:
            segment.weak.after_step(network)

    def forward(self, network: DiT, x: Tensor, y: Tensor) -> Losses:
        """Draw timesteps and noise, and evaluate.

        Args:
            network: The network being trained.
            x: Data (B, C, H, W).
            y: Labels (B,) int64, dropped ones already replaced by the null class.
        """
        t = self.timesteps.draw(len(x), x.device, self.interpolant)
        noisy = self.interpolant.corrupt(x, torch.randn_like(x), t)
        rows = [
            self.timesteps.rows(segment.low, segment.high, len(x), self.interpolant)
            for segment in self.segments
        ]
        return self.evaluate(network, noisy, y, rows)

    def evaluate(
        self, network: DiT, noisy: NoisySample, y: Tensor, rows: list[slice] | None = None
    ) -> Losses:
        """The losses at given noisy samples.

        Args:
            network: The network being trained.
            noisy: Noisy samples, B rows.
            y: Labels (B,) int64.
            rows: Per segment, a slice that holds all its rows; None to look them up, for
                timesteps in any order.
        """
        keep = {block for segment in self.segments for block in segment.weak.keep_hidden}
        strong = network(noisy.x_t, noisy.t, y, keep_hidden=keep)
        strong = strong._replace(velocity=strong.velocity.float())
        target, penalties = noisy.v.float().clone(), list[Tensor]()
        statistics: dict[str, Statistic] = {}
        for i, segment in enumerate(self.segments):
            chosen = rows[i] if rows else segment.contains(noisy.t).nonzero().squeeze(1)
            if not segment.weak.trainable and len(noisy.t[chosen]) == 0:
                continue
            terms = segment.evaluate(network, noisy, y, strong, chosen)
            statistics |= terms.statistics
            if terms.shift is not None:
                target[terms.rows] += terms.shift
            if terms.penalty is not None:
                penalties.append(terms.penalty)
        strong_loss = mean_square(strong.velocity - target)
        per_sample = strong_loss + sum(penalties) if penalties else strong_loss
        statistics |= self._loss_statistics(per_sample.detach(), strong_loss.detach(), noisy.t)
        return Losses(per_sample.mean(), per_sample.detach(), statistics)

    def _loss_statistics(self, total: Tensor, strong: Tensor, t: Tensor) -> dict[str, Statistic]:
        """The whole loss, and the strong one per quarter of time and per segment."""
        everywhere = torch.ones_like(t, dtype=torch.bool)
        statistics = {
            "loss": Statistic(total, everywhere, "mean"),
            "strong_loss": Statistic(strong, everywhere, "mean"),
        }
        quarter = (t * 4).long().clamp(0, 3)
        for q in range(4):
            key = f"quarter_{q / 4:g}-{(q + 1) / 4:g}/strong_loss"
            statistics[key] = Statistic(strong, quarter == q, "mean")
        for segment in self.segments:
            statistics[f"{segment.name}/strong_loss"] = Statistic(
                strong, segment.contains(t), "mean"
            )
        return statistics
