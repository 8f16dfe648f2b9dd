"""The network with other blocks left out at each pass."""

import math

import torch
from torch import Tensor

from w2s_train.errors import UserError, require
from w2s_train.interpolant import NoisySample
from w2s_train.models import DiTOutput, Network, offered, plain_tokens
from w2s_train.weak.base import WeakSource
from w2s_train.weak.randomness import Randomness


class RandomBlocks(WeakSource):
    """The same network and label, with a random share of the blocks skipped, drawn anew per pass
    (S^2, arXiv 2508.12880: about a tenth).

    The sets are few and made beforehand: a compiled network has a graph for each, and no more. The
    blocks before the first skipped one are those of the strong pass and not evaluated again.

    Args:
        share: Of the blocks, in (0, 1); at least one block is left out.
        sets: How many sets there are to draw from; fewer if there are not as many.
        seed: Of the sets. The draws are the run's, or at sampling those of `randomness.Seeded`.

    Raises:
        UserError: A number out of its range; in `bind`, a network of which no block would be left.
    """

    random = True

    def __init__(self, share: float = 0.1, sets: int = 8, seed: int = 0) -> None:
        super().__init__()
        self.share, self.sets = require("share", share, "(0, 1)"), require("sets", sets, "[1, inf)")
        self.seed = require("seed", seed, "[0, inf)")

    def bind(self, network: Network) -> None:
        depth = offered(network, "RandomBlocks", "depth", "keep_hidden=", "skip_blocks=", "resume=")
        size = max(round(self.share * depth), 1)
        if size == depth:
            raise UserError(f"share={self.share}: must leave some of the network's {depth} blocks")
        generator, found = torch.Generator().manual_seed(self.seed), dict[frozenset[int], None]()
        while len(found) < min(self.sets, math.comb(depth, size)):
            blocks = torch.randperm(depth, generator=generator)[:size]
            found[frozenset(blocks.tolist())] = None
        self.skipped = list(found)
        self.keep_hidden = tuple(sorted({min(blocks) - 1 for blocks in self.skipped}))

    def describe(self) -> str:
        return f"RandomBlocks({self.share:g}, {self.sets} sets of seed {self.seed})"

    def predict(  # type: ignore[override]
        self, network: Network, noisy: NoisySample, y: Tensor, strong: DiTOutput, random: Randomness
    ) -> Tensor:
        skipped = self.skipped[random.choice(len(self.skipped))]
        before = min(skipped) - 1
        resume = (before, plain_tokens(network, before, strong, noisy, y))
        return network(noisy.x_t, noisy.t, y, skip_blocks=skipped, resume=resume).velocity
