"""What maps tokens of the network to those of an encoder; trained with the network."""

import abc
import math

from torch import Tensor, nn

from w2s_train.errors import UserError, require


class Projector(nn.Module, abc.ABC):
    """Tokens (B, N, D) of the network to tokens (B, N, F) like the encoder's."""

    @abc.abstractmethod
    def bind(self, width: int, features: int) -> None:
        """Make the layers, from ``width`` D to ``features`` F."""


class MLP(Projector):
    """Three linear layers with SiLU between them, token by token: that of REPA.

    Args:
        hidden: Width of the two hidden layers.

    Raises:
        UserError: It is not positive.
    """

    def __init__(self, hidden: int = 2048) -> None:
        super().__init__()
        self.hidden = require("hidden", hidden, "[1, inf)")

    def bind(self, width: int, features: int) -> None:
        first, second = nn.Linear(width, self.hidden), nn.Linear(self.hidden, self.hidden)
        last = nn.Linear(self.hidden, features)
        self.layers = nn.Sequential(first, nn.SiLU(), second, nn.SiLU(), last)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.layers(tokens)


class Convolution(Projector):
    """One convolution over the square grid of tokens: that of iREPA.

    Args:
        kernel_size: Its height and width, odd.

    Raises:
        UserError: It is even, or not positive.
    """

    def __init__(self, kernel_size: int = 3) -> None:
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise UserError(f"kernel_size={kernel_size}: must be odd, and at least 1")
        self.kernel_size = kernel_size

    def bind(self, width: int, features: int) -> None:
        self.layer = nn.Conv2d(width, features, self.kernel_size, padding=self.kernel_size // 2)

    def forward(self, tokens: Tensor) -> Tensor:
        side = math.isqrt(tokens.shape[1])
        grid = tokens.transpose(1, 2).unflatten(2, (side, side))
        return self.layer(grid).flatten(2).transpose(1, 2)
