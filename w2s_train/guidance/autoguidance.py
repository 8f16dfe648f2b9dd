"""Guidance away from a weaker prediction with the same label."""

import itertools

import torch
from torch import Tensor

from w2s_train.errors import UserError
from w2s_train.guidance.base import (
    Guidance,
    VelocityField,
    check_scale,
    evaluate,
    extrapolate,
    network_inputs,
    run_network,
)
from w2s_train.interpolant import NoisySample
from w2s_train.models import Network
from w2s_train.objective import Objective
from w2s_train.weak.base import WeakSource
from w2s_train.weak.randomness import Seeded


class Autoguidance(Guidance):
    """v = v_weak + scale (v - v_weak) while low <= t <= high (Karras et al., 2024).

    Args:
        scale: 1 is no guidance and costs no second evaluation.
        weak: A source whose state does not come from training, such as `LayerSkip` or
            `Checkpoint`. None takes the sources of the training objective, each in the range of
            timesteps of its segment: heads, averages, snapshots and co-trained networks. One that
            is not there yet, such as a snapshot before its step, leaves its range unguided.
        low: Start of the interval, inclusive.
        high: End of the interval, inclusive.

    Raises:
        UserError: A scale that is negative, infinite or not a number; an interval not in [0, 1]; a
            source without a state; in `bind`, no source at all.
    """

    def __init__(
        self,
        scale: float,
        weak: WeakSource | None = None,
        low: float = 0.0,
        high: float = 1.0,
    ) -> None:
        check_scale(scale, low, high)
        self.scale, self.weak, self.low, self.high = scale, weak, low, high
        self.ranges: list[tuple[float, float, WeakSource]] = []  # low, high, source; from `bind`
        if weak is not None and weak.from_training:
            raise UserError(
                f"weak={type(weak).__name__}: its state comes from training, must be null to take "
                "it from the objective"
            )

    @property
    def needs_label(self) -> bool:  # type: ignore[override]
        """Whether a source compares with the null class."""
        return any(weak.needs_label for _, _, weak in self.ranges)

    @property
    def needs_seeds(self) -> bool:  # type: ignore[override]
        """Whether a source is random."""
        return any(weak.random for _, _, weak in self.ranges)

    def bind(self, network: Network, objective: Objective) -> None:
        if self.weak is not None:
            self.weak.bind(network)
            self.ranges = [(0.0, 1.0, self.weak)]
        else:
            self.ranges = [(s.low, s.high, s.weak) for s in objective.segments]
        ends = sorted((low, high) for low, high, _ in self.ranges)
        if any(after[0] < before[1] for before, after in itertools.pairwise(ends)):
            raise UserError(
                "weak=None: must be given, since the objective's segments overlap; a scale that is "
                "drawn is chosen by --scale"
            )
        if not self.ranges:
            raise UserError("weak=None: must be given, since the objective has no weak source")

    def source_at(self, t: float) -> WeakSource | None:
        """The weak source that serves a time, if one does and has something to say."""
        if self.scale == 1 or not self.low <= t <= self.high:
            return None
        inside = (w for low, high, w in self.ranges if low <= t < high or t == high == 1)
        source = next(inside, None)
        return source if source is not None and source.ready else None

    def field(
        self, network: Network, y: Tensor, times: list[float], seeds: list[int] | None = None
    ) -> VelocityField:
        if self.needs_seeds and seeds is None:
            raise UserError(f"seeds={seeds}: must be one per row for {self.describe()}")
        seeded = Seeded(seeds or [], y.device)
        for _, _, weak in self.ranges:
            weak.to(y.device)

        def velocity(x_t: Tensor, t: float, start: float) -> Tensor:
            weak = self.source_at(start)
            if weak is None:
                return evaluate(network, x_t, t, y)
            strong = run_network(network, x_t, t, y, keep_hidden=weak.keep_hidden)
            seen, time = network_inputs(network, x_t, t)
            noisy = NoisySample(seen, time, torch.full_like(seen, torch.nan))
            v_weak = weak.predict_at(network, noisy, y, strong, seeded.at(t))
            v_weak = v_weak.to(x_t.dtype)
            return extrapolate(v_weak, strong.velocity.to(x_t.dtype), self.scale)

        return velocity

    def describe(self) -> str:
        absent = " not there yet: unguided"
        names = "+".join(w.describe() + ("" if w.ready else absent) for _, _, w in self.ranges)
        return f"autoguidance({self.scale:g}, {names}, [{self.low:g}, {self.high:g}])"
