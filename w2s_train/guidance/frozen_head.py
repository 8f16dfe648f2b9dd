"""A head on an intermediate block of a network that stays as it is: guidance for any checkpoint."""

from w2s_train.errors import UserError
from w2s_train.interpolant import Interpolant
from w2s_train.models import Network
from w2s_train.models.average import freeze
from w2s_train.objective import WeakToStrongObjective
from w2s_train.segment import Extrapolation
from w2s_train.timesteps import TimestepDistribution
from w2s_train.weak.base import WeakSource


class FrozenHeadObjective(WeakToStrongObjective):
    """Trains a weak source, such as a head, on a frozen network (SSG, arXiv 2607.29122).

    The source learns plain velocities at all timesteps, from the data or from images that the
    network has made; nothing of the network changes. `Autoguidance` with ``weak: null`` then
    guides the network by it, for no further evaluation of the network.

    Args:
        interpolant: How data and noise are mixed; the one that the network was trained with.
        timesteps: Where training timesteps are drawn from.
        weak: A source that the loss trains, such as `w2s_train.weak.IntermediateHead`.

    Raises:
        UserError: A source without parameters of its own.
    """

    def __init__(
        self, interpolant: Interpolant, timesteps: TimestepDistribution, weak: WeakSource
    ) -> None:
        if not weak.trainable:
            raise UserError(
                f"weak={type(weak).__name__}: must be a source that the loss trains, such as "
                "IntermediateHead"
            )
        learned = Extrapolation(0.0, 1.0, 0.0, weak, weak_loss_weight=1.0)
        super().__init__(interpolant, timesteps, [learned])

    def bind(self, network: Network, label_dropout: float | None = None) -> None:
        freeze(network)
        super().bind(network, label_dropout)
