"""The network with blocks left out."""

from torch import Tensor

from w2s_train.errors import UserError
from w2s_train.interpolant import NoisySample
from w2s_train.models import DiTOutput, Network, offered, plain_tokens
from w2s_train.weak.base import WeakSource


class LayerSkip(WeakSource):
    """The same network and label, with some blocks skipped (skip-layer guidance of SD 3.5).

    The SGG paper reports that it hurts as a training signal. The blocks before the first skipped
    one are those of the strong pass and not evaluated again.

    Args:
        blocks: The blocks to leave out, counted from 0; None for the one at the end of the first
            third, where the published branch sits, too.

    Raises:
        UserError: No block, or one that the network does not have.
    """

    def __init__(self, blocks: list[int] | None = None) -> None:
        super().__init__()
        if blocks is not None and not blocks:
            raise UserError(f"blocks={blocks}: must name at least one block")
        self.blocks = blocks

    def bind(self, network: Network) -> None:
        depth = offered(network, "LayerSkip", "depth", "keep_hidden=", "skip_blocks=", "resume=")
        blocks = [max(depth // 3 - 1, 0)] if self.blocks is None else self.blocks
        for block in blocks:
            if not 0 <= block < depth:
                raise UserError(f"blocks={blocks}: must be in [0, {depth - 1}]")
        self.skipped = frozenset(blocks)
        self.keep_hidden = (min(blocks) - 1,)

    def describe(self) -> str:
        return f"LayerSkip({sorted(self.skipped)})"

    def predict(self, network: Network, noisy: NoisySample, y: Tensor, strong: DiTOutput) -> Tensor:
        before = self.keep_hidden[0]
        resume = (before, plain_tokens(network, before, strong, noisy, y))
        return network(noisy.x_t, noisy.t, y, skip_blocks=self.skipped, resume=resume).velocity
