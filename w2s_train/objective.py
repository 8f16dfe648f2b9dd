"""The equation: what the network is trained towards.

With the interpolant's velocity v, the strong prediction s (the network being trained) and the weak
prediction w of the segment that a timestep falls into, the network minimizes

    E || s - target ||^2,        target = v + scale * stopgrad(s - w).

The target moves with the network. Setting s = E[v] + scale (s - w) gives the fixed point

    s* = w + (E[v] - w) / (1 - scale),

guidance by 1 / (1 - scale) built into the weights: 0.3 is 1.43, 0.5 is 2, 0.6 is 2.5. At scale 1
there is no fixed point. Outside all segments the target is v: plain flow matching. `segment` has
the general form, and that with scales that are drawn and told to the network.
"""

import abc
import itertools
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from w2s_train.align import Alignment, Alignments
from w2s_train.errors import UserError, distinct, require
from w2s_train.guideability.ratio import note
from w2s_train.inbuilt.rows import scales_of
from w2s_train.interpolant import Interpolant, NoisySample
from w2s_train.log import Log
from w2s_train.models import Network, as_output, check_prediction, offered
from w2s_train.segment import Rows, Segment, Strong, mean_square
from w2s_train.timesteps import TimestepDistribution, at_least, chosen_first
from w2s_train.weak.base import Step


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
        self.lookers: Sequence[Segment] = ()  # segments that only look on, see `look_on`
        self.align = Alignments()

    def bind(self, network: Network, label_dropout: float | None = None) -> None:  # noqa: B027
        """Introduce what has weights of its own to the network; before training.

        ``label_dropout`` is the share of labels that `timesteps.spread` replaces by the null class,
        None outside training. UserError: a weak source that does not fit the network or the share.
        """

    def plan(self, max_steps: int | None) -> None:  # noqa: B027
        """Learn the number of optimizer steps before the first; UserError: a part begins later."""

    def after_step(self, network: Network, step: Step) -> None:  # noqa: B027
        """Let what follows the network do so; after each optimizer step."""

    @abc.abstractmethod
    def forward(self, network: Network, x: Tensor, y: Tensor, step: Step, log: Log) -> Tensor:
        """Draw timesteps and noise, and give the loss per row (B,).

        Args:
            network: The network being trained.
            x: Data (B, C, H, W).
            y: Labels (B,) int64, dropped ones already replaced by the null class.
            step: Where training stands.
            log: Takes the numbers to log.
        """


