"""A second head on an intermediate block."""

from torch import Tensor

from w2s_train.errors import UserError
from w2s_train.interpolant import NoisySample
from w2s_train.models import DiTOutput, Network, offered, to_velocity
from w2s_train.weak.base import WeakSource


class IntermediateHead(WeakSource):
    """A copy of the last layer that reads the tokens of an earlier block: the "branch" of SGG.

    Its loss trains the blocks below it as well (deep supervision), as in the reference.

    Args:
        block: The block whose output the head reads, counted from 0; None for the end of the first
            third, as published (``weak_layer=4`` of 12, counted from 1, is ``block: 3`` here).

    Raises:
        UserError: There is no such block, or it is the last one.
    """

    trainable = True
    from_training = True

    def __init__(self, block: int | None = None) -> None:
        super().__init__()
        self.block = block

    def bind(self, network: Network) -> None:
        depth, make_head = offered(
            network, "IntermediateHead", "depth", "make_head", "keep_hidden="
        )
        block = max(depth // 3 - 1, 0) if self.block is None else self.block
        if not 0 <= block < depth - 1:
            raise UserError(
                f"block={block}: must be in [0, {depth - 2}], "
                f"before the last of the network's {depth} blocks"
            )
        self.keep_hidden, self.head = (block,), make_head()

    def predict(self, network: Network, noisy: NoisySample, y: Tensor, strong: DiTOutput) -> Tensor:
        said = self.head(strong.hidden[self.keep_hidden[0]], strong.cond)
        return to_velocity(network, said, noisy.x_t, noisy.t)
