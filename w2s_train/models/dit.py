"""The diffusion transformer (Peebles & Xie, 2023), with the parameter names of the published DiT
and SiT checkpoints.

An image or latent (B, C, H, W) is cut into N = (H/p)(W/p) patches; each block attends over them,
modulated by the condition c = embed(t) + embed(y), as `blocks` says. Its gates and the last layer
start at zero, so an untrained network predicts zero. Nothing in here is random and labels are never
dropped: who calls decides what the network sees.
"""

import math
from collections.abc import Collection, Sequence
from typing import Any, Literal, NamedTuple, cast

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from w2s_train.errors import require
from w2s_train.models.blocks import DiTBlock, QKNorm, modulate, token_norm
from w2s_train.models.in_context import Context
from w2s_train.models.prediction import known, to_velocity
from w2s_train.models.rope import Rope
from w2s_train.models.scale_embedder import ScaleInputs
from w2s_train.models.sizes import check_sizes


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


class DiTOutput(NamedTuple):
    """What one pass of a `DiT` returns."""

    velocity: Tensor  # (B, C, H, W)
    rest: Tensor  # (B, out_channels - C, H, W): a variance, in published networks; or no channel
    # Block -> its output tokens (B, N, D), for the blocks asked for; -1 is what the first one gets.
    hidden: dict[int, Tensor]
    cond: Tensor  # (B, D), without scales

    def take(self, rows: slice | Tensor, blocks: Collection[int]) -> "DiTOutput":
        """The same for some rows, a slice (a view) or an index (n,), with tokens of ``blocks``."""
        hidden = {block: self.hidden[block][rows] for block in blocks}
        return DiTOutput(self.velocity[rows], self.rest[rows], hidden, self.cond[rows])


