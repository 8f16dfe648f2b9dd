"""Scales as inputs of a network."""

from typing import Any

import torch
from torch import Tensor, nn

from w2s_train.errors import UserError, require


class ScaleEmbedder(nn.Module):
    """One embedding per scale, summed: sines and cosines of w, then an MLP to (B, hidden_size).

    Features and layers without bias vanish at w = 0: scale 0 is the network without the input,
    whatever has been learned. The last layers start at zero, so that it begins as that network.

    Args:
        number: K, of scales.
        hidden_size: Width.
        frequencies: Of the sines; from 1 to 16 radians per unit of w.
    """

    def __init__(self, number: int, hidden_size: int, frequencies: int = 8) -> None:
        super().__init__()
        self.mlps = nn.ModuleList(
            nn.Sequential(
                nn.Linear(2 * frequencies, hidden_size, bias=False),
                nn.SiLU(),
                nn.Linear(hidden_size, hidden_size, bias=False),
            )
            for _ in range(number)
        )
        for mlp in self.mlps:
            nn.init.zeros_(list(mlp.parameters())[-1])
        self.rates: Tensor
        self.register_buffer("rates", 2 ** torch.linspace(0, 4, frequencies), persistent=False)

    def forward(self, scales: Tensor) -> Tensor:
        """(B, hidden_size) of scales (B, K)."""
        angle = scales.float().unsqueeze(2) * self.rates
        features = torch.cat([angle.sin(), 1 - angle.cos()], dim=2)
        parts = [mlp(features[:, k]) for k, mlp in enumerate(self.mlps)]
        return torch.stack(parts).sum(0)


class ScaleInputs(nn.Module):
    """A network that can take scales as inputs; one with blocks and a width, for the rest of it.

    Blocks before ``scales_from`` do not see them, and the condition that heads get is without them:
    a head on those blocks is the same weak prediction whatever the scale is.
    """

    hidden_size: int
    depth: int
    arguments: dict[str, Any]
    scales: list[str]  # names, in the order of the input
    scale_embedder: ScaleEmbedder | None

    def take_scales(self, names: list[str] | None, first: int) -> None:
        """Say, at the end of the constructor, which there are so far, and the first block to see.

        Raises:
            UserError: There is no such block.
        """
        self.scales, self.scale_embedder = [], None
        self.scales_from = int(require("scales_from", first, f"[0, {self.depth}]"))
        if names:
            self.add_scales(names)

    def add_scales(self, names: list[str]) -> None:
        """Take these scales, in this order; what the network computes stays until it is trained.

        Raises:
            UserError: It has others.
        """
        if self.scales not in ([], names):
            raise UserError(f"network.scales={self.scales}: must be {names}, as the segments draw")
        if not self.scales:
            self.scales, self.scale_embedder = names, ScaleEmbedder(len(names), self.hidden_size)
            self.arguments |= dict(scales=names, scales_from=self.scales_from)

    def told(self, cond: Tensor, scales: Tensor | None) -> Tensor:
        """The condition (B, D) with scales (B, K); None is 0.

        Raises:
            UserError: It has no such inputs.
        """
        if scales is None:
            return cond
        if self.scale_embedder is None or scales.shape[1:] != (len(self.scales),):
            raise UserError(
                f"network.scales={self.scales}: must name the inputs that are told, "
                f"{tuple(scales.shape)}"
            )
        return cond + self.scale_embedder(scales)
