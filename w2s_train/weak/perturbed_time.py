"""The network at a time with noise on it."""

import torch
from torch import Tensor

from w2s_train.errors import require
from w2s_train.interpolant import NoisySample
from w2s_train.models import DiTOutput, Network
from w2s_train.weak.base import WeakSource
from w2s_train.weak.randomness import Randomness


class PerturbedTime(WeakSource):
    """The same network, label and x_t, told t + std * n with n standard normal, anew per row and
    pass.

    After time-step guidance (TSG, arXiv 2407.02687), which perturbs the embedding of t; the time
    itself is what any network takes. It is kept within [0, 1].

    Args:
        std: At least 0.

    Raises:
        UserError: A negative one.
    """

    random = True

    def __init__(self, std: float = 0.02) -> None:
        super().__init__()
        self.std = require("std", std, "[0, inf)")

    def describe(self) -> str:
        return f"PerturbedTime({self.std:g})"

    def predict(  # type: ignore[override]
        self, network: Network, noisy: NoisySample, y: Tensor, strong: DiTOutput, random: Randomness
    ) -> Tensor:
        u = random.numbers(1)[:, 0].clamp(
            2**-24, 1 - 2**-24
        )  # the normal quantile of 0 is infinite
        t = noisy.t + self.std * torch.special.ndtri(u).to(noisy.t.dtype)
        return network(noisy.x_t, t.clamp(0, 1), y).velocity
