"""An exponential moving average of a network's weights.

    average <- decay * average + (1 - decay) * weights,      once per optimizer step

`torch.optim.swa_utils.AveragedModel` computes the same, but reads its step counter back to the host
at every update, which stalls a GPU, and keeps half-precision weights in half precision, where an
average with decay 0.9999 never moves.
"""

import copy

import torch
from torch import Tensor, nn

from w2s_train.errors import UserError
from w2s_train.models.dit import DiT


class WeightAverage(nn.Module):
    """A frozen float32 copy of ``network`` that follows it.

    Args:
        network: What to average. Its buffers are constants.
        decay: In [0, 1); 0 is a plain copy. The average looks back about 1 / (1 - decay) updates.

    Raises:
        UserError: A decay outside [0, 1).
    """

    def __init__(self, network: DiT, decay: float) -> None:
        super().__init__()
        self.decay = check_decay("decay", decay)
        self.module = copy.deepcopy(network).float().requires_grad_(False).eval()

    @torch.no_grad()
    def update(self, network: DiT, good: bool | Tensor = True) -> None:
        """Move the average towards the weights of ``network``.

        Args:
            network: Of the same architecture.
            good: Whether to; a tensor () bool where the host does not know yet.
        """
        averages: list[Tensor] = [*self.module.weights]
        new = [p.detach().float() for p in network.weights]
        if isinstance(good, Tensor):
            torch._foreach_lerp_(averages, new, weights=[(1 - self.decay) * good] * len(new))
        elif good:
            torch._foreach_lerp_(averages, new, 1 - self.decay)

    def train(self, mode: bool = True) -> "WeightAverage":
        """An average is never in training mode."""
        return super().train(False)


def check_decay(name: str, decay: float) -> float:
    """``decay`` itself.

    Raises:
        UserError: It is not in [0, 1).
    """
    if not 0 <= decay < 1:
        raise UserError(f"{name}={decay}: must be in [0, 1)")
    return decay
