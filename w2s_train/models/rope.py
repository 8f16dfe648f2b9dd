"""Rotary positions (Su et al., 2021, "RoFormer") on a square grid of tokens, as in LightningDiT.

Pairs of channels of queries and keys are rotated by angles that are linear in a token's place, so
that their product depends on the difference of two places only:

    q' = q cos + R(q) sin,        R(q)_2i = -q_2i+1,  R(q)_2i+1 = q_2i.

With h the width of a head and f_j = 10,000^(-4j / h), the angle of channels 2j and 2j + 1 is
row * f_j, that of channels h/2 + 2j and h/2 + 2j + 1 is column * f_j.
"""

import torch
from torch import Tensor, nn

from w2s_train.errors import UserError


class Rope(nn.Module):
    """The cosines and sines of a square grid, row by row, sines with the signs of R(q).

    Args:
        width: Of a head, h; a multiple of 4.
        side: Of the grid, in tokens.

    Raises:
        UserError: Another width.
    """

    def __init__(self, width: int, side: int) -> None:
        super().__init__()
        if width % 4:
            raise UserError(f"rope=true: must have heads as wide as a multiple of 4, not {width}")
        rates = 10_000 ** -(torch.arange(width // 4, dtype=torch.float64) * 4 / width)
        axis = torch.arange(side, dtype=torch.float64).unsqueeze(1) * rates.repeat_interleave(2)
        row, column = axis.repeat_interleave(side, dim=0), axis.repeat(side, 1)
        angle = torch.cat([row, column], dim=1)
        self.table: Tensor
        sign = torch.tensor([-1.0, 1.0]).repeat(width // 2)
        table = torch.stack([angle.cos(), angle.sin() * sign]).float()
        self.register_buffer("table", table, persistent=False)

    def forward(self, places: Tensor | None = None) -> Tensor:
        """Cosines and sines (2, 1 or B, 1, n, h) of all tokens, or of those at places (B, n)."""
        if places is None:
            return self.table[:, None, None]
        return self.table[:, places].unsqueeze(2)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Queries or keys (B, heads, n, h), turned; in the precision that they have."""
    cos, sin = rotation
    swapped = x.unflatten(3, (-1, 2)).flip(4).flatten(3)
    return torch.addcmul(x * cos, swapped, sin).to(x.dtype)
