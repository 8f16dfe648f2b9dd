"""What a diffusion transformer makes of times, labels and places."""

import math

import torch
from torch import Tensor, nn


class TimestepEmbedder(nn.Module):
    """Sines and cosines of t, then an MLP to (B, hidden_size)."""

    def __init__(self, hidden_size: int, frequencies: int = 256) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(frequencies, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )
        # Rates from 1 to 1/10,000, as in "Attention is all you need"; float32 whatever the mode.
        self.rates: Tensor
        rates = torch.exp(-math.log(10_000) * torch.arange(frequencies // 2) / (frequencies // 2))
        self.register_buffer("rates", rates, persistent=False)

    def forward(self, t: Tensor) -> Tensor:
        angle = t.float().unsqueeze(1) * self.rates
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=1))


class LabelEmbedder(nn.Module):
    """One vector per class, and one more for the null class."""

    def __init__(self, num_classes: int, hidden_size: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)


def position_table(dim: int, side: int) -> Tensor:
    """Sines and cosines of a token's place, (side * side, dim), row by row.

    The first half of the channels encodes the column, the second half the row, as in MAE.
    """
    rates = 10_000 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angle = torch.arange(side, dtype=torch.float64).unsqueeze(1) * rates
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)
    column, row = axis.repeat(side, 1), axis.repeat_interleave(side, dim=0)
    return torch.cat([column, row], dim=1).float()
