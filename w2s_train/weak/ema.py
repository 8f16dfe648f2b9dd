"""A lagging average of the network."""

from torch import Tensor

from w2s_train.interpolant import NoisySample
from w2s_train.models import DiT, DiTOutput, WeightAverage
from w2s_train.models.average import check_decay
from w2s_train.weak.base import WeakSource


class EMA(WeakSource):
    """An exponential moving average of the weights, with a decay of its own.

    An ordinary average is *better* than the live weights and so points the wrong way; it is weak
    only when it looks back far, over 1 / (1 - decay) optimizer steps, into a worse network.

    Args:
        decay: Per optimizer step, in [0, 1).

    Raises:
        ValueError: A decay outside [0, 1).
    """

    def __init__(self, decay: float = 0.9999) -> None:
        super().__init__()
        self.decay = check_decay("decay", decay)

    def bind(self, network: DiT) -> None:
        self.average = WeightAverage(network, self.decay)

    def predict(self, network: DiT, noisy: NoisySample, y: Tensor, strong: DiTOutput) -> Tensor:
        return self.average.module(noisy.x_t, noisy.t, y).velocity

    def after_step(self, network: DiT) -> None:
        self.average.update(network)