class FinalLayer(nn.Module):
    """Tokens (B, N, D) and condition (B, D) to an image (B, out_channels, H, W)."""

    def __init__(
        self, hidden_size: int, patch_size: int, out_channels: int, rmsnorm: bool = False
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.norm_final = token_norm(hidden_size, rmsnorm)
        self.linear = nn.Linear(hidden_size, patch_size**2 * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))
        self.zero()

    def zero(self) -> None:
        """Predict zero, whatever the tokens are."""
        zero_parameters(self.linear, self.adaLN_modulation[1])

    def forward(self, h: Tensor, cond: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(cond).chunk(2, dim=1)
        patches = self.linear(modulate(self.norm_final(h), shift, scale))
        side, p = math.isqrt(h.shape[1]), self.patch_size
        return rearrange(patches, "b (h w) (p q c) -> b c (h p) (w q)", h=side, w=side, p=p, q=p)


class DiT(ScaleInputs):
    """A diffusion transformer that predicts a velocity.

    Sizes in the literature (depth, hidden_size, num_heads): S 12, 384, 6; B 12, 768, 12;
    L 24, 1024, 16; XL 28, 1152, 16; with patch_size 2, 4 or 8.

    Args:
        input_size: Height and width of the input, in pixels or latent cells.
        patch_size: Side of a patch; divides ``input_size``.
        in_channels: Channels C of the input.
        hidden_size: Width D of a token; a multiple of 4 and of ``num_heads``.
        depth: Number of blocks.
        num_heads: Attention heads per block.
        mlp_ratio: Width of the MLPs over ``hidden_size``.
        num_classes: Labels are 0 ... num_classes - 1; ``null_class`` = num_classes.
        out_channels: Channels of the last layer, at least C; what exceeds C is `DiTOutput.rest`.
        qk_norm: RMS-normalize queries and keys (Dehghani et al., 2023), steadier in bf16; "layer"
            for a LayerNorm with weight and bias, as LightningDiT has it without ``rmsnorm``.
        gradient_checkpointing: Recompute so many blocks at a time in the backward pass: less
            memory, more time; benchmarks/memory.py says how much. True is 1; 0 is none.
        time_scale: The network embeds time_scale * t + time_shift: 1 and 0 here and in REPA;
            -1 and 1 in SiT, whose time runs the other way.
        time_shift: See ``time_scale``.
        scales: Names of scales that are inputs, too; see `add_scales`. None is none.
        scales_from: First block that sees them. Later ones scored worse: experiments/mnist_drawn.
        rope: Rotary positions in every block, beside the table that is added once.
        swiglu: MLPs with a gate, of two thirds of the width.
        rmsnorm: RMSNorm with a weight instead of LayerNorm without.
        shift: Whether the condition shifts the tokens in blocks, beside scales and gates.
        class_tokens: So many tokens of the class that every block attends to (`in_context`).
        data_on: The last layer says the data, on this interpolant (`prediction`); None: velocity.

    Raises:
        UserError: A size that does not divide another, or is not positive, or an unknown name.
    """

    def __init__(
        self,
        input_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        out_channels: int | None = None,
        qk_norm: QKNorm = False,
        gradient_checkpointing: int | bool = 0,
        time_scale: float = 1.0,
        time_shift: float = 0.0,
        scales: list[str] | None = None,
        scales_from: int = 0,
        rope: bool = False,
        swiglu: bool = False,
        rmsnorm: bool = False,
        shift: bool = True,
        class_tokens: int = 0,
        data_on: Literal["linear", "cosine"] | None = None,
    ) -> None:
        super().__init__()
        sizes = dict(
            input_size=input_size, patch_size=patch_size, in_channels=in_channels, depth=depth
        )
        sizes |= dict(hidden_size=hidden_size, num_heads=num_heads, num_classes=num_classes)
        out_channels = in_channels if out_channels is None else out_channels
        check_sizes(sizes, mlp_ratio, out_channels)
        require("gradient_checkpointing", gradient_checkpointing, "[0, inf)")
        require("class_tokens", class_tokens, "[0, inf)")
        kind: dict[str, Any] = dict(qk_norm=qk_norm, swiglu=swiglu, rmsnorm=rmsnorm, shift=shift)
        self.arguments: dict[str, Any] = sizes | kind | dict(mlp_ratio=mlp_ratio, rope=rope)
        self.arguments |= dict(class_tokens=class_tokens, data_on=data_on)
        self.gradient_checkpointing = int(gradient_checkpointing)
        self.arguments |= dict(gradient_checkpointing=int(gradient_checkpointing))
        self.arguments |= dict(out_channels=out_channels, time_scale=time_scale)
        self.arguments |= dict(time_shift=time_shift)
        self.input_size, self.patch_size, self.in_channels = input_size, patch_size, in_channels
        self.hidden_size, self.depth, self.num_classes = hidden_size, depth, num_classes
        self.num_heads, self.time_scale, self.time_shift = num_heads, time_scale, time_shift
        self.rmsnorm, self.data_on = rmsnorm, known(data_on)

        from timm.layers import PatchEmbed  # late, as in `blocks`

        self.x_embedder = PatchEmbed(input_size, patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size)
        table = position_table(hidden_size, side := input_size // patch_size)
        self.pos_embed = nn.Parameter(table.unsqueeze(0), requires_grad=False)
        self.blocks: Sequence[DiTBlock] = nn.ModuleList(  # type: ignore[assignment]
            DiTBlock(hidden_size, num_heads, mlp_ratio, **kind) for _ in range(depth)
        )
        self.final_layer = FinalLayer(hidden_size, patch_size, out_channels, rmsnorm)
        turned = Rope(hidden_size // num_heads, side) if rope else None
        self.context = Context(hidden_size, class_tokens, turned)
        self._initialize()
        self.take_scales(scales, scales_from)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the input."""
        return (self.in_channels, self.input_size, self.input_size)

    def make_head(self) -> nn.Module:
        """A last layer for the tokens (B, N, D) and condition (B, D) of any block."""
        return FinalLayer(self.hidden_size, self.patch_size, self.in_channels, self.rmsnorm)

    @property
    def null_class(self) -> int:
        """The label that means "no class"."""
        return self.num_classes

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        y: Tensor,
        *,
        skip_blocks: Collection[int] = (),
        keep_hidden: Collection[int] = (),
        resume: tuple[int, Tensor] | None = None,
        scales: Tensor | None = None,
        places: Tensor | None = None,
    ) -> DiTOutput:
        """Predict the velocity at noisy samples.

        Args:
            x_t: (B, C, H, W).
            t: (B,), in [0, 1].
            y: (B,) int64, in [0, num_classes].
            skip_blocks: Blocks to leave out, counted from 0.
            keep_hidden: Blocks whose output tokens to return, counted from 0; -1 for what the first
                one gets.
            resume: A block and its output tokens (B, N, D) at the same x_t, of an earlier pass;
                the blocks up to it are not evaluated again.
            scales: (B, K), see `add_scales`; None is 0.
            places: (B, n) int64, which ones the tokens of ``resume`` are; None is all, in order.
        """
        # Contiguous, or each norm copies them; and torch 2.15 compiles NaN of them (bf16, CPU).
        done, h = resume or (-1, self.x_embedder(x_t).contiguous() + self.pos_embed)
        label = self.y_embedder(y)
        cond = self.t_embedder(self.time_scale * t + self.time_shift) + label
        told, context = self.told(cond, scales), self.context(label, places)
        hidden = {done: h} if done in keep_hidden else {}
        recompute = self.gradient_checkpointing > 0 and torch.is_grad_enabled()
        size = self.gradient_checkpointing if recompute else self.depth
        for first in range(done + 1, self.depth, size):
            blocks = range(first, min(first + size, self.depth))
            arguments = (blocks, h, cond, told, context, skip_blocks, keep_hidden)
            if recompute:  # nothing in there is random
                options: Any = dict(use_reentrant=False, preserve_rng_state=False)
                h, kept = checkpoint(self._run, *arguments, **options)
            else:
                h, kept = self._run(*arguments)
            hidden |= kept
        out = self.final_layer(h, told)
        velocity, rest = out[:, : self.in_channels], out[:, self.in_channels :]
        return DiTOutput(to_velocity(self, velocity, x_t, t), rest, hidden, cond)

    def _run(
        self,
        blocks: range,
        h: Tensor,
        cond: Tensor,
        told: Tensor,
        context: tuple[Tensor | None, ...],
        skip_blocks: Collection[int],
        keep_hidden: Collection[int],
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Tokens (B, N, D) after some blocks, and those to be kept on the way."""
        hidden = {}
        for i in blocks:
            if i not in skip_blocks:
                h = self.blocks[i](h, cond if i < self.scales_from else told, *context)
            if i in keep_hidden:
                hidden[i] = h
        return h, hidden

    def _initialize(self) -> None:
        """As published: Xavier for linear layers, 0.02 for embeddings, zero for gates."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        projection = self.x_embedder.proj
        nn.init.xavier_uniform_(projection.weight.view(self.hidden_size, -1))
        nn.init.zeros_(cast(Tensor, projection.bias))
        for weight in (self.y_embedder.embedding_table.weight, *self.t_embedder.mlp.parameters()):
            if weight.ndim == 2:
                nn.init.normal_(weight, std=0.02)
        for block in self.blocks:
            zero_parameters(block.adaLN_modulation[1])
        self.final_layer.zero()


def zero_parameters(*layers: nn.Module) -> None:
    """Set all parameters of the layers to zero."""
    for layer in layers:
        for parameter in layer.parameters():
            nn.init.zeros_(parameter)
