"""The network without its label: the weak side of classifier-free guidance."""

import torch
from torch import Tensor

from w2s_train.interpolant import NoisySample
from w2s_train.models import DiTOutput, Network
from w2s_train.weak.base import WeakSource


class NullClass(WeakSource):
    """The same network with every label replaced by the null class (Model Guidance, 2025).

    Where the label was dropped the strong pass saw the null class too, so the difference is zero
    and the row is trained on plain velocities: that is what keeps the null class honest.
    """

    needs_label = True

    def predict(self, network: Network, noisy: NoisySample, y: Tensor, strong: DiTOutput) -> Tensor:
        return network(noisy.x_t, noisy.t, torch.full_like(y, network.null_class)).velocity
