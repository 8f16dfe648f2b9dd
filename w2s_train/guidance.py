"""Sampling-time guidance: velocity fields made of one or more network evaluations.

A velocity field is called as ``field(x_t, t, start)`` with x_t (B, C, H, W), the time t of the
evaluation and the time at which the solver's current step began, and returns a velocity like x_t.
Whether guidance applies is decided at ``start``: within one step a solver then integrates one
smooth field, and a second-order step keeps its order at the ends of the interval.
"""

import abc
from collections.abc import Callable

import torch
from torch import Tensor

from w2s_train.errors import UserError
from w2s_train.models import DiT

VelocityField = Callable[[Tensor, float, float], Tensor]


def evaluate(network: DiT, x_t: Tensor, t: float, y: Tensor) -> Tensor:
    """The network's velocity at one time for the whole batch, typed like ``x_t``.

    The solver's state is float64; the network runs in its own precision.
    """
    dtype = next(network.parameters()).dtype
    times = torch.full((len(x_t),), t, dtype=dtype, device=x_t.device)
    return network(x_t.to(dtype), times, y).velocity.to(x_t.dtype)


class Guidance(abc.ABC):
    """How a network and labels become a velocity field."""

    @abc.abstractmethod
    def field(self, network: DiT, y: Tensor) -> VelocityField:
        """The velocity field for labels ``y`` (B,)."""

    @abc.abstractmethod
    def describe(self) -> str:
        """One word, or name and numbers, for the protocol of a score."""


class Unguided(Guidance):
    """The network's own velocity: one evaluation per call."""

    def field(self, network: DiT, y: Tensor) -> VelocityField:
        return lambda x_t, t, start: evaluate(network, x_t, t, y)

    def describe(self) -> str:
        return "none"


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
        if not 0 <= scale < float("inf"):
            raise UserError(f"scale={scale}: must be a finite number, at least 0")
        if not 0 <= low <= high <= 1:
            raise UserError(f"low={low}, high={high}: must be 0 <= low <= high <= 1")
        self.scale, self.low, self.high = scale, low, high

    def field(self, network: DiT, y: Tensor) -> VelocityField:
        both = torch.cat([y, torch.full_like(y, network.null_class)])

        def velocity(x_t: Tensor, t: float, start: float) -> Tensor:
            if self.scale == 1 or not self.low <= start <= self.high:
                return evaluate(network, x_t, t, y)
            v_class, v_null = evaluate(network, torch.cat([x_t, x_t]), t, both).chunk(2)
            return v_null + self.scale * (v_class - v_null)

        return velocity

    def describe(self) -> str:
        return f"cfg({self.scale:g}, [{self.low:g}, {self.high:g}])"
