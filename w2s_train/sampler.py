"""Solvers that carry noise at t = 1 to data at t = 0 along a velocity field.

The ODE dx/dt = v(x, t) and, for any diffusion w(t) >= 0, the reverse-time SDE

    dx = (v - w(t)/2 * score) dt + sqrt(w(t)) dW

have the same marginals (Song et al., 2021; Ma et al., 2024, SiT, eq. 8). The state is float64.
"""

import abc
import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from w2s_train.errors import require
from w2s_train.guidance.base import VelocityField
from w2s_train.interpolant import Interpolant

Draw = Callable[[], Tensor]  # standard normal noise like the state, a fresh one at every call


class Sampler(abc.ABC):
    """A fixed grid of times from 1 to 0 and a rule for one step between two of them.

    Args:
        steps: Number of steps, at least 1.

    Raises:
        UserError: Fewer steps.
    """

    last_step = 0.0  # its length, where it has one of its own

    def __init__(self, steps: int = 50) -> None:
        self.steps = require("steps", steps, "[1, inf)")

    @abc.abstractmethod
    def times(self) -> list[float]:
        """The grid, steps + 1 times from 1 down to 0."""

    @abc.abstractmethod
    def step(self, velocity: VelocityField, x_t: Tensor, t: float, s: float, draw: Draw) -> Tensor:
        """The state (B, C, H, W) at time s < t."""

    def describe(self) -> str:
        """Name and what else than the number of steps sets it apart, for the record of a score."""
        return type(self).__name__

    @torch.no_grad()
    def __call__(self, velocity: VelocityField, noise: Tensor, draw: Draw) -> Tensor:
        """Carry ``noise`` (B, C, H, W) to data: float64, same shape.

        Args:
            velocity: The velocity field.
            noise: Standard normal.
            draw: Called once per noisy step; solvers of the ODE never call it.
        """
        x_t = noise.double()
        for t, s in itertools.pairwise(self.times()):
            x_t = self.step(velocity, x_t, t, s, draw)
        return x_t


class Euler(Sampler):
    """First order: x_s = x_t + (s - t) v(x_t, t)."""

    def times(self) -> list[float]:
        return torch.linspace(1, 0, self.steps + 1, dtype=torch.float64).tolist()

    def step(self, velocity: VelocityField, x_t: Tensor, t: float, s: float, draw: Draw) -> Tensor:
        return x_t + (s - t) * velocity(x_t, t, t)


class Heun(Sampler):
    """Second order: the mean of the velocities at both ends of the step; Euler for the last one
    (Karras et al., 2022, algorithm 1). 2 * steps - 1 evaluations.
    """

    def times(self) -> list[float]:
        return torch.linspace(1, 0, self.steps + 1, dtype=torch.float64).tolist()

    def step(self, velocity: VelocityField, x_t: Tensor, t: float, s: float, draw: Draw) -> Tensor:
        v_t = velocity(x_t, t, t)
        x_s = x_t + (s - t) * v_t
        if s == 0:
            return x_s
        return x_t + (s - t) * (v_t + velocity(x_s, s, t)) / 2


class EulerMaruyama(Sampler):
    """The SDE with w(t) = 2t, in equal steps down to ``last_step``, then one without noise to 0.

    250 steps with a last step of 0.04 is the protocol of SiT, REPA and SGG.

    Args:
        interpolant: The one that the network was trained with; it turns velocities into scores.
        steps: Number of evaluations, at least 2.
        last_step: Length of the last step, in (0, 1).

    Raises:
        UserError: Fewer steps, or a last step outside (0, 1).
    """

    def __init__(self, interpolant: Interpolant, steps: int = 250, last_step: float = 0.04) -> None:
        super().__init__(steps)
        require("steps", steps, "[2, inf)")
        self.interpolant, self.last_step = interpolant, require("last_step", last_step, "(0, 1)")

    def describe(self) -> str:
        return f"EulerMaruyama(last_step={self.last_step:g})"

    def times(self) -> list[float]:
        grid = torch.linspace(1, self.last_step, self.steps, dtype=torch.float64)
        return [*grid.tolist(), 0.0]

    def step(self, velocity: VelocityField, x_t: Tensor, t: float, s: float, draw: Draw) -> Tensor:
        v = velocity(x_t, t, t)
        time = torch.full((len(x_t),), t, dtype=x_t.dtype, device=x_t.device)
        drift = v - t * self.interpolant.velocity_to_score(v, x_t, time)
        x_s = x_t + (s - t) * drift
        if s == 0:
            return x_s
        return x_s + math.sqrt(2 * t * (t - s)) * draw().to(x_t)
