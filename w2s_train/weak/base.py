"""What every weak source offers."""

import abc
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from w2s_train.interpolant import NoisySample
from w2s_train.models import DiTOutput, Network
from w2s_train.weak.randomness import Drawn, Randomness

Fresh = Callable[[], tuple[NoisySample, Tensor]]


@dataclass(frozen=True)
class Step:
    """Where training stands."""

    number: int = 0  # optimizer steps behind the weights
    average: Network | None = None  # their running average, which validation samples
    lr: float = 0.0  # learning rate of the run's optimizer
    # If not, the weights are those before it, and averages stay, too (`WeightAverage.update` takes
    # it); a tensor () where the host does not know yet.
    good: bool | Tensor = True
    batch: dict[str, object] | None = None  # of the data, as it was read; for `align`


class WeakSource(nn.Module, abc.ABC):
    """A deliberately worse prediction of the velocity.

    The config builds a source before it has met the network; `bind` introduces them once. Copies,
    heads and averages made there (`models.average` has them) are ordinary submodules: moved, saved
    and restored with the run; what is no tensor is by `get_extra_state` and `set_extra_state`.

    A *trainable* source has parameters of its own that the loss reaches. It is evaluated with
    gradients on every row of the batch, so that the autograd graph is the same at every step. The
    others are evaluated without gradients and only on the rows of their segment.
    """

    trainable: bool = False
    keep_hidden: tuple[int, ...] = ()  # blocks whose tokens the strong pass must keep; see `DiT`
    needs_label: bool = False  # weak for want of the label: meaningless in unconditional training
    needs_null: bool = True  # of those: it compares with the null class, which must be trained
    random: bool = False  # `predict` has one more parameter, ``random``; see `weak.randomness`
    from_training: bool = False  # its state is made by training: none in a fresh process
    scale_limit: float = 0.9  # scales from here on are refused, see `Extrapolation`

    def bind(self, network: Network) -> None:  # noqa: B027
        """Build what depends on the network: a copy, a head. Before training; anew by `warm_start`.

        Raises:
            UserError: The source does not fit the network.
        """

    def plan(self, total: int | None, last: int | None) -> int:
        """The first optimizer step at which the source can predict; called before a run starts.
        Until it can, `ready` is to be False: that stops guidance at sampling, too.

        Args:
            total: Steps of the plan, which shares of it refer to; None is unknown.
            last: Step at which the run ends; None is unknown.

        Raises:
            UserError: The source would never be used.
        """
        return 0

    @property
    def ready(self) -> bool:
        """Whether its state is that of a weak network by now; without one it does not guide."""
        return True

    def describe(self) -> str:
        """Name and settings, for logs and the protocol of a score."""
        return type(self).__name__

    @abc.abstractmethod
    def predict(self, network: Network, noisy: NoisySample, y: Tensor, strong: DiTOutput) -> Tensor:
        """The weak velocity (B, C, H, W).

        Args:
            network: The network being trained; when sampling, the one that is sampled.
            noisy: Where to evaluate. Its ``v`` is unknown (NaN) when sampling.
            y: Labels (B,) as the strong pass saw them, dropped ones replaced by the null class.
            strong: The strong pass at the same rows.
        """

    def predict_at(
        self, network: Network, noisy: NoisySample, y: Tensor, strong: DiTOutput, *drawn: Randomness
    ) -> Tensor:
        """`predict`; a random source draws from ``drawn``, or without it as in training."""
        random = (drawn or (Drawn(len(y), y.device),)) if self.random else ()
        return self.predict(network, noisy, y, strong, *random)

    def after_step(self, network: Network, step: Step, fresh: Fresh) -> None:  # noqa: B027
        """Follow the network, or learn; called after each optimizer step.

        Args:
            network: The network being trained, with the weights behind the step.
            step: Where training stands.
            fresh: Draws timesteps and noise anew for the last batch; gives it with its labels.
        """
