"""What the blocks of a network see beside its tokens: where these are, and the class."""

import torch
from torch import Tensor, nn

from w2s_train.models.rope import Rope


class Context(nn.Module):
    """Rotary positions and tokens of the class, each if there are any; see `DiT`.

    The tokens are the embedding of the label, each with a vector of its own added (as in JiT, Li &
    He, 2025). There, and in DiT "in context", they pass through the blocks with the others. Here
    every block gets them anew, so that a pass can go on from the tokens of the image alone.

    Args:
        hidden_size: Width D of a token.
        class_tokens: How many, K.
        rope: Rotary positions, or None.
    """

    def __init__(self, hidden_size: int, class_tokens: int, rope: Rope | None) -> None:
        super().__init__()
        self.rope = rope
        self.tokens = nn.Parameter(torch.empty(class_tokens, hidden_size)) if class_tokens else None
        if self.tokens is not None:
            nn.init.normal_(self.tokens, std=0.02)

    def forward(self, label: Tensor, places: Tensor | None) -> tuple[Tensor | None, ...]:
        """For labels as vectors (B, D), and tokens at places (B, n) or everywhere: what
        `DiTBlock` takes, nothing if there is nothing.
        """
        if self.rope is None and self.tokens is None:
            return ()
        rotation = None if self.rope is None else self.rope(places)
        return rotation, None if self.tokens is None else label.unsqueeze(1) + self.tokens
