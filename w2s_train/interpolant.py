"""The family of noisy samples between data and noise.

An interpolant mixes data ``x`` and standard normal noise ``e`` as

    x_t = alpha(t) x + sigma(t) e,        t in [0, 1];  t = 0 is data, t = 1 is noise,

and its velocity, the regression target without guidance, is the derivative

    v = dx_t/dt = alpha'(t) x + sigma'(t) e.

Both equations together are a 2x2 linear system with determinant

    d(t) = alpha sigma' - alpha' sigma,

so data and noise follow from (x_t, v), and the score is -e / sigma (Albergo et al., 2023,
"Stochastic Interpolants"; Ma et al., 2024, "SiT").
"""

import abc
import math
from dataclasses import dataclass

import torch
from torch import Tensor


def right_pad(t: Tensor, like: Tensor) -> Tensor:
    """Reshape per-row numbers (B,) to (B, 1, ..., 1) so that they broadcast over ``like``."""
    return t.reshape(-1, *[1] * (like.ndim - 1))


@dataclass(frozen=True)
class NoisySample:
    """Where the network is evaluated, and what it should say there."""

    x_t: Tensor  # (B, C, H, W)
    t: Tensor  # (B,)
    v: Tensor  # (B, C, H, W)

    def take(self, rows: slice | Tensor) -> "NoisySample":
        """The same, for some rows only: a slice (a view) or an index (n,)."""
        return NoisySample(self.x_t[rows], self.t[rows], self.v[rows])


class Interpolant(abc.ABC):
    """x_t = alpha(t) x + sigma(t) e."""

    @abc.abstractmethod
    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """alpha, sigma and their derivatives alpha', sigma', each shaped like ``t``."""

    @abc.abstractmethod
    def time_of_noise_level(self, level: Tensor) -> Tensor:
        """The t at which sigma(t) / alpha(t) equals ``level`` > 0; same shape."""

    def corrupt(self, x: Tensor, noise: Tensor, t: Tensor) -> NoisySample:
        """Mix data and noise, both (B, C, H, W), at times (B,)."""
        alpha, sigma, alpha_dot, sigma_dot = (right_pad(c, x) for c in self.coefficients(t))
        return NoisySample(alpha * x + sigma * noise, t, alpha_dot * x + sigma_dot * noise)

    def velocity_to_data(self, v: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """X = (sigma' x_t - sigma v) / d, shaped like ``x_t``; ``t`` is (B,)."""
        alpha, sigma, alpha_dot, sigma_dot = (right_pad(c, x_t) for c in self.coefficients(t))
        return (sigma_dot * x_t - sigma * v) / (alpha * sigma_dot - alpha_dot * sigma)

    def data_to_velocity(self, x: Tensor, x_t: Tensor, t: Tensor, floor: float = 0.0) -> Tensor:
        """V = (sigma' x_t - d x) / max(sigma, floor), like ``x_t``; ``t`` (B,) > 0 or a floor."""
        alpha, sigma, alpha_dot, sigma_dot = (right_pad(c, x_t) for c in self.coefficients(t))
        d = alpha * sigma_dot - alpha_dot * sigma
        return (sigma_dot * x_t - d * x) / sigma.clamp(min=floor)

    def velocity_to_noise(self, v: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """E = (alpha v - alpha' x_t) / d, shaped like ``x_t``; ``t`` is (B,)."""
        alpha, sigma, alpha_dot, sigma_dot = (right_pad(c, x_t) for c in self.coefficients(t))
        return (alpha * v - alpha_dot * x_t) / (alpha * sigma_dot - alpha_dot * sigma)

    def velocity_to_score(self, v: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The score, grad log p_t(x_t) = -e / sigma(t), shaped like ``x_t``; needs t > 0."""
        sigma = right_pad(self.coefficients(t)[1], x_t)
        return -self.velocity_to_noise(v, x_t, t) / sigma


class LinearInterpolant(Interpolant):
    """alpha = 1 - t, sigma = t (Lipman et al., 2023; Liu et al., 2023); v = e - x."""

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        one = torch.ones_like(t)
        return 1 - t, t, -one, one

    def time_of_noise_level(self, level: Tensor) -> Tensor:
        return level / (1 + level)


class CosineInterpolant(Interpolant):
    """alpha = cos(pi t / 2), sigma = sin(pi t / 2): the variance-preserving path of SiT."""

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        angle = t * (math.pi / 2)
        alpha, sigma = torch.cos(angle), torch.sin(angle)
        return alpha, sigma, -sigma * (math.pi / 2), alpha * (math.pi / 2)

    def time_of_noise_level(self, level: Tensor) -> Tensor:
        return torch.atan(level) * (2 / math.pi)
