"""A control variate: most rows need no weak pass to be trained on the right target on average.

The shift of the target, scale (s - w), enters the gradient linearly. With a guess g of d = s - w at
all n rows of a segment, and the weak pass at m of them that are drawn at random,

    d' = g + (n / m) (d - g)  where w is known,    d' = g  elsewhere,

has the expectation d at every row, whatever the guess, as long as it does not depend on which rows
were drawn. Without a guess (g = 0) the variance per row is (n / m - 1) |d|^2; a guess leaves
(n / m - 1) |d - g|^2. (Control variates are standard in Monte Carlo; Owen, 2013, chapter 8.)
"""

import torch
from torch import Tensor, nn

from w2s_train.models import DiT, FinalLayer
from w2s_train.segment.base import Chosen, StrongPass, mean_square


class Guess(nn.Module):
    """A head on the strong pass's last tokens that learns d = strong - weak by regression.

    It begins with zero. Its own loss |d - g|^2 at the rows that are evaluated reaches nothing else.

    Args:
        network: The network being trained.
    """

    def __init__(self, network: DiT) -> None:
        super().__init__()
        self.block = network.depth - 1
        self.head = FinalLayer(network.hidden_size, network.patch_size, network.in_channels)

    def complete(
        self, difference: Tensor, strong: StrongPass, chosen: Chosen
    ) -> tuple[Tensor, Tensor]:
        """The difference d' (n, C, H, W) at all rows, and the loss (B,) of the guess.

        Args:
            difference: d (m, C, H, W) at the evaluated rows.
            strong: The strong pass.
            chosen: Which rows these are.
        """
        hidden, cond = strong.out.hidden[self.block][chosen.rows], strong.out.cond[chosen.rows]
        guess = self.head(hidden.detach(), cond.detach()).float()
        n, m = len(guess), len(difference)
        places = torch.arange(n, device=guess.device) if chosen.places is None else chosen.places
        error, loss = difference - guess[places], torch.zeros_like(strong.noisy.t)
        loss[chosen.evaluated] = mean_square(error)
        weight = n / max(m, 1)
        return guess.detach().index_add(0, places, weight * error.detach()), loss