class WeakToStrongObjective(Objective):
    """The training objective.

    Args:
        interpolant: How data and noise are mixed.
        timesteps: Where training timesteps are drawn from.
        segments: Ranges of timesteps with their weak sources; None or empty is flow matching.
        total_steps: Optimizer steps of the plan that schedules given as shares refer to; None for
            ``trainer.max_steps``. Stated, a run may be cut short or extended without moving them.
        align: What draws tokens of the network towards an encoder's, such as REPA; None is nothing.

    Raises:
        UserError: Two segments overlap or have one name, or a plan of no steps.
    """

    def __init__(
        self,
        interpolant: Interpolant,
        timesteps: TimestepDistribution,
        segments: list[Segment] | None = None,
        total_steps: int | None = None,
        align: list[Alignment] | None = None,
    ) -> None:
        super().__init__(interpolant, timesteps)
        if total_steps is not None:
            require("total_steps", total_steps, "[1, inf)")
        self.total_steps, self.label_dropout = total_steps, 0.0
        everyone = sorted(segments or [], key=lambda segment: segment.low)
        ordered = [segment for segment in everyone if not segment.watch_only]
        for one, other in itertools.combinations(ordered, 2):
            if other.low < one.high and not (one.drawn and other.drawn):
                both = f"[{one.low}, {one.high}) and [{other.low}, {other.high})"
                raise UserError(f"segments={both}: must not overlap, unless both draw their scales")
        distinct("segments", [segment.name for segment in everyone])
        self.align = Alignments(align)
        self.segments = nn.ModuleList(ordered)  # type: ignore[assignment]
        self.lookers = nn.ModuleList(s for s in everyone if s.watch_only)  # type: ignore[assignment]
        self.drawn = [segment for segment in segments or [] if segment.drawn]

    def bind(self, network: Network, label_dropout: float | None = None) -> None:
        self.label_dropout = label_dropout or 0.0
        self.align.bind(network)
        check_prediction(network, self.interpolant)
        if self.drawn:
            add_scales = offered(network, "a drawn scale", "add_scales", "scales=")
            add_scales([segment.name for segment in self.drawn])
        for weak in (segment.weak for segment in (*self.segments, *self.lookers)):
            weak.bind(network)
            if weak.needs_label and label_dropout in ((0, 1) if weak.needs_null else (1,)):
                rule = f"below 1 for {weak.describe()}, which compares with and without the label"
                if label_dropout == 0:
                    rule = f"above 0 for {weak.describe()}: the null class would never be trained"
                raise UserError(f"label_dropout={label_dropout}: must be {rule}")

    def plan(self, max_steps: int | None) -> None:
        for segment in (*self.segments, *self.lookers):
            segment.plan(self.total_steps or max_steps, max_steps)
        self.align.load()
        if self.segments and self.total_steps and max_steps and max_steps > self.total_steps:
            said = f"is shorter than this run, {max_steps}; shares of the plan and alpha refer to"
            warnings.warn(f"total_steps={self.total_steps}: {said} total_steps", stacklevel=2)

    def after_step(self, network: Network, step: Step) -> None:
        def fresh() -> tuple[NoisySample, Tensor]:
            return self.draw(self.last_batch[0]), self.last_batch[1]

        for segment in (*self.segments, *self.lookers):
            segment.weak.after_step(network, step, fresh)

    def draw(self, x: Tensor) -> NoisySample:
        """Noisy samples of data (B, C, H, W), at timesteps in ascending order."""
        t = self.timesteps.draw(len(x), x.device, self.interpolant)
        return self.interpolant.corrupt(x, torch.randn_like(x), t)

    def rows(self, segment: Segment, labelled: Tensor, scales: dict[str, Tensor]) -> Rows:
        """The rows that a segment acts on, as many at every step.

        Args:
            segment: One of ours.
            labelled: Which rows (B,) of the batch have a label.
            scales: (B,) of each segment that draws its own.
        """
        rows = self.timesteps.rows(segment.low, segment.high, len(labelled), self.interpolant)
        n = rows.stop - rows.start
        dropped = at_least(n, self.label_dropout) if segment.only_labelled else 0
        if segment.drawn and not segment.weak.trainable:
            labelled = scales[segment.name] > 0
            dropped = max(dropped, at_least(n, segment.drawn.plain))
        return rows.start + chosen_first(labelled[rows], n - dropped) if dropped else rows

    def forward(self, network: Network, x: Tensor, y: Tensor, step: Step, log: Log) -> Tensor:
        self.last_batch = (x, y)
        noisy, labelled = self.draw(x), y != network.null_class
        everyone = (*self.segments, *self.lookers)
        keep = {b for segment in everyone for b in segment.weak.keep_hidden} | self.align.blocks
        options: dict[str, Any] = {"keep_hidden": keep} if keep else {}
        if scales := scales_of(self.drawn, noisy.t, labelled, step):
            options["scales"] = torch.stack([*scales.values()], 1)
        out = as_output(network(noisy.x_t, noisy.t, y, **options), noisy.x_t)
        strong = Strong(network, noisy, y, out, step, scales, [])
        target, penalties = noisy.v.float().clone(), self.align(step.batch, out, log)
        for segment in everyone:
            rows = self.rows(segment, labelled, scales)
            acts = len(noisy.t[rows]) > 0 and segment.factor(step) > 0
            if acts or segment.weak.trainable:  # what the loss trains is evaluated at every step
                penalties.append(segment.act(strong, rows, target, log))
        note(strong.found, noisy.t, log)
        strong_loss = mean_square(out.velocity - target)
        loss = sum(penalties, start=strong_loss)
        self.report(log, loss, strong_loss, noisy.t)
        return loss

    def report(self, log: Log, loss: Tensor, strong: Tensor, t: Tensor) -> None:
        """Log the whole loss, and the strong one per quarter of time and per segment."""
        quarter = (t * 4).long().clamp(0, 3)
        parts = {"": quarter >= 0}
        parts |= {f"quarter_{q / 4:g}-{(q + 1) / 4:g}/": quarter == q for q in range(4)}
        parts |= {f"{segment.name}/": segment.contains(t) for segment in self.segments}
        names = tuple(f"{part}strong_loss" for part in parts)
        log.add(("loss",), loss[None])
        log.add(names, strong[None], torch.stack(list(parts.values())))
