"""Classifier-free guidance, and one whose scale varies over the steps."""

import itertools

from torch import Tensor

from w2s_train.errors import require
from w2s_train.guidance.base import (
    Guidance,
    VelocityField,
    check_scale,
    evaluate,
    evaluate_both,
    extrapolate,
)
from w2s_train.models import Network


class ClassifierFree(Guidance):
    """v = v_null + scale (v_class - v_null) while low <= t <= high (Ho & Salimans, 2022;
    Kynkaanniemi et al., 2024, for the interval).

    Args:
        scale: 1 is no guidance and costs no second evaluation.
        low: Start of the interval, inclusive.
        high: End of the interval, inclusive.

    Raises:
        UserError: A scale that is negative, infinite or not a number; an interval not in [0, 1].
    """

    def __init__(self, scale: float, low: float = 0.0, high: float = 1.0) -> None:
        check_scale(scale, low, high)
        self.scale, self.low, self.high = scale, low, high

    def field(self, network: Network, y: Tensor, times: list[float]) -> VelocityField:
        def velocity(x_t: Tensor, t: float, start: float) -> Tensor:
            if self.scale == 1 or not self.low <= start <= self.high:
                return evaluate(network, x_t, t, y)
            v_class, v_null = evaluate_both(network, x_t, t, y)
            return extrapolate(v_null, v_class, self.scale)

        return velocity

    def describe(self) -> str:
        return f"cfg({self.scale:g}, [{self.low:g}, {self.high:g}])"


class StageWise(Guidance):
    """Stage-wise, time-varying CFG: a triangle over the steps, from 1 up to 2 scale - 1 in the
    middle and back, rescaled so that its mean over time is ``scale``.

    Args:
        scale: Mean guidance scale over time, at least 1.

    Raises:
        UserError: A scale below 1, infinite or not a number.
    """

    def __init__(self, scale: float) -> None:
        self.scale = require("scale", scale, "[1, inf)")

    def scales(self, times: list[float]) -> list[float]:
        """The guidance scale of each step of a grid."""
        n = len(times) - 1
        low, high = 1.0, 2 * self.scale - 1
        triangle = [low + (high - low) * (1 - abs(2 * (i + 0.5) / n - 1)) for i in range(n)]
        lengths = [t - s for t, s in itertools.pairwise(times)]
        mean = sum(s * d for s, d in zip(triangle, lengths, strict=True)) / sum(lengths)
        return [s * self.scale / mean for s in triangle]

    def field(self, network: Network, y: Tensor, times: list[float]) -> VelocityField:
        scale_at = dict(zip(times, self.scales(times), strict=False))

        def velocity(x_t: Tensor, t: float, start: float) -> Tensor:
            v_class, v_null = evaluate_both(network, x_t, t, y)
            return extrapolate(v_null, v_class, scale_at[start])

        return velocity

    def describe(self) -> str:
        return f"tv_cfg({self.scale:g})"
