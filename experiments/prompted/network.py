"""Stable Diffusion 3's transformer, of diffusers, as a network of ours: prompts for labels.

A label becomes a prompt, its words tokens that the image attends to and a pooled vector beside the
time, as in Esser et al. (2024), arXiv 2403.03206; the empty prompt stands for no label. Words have
embeddings that are trained with the network in the place of frozen text encoders.
"""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from w2s_train.models.dit import DiTOutput, FinalLayer

NUMBERS = "zero one two three four five six seven eight nine".split()
PROMPTS = [f"a handwritten {number}" for number in NUMBERS] + [""]
WORDS = ["", *dict.fromkeys(word for prompt in PROMPTS for word in prompt.split())]
LENGTH = max(len(prompt.split()) for prompt in PROMPTS)


class Head(FinalLayer):
    """The last layer on the tokens of the image (B, N, D), of those of image and text."""

    def __init__(self, tokens: int, hidden_size: int, patch_size: int, channels: int) -> None:
        super().__init__(hidden_size, patch_size, channels)
        self.tokens = tokens

    def forward(self, h: Tensor, cond: Tensor) -> Tensor:
        return super().forward(h[:, : self.tokens], cond)


class PromptedSD3(nn.Module):
    """A velocity for images of ten digits, each asked for by a prompt.

    Args:
        input_size: Height and width of the input.
        patch_size: Side of a patch.
        in_channels: Channels C of the input.
        hidden_size: Width D of a token.
        depth: Number of joint blocks.
        num_heads: Attention heads per block.
    """

    null_class = len(PROMPTS) - 1
    num_classes = null_class

    def __init__(
        self,
        input_size: int = 28,
        patch_size: int = 4,
        in_channels: int = 1,
        hidden_size: int = 96,
        depth: int = 6,
        num_heads: int = 4,
    ) -> None:
        super().__init__()
        from diffusers import SD3Transformer2DModel

        self.arguments = dict(
            input_size=input_size,
            patch_size=patch_size,
            in_channels=in_channels,
            hidden_size=hidden_size,
            depth=depth,
            num_heads=num_heads,
        )
        self.shape, self.depth = (in_channels, input_size, input_size), depth
        self.hidden_size, self.tokens = hidden_size, (input_size // patch_size) ** 2
        self.sizes = (hidden_size, patch_size, in_channels)
        self.words = nn.Embedding(len(WORDS), hidden_size)
        self.places = nn.Parameter(0.02 * torch.randn(LENGTH, hidden_size))
        self.transformer: Any = SD3Transformer2DModel(
            sample_size=input_size,
            patch_size=patch_size,
            in_channels=in_channels,
            num_layers=depth,
            attention_head_dim=hidden_size // num_heads,
            num_attention_heads=num_heads,
            joint_attention_dim=hidden_size,
            caption_projection_dim=hidden_size,
            pooled_projection_dim=hidden_size,
            out_channels=in_channels,
            pos_embed_max_size=input_size // patch_size,
        )
        for name in ("norm_out", "proj_out"):
            delattr(self.transformer, name)
        self.head = self.make_head()
        asked = [[*prompt.split(), *[""] * LENGTH][:LENGTH] for prompt in PROMPTS]
        ids = torch.tensor([[WORDS.index(word) for word in words] for words in asked])
        self.ids: Tensor
        self.register_buffer("ids", ids, persistent=False)

    @property
    def blocks(self) -> nn.ModuleList:
        """The joint blocks."""
        blocks: nn.ModuleList = self.transformer.transformer_blocks
        return blocks

    def make_head(self) -> Head:
        """Another last layer, which begins with a velocity of zero."""
        return Head(self.tokens, *self.sizes)

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        y: Tensor,
        *,
        skip_blocks: Collection[int] = (),
        keep_hidden: Collection[int] = (),
        resume: tuple[int, Tensor] | None = None,
    ) -> DiTOutput:
        """Predict the velocity, as `DiT.forward`; tokens are those of the image, then the text's.

        Args:
            x_t: (B, C, H, W).
            t: (B,), in [0, 1].
            y: (B,) int64, in [0, 10]; 10 is the empty prompt.
            skip_blocks: Blocks to leave out.
            keep_hidden: Blocks whose tokens to return; -1 for what the first one gets.
            resume: A block and its tokens (B, N + LENGTH, D), of an earlier pass.
        """
        network = self.transformer
        text = self.words(self.ids[y]) + self.places
        cond = network.time_text_embed(1000 * t, text.mean(dim=1))
        if resume is None:
            done, h, context = -1, network.pos_embed(x_t), network.context_embedder(text)
        else:
            done, kept = resume
            h, context = kept[:, : self.tokens], kept[:, self.tokens :]
        hidden = {done: torch.cat([h, context], dim=1)} if done in keep_hidden else {}
        for i in range(done + 1, self.depth):
            if i not in skip_blocks:
                said, h = self.blocks[i](hidden_states=h, encoder_hidden_states=context, temb=cond)
                context = context if said is None else said  # the last one drops the text
            if i in keep_hidden:
                hidden[i] = torch.cat([h, context], dim=1)
        velocity = self.head(h, cond)
        return DiTOutput(velocity, velocity[:, :0], hidden, cond)
