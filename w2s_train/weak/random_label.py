"""The network with the label of another class."""

import torch
from torch import Tensor

from w2s_train.errors import UserError
from w2s_train.interpolant import NoisySample
from w2s_train.models import DiTOutput, Network, offered
from w2s_train.weak.base import WeakSource
from w2s_train.weak.randomness import Randomness


class RandomLabel(WeakSource):
    """The same network with a random label, drawn anew per row and pass: independent condition
    guidance (ICG, arXiv 2407.02687), which needs no null class.

    All classes but the row's own are alike, as there the difference would be 0; the null class is
    none of them. A row without label keeps the null class: its difference is 0.

    Raises:
        UserError: In `bind`, a network with fewer than two classes.
    """

    random = True
    needs_label = True
    needs_null = False

    def bind(self, network: Network) -> None:
        self.classes = offered(network, "RandomLabel", "num_classes")
        if self.classes < 2:
            raise UserError(f"num_classes={self.classes}: must be at least 2 for RandomLabel")

    def predict(  # type: ignore[override]
        self, network: Network, noisy: NoisySample, y: Tensor, strong: DiTOutput, random: Randomness
    ) -> Tensor:
        steps = (random.numbers(1)[:, 0] * (self.classes - 1)).long().clamp(max=self.classes - 2)
        other = (y + 1 + steps) % self.classes
        other = torch.where(y == network.null_class, y, other)
        return network(noisy.x_t, noisy.t, other).velocity
