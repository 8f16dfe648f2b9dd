"""The network with what some blocks say handed to the wrong tokens."""

from torch import Tensor

from w2s_train.interpolant import NoisySample
from w2s_train.models import DiTOutput, Network, middle_blocks, offered, plain_tokens
from w2s_train.weak.base import WeakSource
from w2s_train.weak.randomness import Randomness


class ShuffledTokens(WeakSource):
    """The same network and label; what blocks ``first`` to ``last`` add goes to other tokens.

    With P a permutation of the tokens, drawn anew per row and pass, and h those of the strong pass,

        h_last <- h_(first - 1) + P (h_last - h_(first - 1)).

    After token perturbation guidance (TPG, arXiv 2506.10036), which shuffles the tokens themselves
    in some layers. The blocks of a `DiT` see no positions but those that tokens bring along:
    shuffled tokens come out as a shuffled image, and put back in order, as the same one. So what is
    shuffled here is what is added, and each token stays where it is. Only the blocks behind
    ``last`` are evaluated again.

    Args:
        first: First block, counted from 0; None for the first one of the middle third.
        last: Last block; None for the last one of the middle third.

    Raises:
        UserError: In `bind`, blocks that the network does not have, or in the wrong order.
    """

    random = True

    def __init__(self, first: int | None = None, last: int | None = None) -> None:
        super().__init__()
        self.first, self.last = first, last

    def bind(self, network: Network) -> None:
        depth = offered(network, "ShuffledTokens", "depth", "keep_hidden=", "resume=")
        first, last = middle_blocks(depth, self.first, self.last)
        self.keep_hidden = (first - 1, last)

    def describe(self) -> str:
        return f"ShuffledTokens({self.keep_hidden[0] + 1}-{self.keep_hidden[1]})"

    def predict(  # type: ignore[override]
        self, network: Network, noisy: NoisySample, y: Tensor, strong: DiTOutput, random: Randomness
    ) -> Tensor:
        before, after = (plain_tokens(network, k, strong, noisy, y) for k in self.keep_hidden)
        order = random.numbers(before.shape[1]).argsort(1).unsqueeze(2).expand_as(before)
        tokens = before + (after - before).gather(1, order)
        return network(noisy.x_t, noisy.t, y, resume=(self.keep_hidden[1], tokens)).velocity
