"""The network with most tokens left out of its middle blocks."""

import inspect
import math

from torch import Tensor

from w2s_train.errors import require
from w2s_train.interpolant import NoisySample
from w2s_train.models import DiTOutput, Network, middle_blocks, offered, plain_tokens
from w2s_train.weak.base import WeakSource
from w2s_train.weak.randomness import Randomness


class DroppedTokens(WeakSource):
    """The same network and label; blocks ``first`` to ``last`` see a random few of the tokens,
    drawn anew per row and pass, and the others pass them by unchanged.

    After guidance by token-sparse passes (arXiv 2601.01608, SPRINT). As many tokens are kept as
    make a square, which the last layer wants, and never all of several. The blocks before ``first``
    are those of the strong pass and not evaluated again, the last layer is evaluated twice.

    Args:
        share: Of the tokens, dropped, in (0, 1); rounded so that a smaller square is left.
        first: First block, counted from 0; None for the first one of the middle third.
        last: Last block; None for the last one of the middle third.

    Raises:
        UserError: A share out of its range; in `bind`, blocks that the network does not have, or in
            the wrong order.
    """

    random = True

    def __init__(
        self, share: float = 0.75, first: int | None = None, last: int | None = None
    ) -> None:
        super().__init__()
        self.share, self.first, self.last = require("share", share, "(0, 1)"), first, last

    def bind(self, network: Network) -> None:
        needed = ("depth", "keep_hidden=", "skip_blocks=", "resume=")
        depth = offered(network, "DroppedTokens", *needed)
        first, last = middle_blocks(depth, self.first, self.last)
        self.before, self.last_block, self.behind = first - 1, last, range(last + 1, depth)
        self.keep_hidden = (self.before,)
        self.places = "places" in inspect.signature(network.forward).parameters

    def describe(self) -> str:
        return f"DroppedTokens({self.share:g}, {self.before + 1}-{self.last_block})"

    def predict(  # type: ignore[override]
        self, network: Network, noisy: NoisySample, y: Tensor, strong: DiTOutput, random: Randomness
    ) -> Tensor:
        tokens, last = plain_tokens(network, self.before, strong, noisy, y), self.last_block
        count, width = tokens.shape[1:]
        side = min(round(math.sqrt((1 - self.share) * count)), math.isqrt(count - 1))
        kept = max(side, 1) ** 2
        chosen = random.numbers(count).argsort(1)[:, :kept].sort(1).values
        few: dict[str, object] = dict(skip_blocks=self.behind, keep_hidden=(last,))
        if self.places:
            few["places"] = chosen
        chosen = chosen.unsqueeze(2).expand(-1, -1, width)
        resume = (self.before, tokens.gather(1, chosen))
        seen = network(noisy.x_t, noisy.t, y, resume=resume, **few).hidden[last]
        tokens = tokens.to(seen.dtype).scatter(1, chosen, seen)
        return network(noisy.x_t, noisy.t, y, resume=(last, tokens)).velocity
