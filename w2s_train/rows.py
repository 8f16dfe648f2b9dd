"""Which rows of a batch something happens to: random, spread evenly, and of a known number.

Plain coin flips per row have a number of heads that nobody knows before, so that shapes change from
step to step. *Systematic sampling* (Madow & Madow, 1944) has one random offset instead: rows of a
grid with the spacing 1 / share. Every row still is chosen with that probability, and any k rows in
succession hold at least floor(k * share) chosen ones. Rows of a batch are ordered in t, so that the
chosen ones cover all timesteps. All is integer arithmetic, and nothing is read back to the host.
"""

from fractions import Fraction

import torch
from torch import Tensor


def _fraction(share: float) -> Fraction:
    return Fraction(share).limit_denominator(10**6)


def at_least(n: int, share: float) -> int:
    """How many of ``n`` rows in succession are chosen at least."""
    return int(n * _fraction(share))


def spread(n: int, share: float, device: torch.device) -> Tensor:
    """Choose each of ``n`` rows with probability ``share`` in [0, 1] (to six digits): (n,) bool."""
    ratio = _fraction(share)
    offset = torch.randint(ratio.denominator, (), device=device)
    marks = torch.arange(n + 1, device=device) * ratio.numerator + offset
    counts = marks.div(ratio.denominator, rounding_mode="floor")
    return counts[1:] > counts[:-1]


def subset(n: int, m: int, device: torch.device) -> Tensor:
    """Choose ``m`` of ``n`` rows, each with probability m / n: ascending (m,) int64."""
    offset = torch.randint(n, (), device=device)
    return (torch.arange(m, device=device) * n + offset).div(m, rounding_mode="floor")


def chosen_first(mask: Tensor, m: int) -> Tensor:
    """The first ``m`` places (m,) int64 of a mask (n,), True ones before others, in order."""
    return torch.argsort((~mask).byte(), stable=True)[:m]
