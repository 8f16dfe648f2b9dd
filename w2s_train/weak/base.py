"""What every weak source offers."""

import abc

from torch import Tensor, nn

from w2s_train.interpolant import NoisySample
from w2s_train.models import DiT, DiTOutput


class WeakSource(nn.Module, abc.ABC):
    """A deliberately worse prediction of the velocity.

    The config builds a source before it has met the network; `bind` introduces them once. Copies,
    heads and averages made there are ordinary submodules: moved, saved and restored with the run.

    A *trainable* source has parameters of its own that the loss reaches. It is evaluated with
    gradients on every row of the batch, so that the autograd graph is the same at every step. The
    others are evaluated without gradients and only on the rows of their segment.
    """

    trainable: bool = False
    keep_hidden: tuple[int, ...] = ()  # blocks whose tokens the strong pass must keep, from 0

    def bind(self, network: DiT) -> None:  # noqa: B027
        """Build what depends on the network: a copy, a head. Called once, before training.

        Raises:
            ValueError: The source does not fit the network.
        """

    @abc.abstractmethod
    def predict(self, network: DiT, noisy: NoisySample, y: Tensor, strong: DiTOutput) -> Tensor:
        """The weak velocity (B, C, H, W).

        Args:
            network: The network being trained.
            noisy: Where to evaluate.
            y: Labels (B,) as the strong pass saw them, dropped ones replaced by the null class.
            strong: The strong pass at the same rows.
        """

    def after_step(self, network: DiT) -> None:  # noqa: B027
        """Follow the network; called after each optimizer step."""
