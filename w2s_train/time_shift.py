"""More noise for larger data: timesteps shifted by dimension (Esser et al., 2024, section 5.3.2).

Neighbouring pixels say the same, so at equal t more of a larger image can still be seen. What is
right for data of n numbers is moved for those of ``dim`` to

    t' = s t / (1 + (s - 1) t),        s = sqrt(dim / n),

at which the noise level sigma / alpha of the linear interpolant is s times that at t. n is 4096,
as in RAE (Zheng et al., 2025), whose latents of 768 x 16 x 16 have s = 6.93.
"""

import math
from typing import Any

import torch
from torch import Tensor

from w2s_train.errors import UserError, require
from w2s_train.guidance.base import VelocityField
from w2s_train.interpolant import Interpolant
from w2s_train.sampler import Draw, Sampler
from w2s_train.timesteps import TimestepDistribution

BASE = 4096  # n


def shift_of(dim: int | None, shift: float | None) -> float:
    """The s of data with ``dim`` numbers, or that which is given.

    Raises:
        UserError: Both or neither given, or not positive.
    """
    if (dim is None) == (shift is None):
        raise UserError(f"dim={dim}: must be given, or else shift, but not both")
    if dim is not None:
        return math.sqrt(require("dim", dim, "[1, inf)") / BASE)
    assert shift is not None
    return require("shift", shift, "(0, inf)")


def later(t: Any, shift: float) -> Any:
    """The t' of a time, or of a tensor of times."""
    return shift * t / (1 + (shift - 1) * t)


class Shifted(TimestepDistribution):
    """Timesteps t' of another distribution's t.

    Args:
        timesteps: The other distribution.
        dim: Numbers in one sample, C * H * W: s = sqrt(dim / 4096).
        shift: s itself, instead; 1 changes nothing, more is more noise.

    Raises:
        UserError: Both or neither given, or not positive.
    """

    def __init__(
        self, timesteps: TimestepDistribution, dim: int | None = None, shift: float | None = None
    ) -> None:
        self.timesteps, self.shift = timesteps, shift_of(dim, shift)

    def cdf(self, t: float, interpolant: Interpolant) -> float:
        return self.timesteps.cdf(t / (self.shift - (self.shift - 1) * t), interpolant)

    def quantile(self, u: Tensor, interpolant: Interpolant) -> Tensor:
        return later(self.timesteps.quantile(u, interpolant), self.shift)

    def draw(self, n: int, device: torch.device, interpolant: Interpolant) -> Tensor:
        return super().draw(n, device, interpolant).clamp_(max=1 - 2**-24)  # rounding reaches 1


class ShiftedSampler(Sampler):
    """A solver whose grid of times is shifted: where s > 1, steps are short while there is much
    noise, where `Shifted` training has most of its timesteps, and long at the end. The last step
    of `EulerMaruyama` keeps its length; what lies above it is shifted.

    Args:
        sampler: The solver.
        dim: Numbers in one sample, C * H * W: s = sqrt(dim / 4096).
        shift: s itself, instead; 1 changes nothing.

    Raises:
        UserError: Both or neither given, or not positive.
    """

    def __init__(
        self, sampler: Sampler, dim: int | None = None, shift: float | None = None
    ) -> None:
        super().__init__(sampler.steps)
        self.sampler, self.shift = sampler, shift_of(dim, shift)
        self.last_step = sampler.last_step

    def describe(self) -> str:
        return f"Shifted({self.shift:g}, {self.sampler.describe()})"

    def times(self) -> list[float]:
        last, (*times, end) = self.last_step, self.sampler.times()
        return [
            *(last + (1 - last) * later((t - last) / (1 - last), self.shift) for t in times),
            end,
        ]

    def step(self, velocity: VelocityField, x_t: Tensor, t: float, s: float, draw: Draw) -> Tensor:
        return self.sampler.step(velocity, x_t, t, s, draw)
