"""Distributions that training timesteps are drawn from, and which rows lose their label.

Draws are *stratified*: row i of a batch of B gets

    t_i = F^-1((i + U_i) / B),      U_i uniform in [0, 1),

with F the cumulative distribution. Each t_i alone is spread over its own 1/B of the probability,
a random row has the distribution F, and the mean over the batch has less variance than with
independent draws (Kingma et al., 2021, "Variational Diffusion Models", appendix I, use the same
idea with one shared offset). Rows come out ordered in t, so that a range of timesteps is one
contiguous slice of the batch, the same at every step: the shapes never change.
"""

import abc
import math
from fractions import Fraction

import torch
from torch import Generator, Tensor

from w2s_train.errors import require
from w2s_train.interpolant import Interpolant


class TimestepDistribution(abc.ABC):
    """A distribution on (0, 1), given by its cumulative distribution F and the inverse of it.

    Both get the interpolant, since some distributions are stated in noise levels.
    """

    @abc.abstractmethod
    def cdf(self, t: float, interpolant: Interpolant) -> float:
        """F(t), the share of timesteps at or below ``t`` in [0, 1]."""

    @abc.abstractmethod
    def quantile(self, u: Tensor, interpolant: Interpolant) -> Tensor:
        """F^-1(u) for ``u`` in [0, 1]; same shape and dtype."""

    def draw(self, n: int, device: torch.device, interpolant: Interpolant) -> Tensor:
        """``n`` stratified timesteps (n,), float32, ascending, strictly inside (0, 1)."""
        u = (torch.arange(n, device=device) + torch.rand(n, device=device)) / n
        # Rounding can reach 0 or 1, where an unbounded quantile is infinite.
        return self.quantile(u.clamp_(2**-24, 1 - 2**-24), interpolant)

    def rows(self, low: float, high: float, n: int, interpolant: Interpolant) -> slice:
        """The rows of a draw of ``n`` whose t can lie in [low, high): a static slice."""
        # The tolerance keeps 10 * 0.3 = 3.0000000000000004 from adding a row that cannot match.
        first = math.floor(n * self.cdf(low, interpolant) + 1e-6)
        last = math.ceil(n * self.cdf(high, interpolant) - 1e-6)
        return slice(first, last)


class Uniform(TimestepDistribution):
    """Every timestep alike."""

    def cdf(self, t: float, interpolant: Interpolant) -> float:
        return t

    def quantile(self, u: Tensor, interpolant: Interpolant) -> Tensor:
        return u


class LogitNormal(TimestepDistribution):
    """logit(t) is normal: more draws in the middle (Esser et al., 2024, section 3.1).

    Args:
        mean: Mean of logit(t); above 0 means more noise.
        std: Standard deviation of logit(t), > 0.
    """

    def __init__(self, mean: float = 0.0, std: float = 1.0) -> None:
        self.mean, self.std = mean, require("std", std, "(0, inf)")

    def cdf(self, t: float, interpolant: Interpolant) -> float:
        if t <= 0 or t >= 1:
            return float(t >= 1)
        return _normal_cdf((math.log(t / (1 - t)) - self.mean) / self.std)

    def quantile(self, u: Tensor, interpolant: Interpolant) -> Tensor:
        return torch.sigmoid(self.mean + self.std * torch.special.ndtri(u))


class EDMLogNormal(TimestepDistribution):
    """The noise level sigma(t) / alpha(t) is log-normal (Karras et al., 2022, table 1).

    Args:
        mean: Mean of the logarithm of the noise level.
        std: Standard deviation of the logarithm of the noise level, > 0.
    """

    def __init__(self, mean: float = -1.2, std: float = 1.2) -> None:
        self.mean, self.std = mean, require("std", std, "(0, inf)")

    def cdf(self, t: float, interpolant: Interpolant) -> float:
        if t <= 0 or t >= 1:
            return float(t >= 1)
        alpha, sigma, *_ = interpolant.coefficients(torch.tensor(t, dtype=torch.float64))
        return _normal_cdf((math.log(sigma / alpha) - self.mean) / self.std)

    def quantile(self, u: Tensor, interpolant: Interpolant) -> Tensor:
        level = torch.exp(self.mean + self.std * torch.special.ndtri(u))
        return interpolant.time_of_noise_level(level)


def _normal_cdf(z: float) -> float:
    return 0.5 * math.erfc(-z / math.sqrt(2))


def _fraction(share: float) -> Fraction:
    return Fraction(share).limit_denominator(10**6)


def at_least(n: int, share: float) -> int:
    """How many of ``n`` rows in succession are chosen at least."""
    return int(n * _fraction(share))


def spread(n: int, share: float, device: torch.device, own: Generator | None = None) -> Tensor:
    """Choose each of ``n`` rows with probability ``share`` in [0, 1] (to six digits): (n,) bool.

    Plain coin flips have a number of heads that nobody knows before, so that shapes change from
    step to step. *Systematic sampling* (Madow & Madow, 1944) has one random offset instead: rows of
    a grid with the spacing 1 / share. Every row still is chosen with that probability, and any k
    rows in succession hold at least floor(k * share) chosen ones; rows of a batch are ordered in t,
    so that these cover all timesteps. All is integer arithmetic; nothing is read by the host.
    """
    ratio = _fraction(share)
    offset = torch.randint(ratio.denominator, (), device=device, generator=own)
    marks = torch.arange(n + 1, device=device) * ratio.numerator + offset
    counts = marks.div(ratio.denominator, rounding_mode="floor")
    return counts[1:] > counts[:-1]


def chosen_first(mask: Tensor, m: int) -> Tensor:
    """The first ``m`` places (m,) int64 of a mask (n,), True ones before others, in order."""
    return torch.argsort((~mask).byte(), stable=True)[:m]
