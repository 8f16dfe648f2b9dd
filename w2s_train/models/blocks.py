"""The block of a `DiT`, as published in 2023 and with what later networks have changed in it.

A block attends over the tokens h and transforms each, modulated by the condition c:

    h <- h + gate_1(c) * Attention((1 + scale_1(c)) * N(h) + shift_1(c))
    h <- h + gate_2(c) * MLP((1 + scale_2(c)) * N(h) + shift_2(c))            "adaLN-Zero"

The switches compute what LightningDiT does (Yao et al., 2025), with the names of its parameters.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from w2s_train.errors import UserError
from w2s_train.models.rope import rotate

QKNorm = bool | Literal["layer"]


def modulate(h: Tensor, shift: Tensor | None, scale: Tensor) -> Tensor:
    """(1 + scale) * h + shift, for tokens (B, N, D) and per-sample vectors (B, D)."""
    scale = 1 + scale.unsqueeze(1)
    return h * scale if shift is None else torch.addcmul(shift.unsqueeze(1), h, scale)


def token_norm(width: int, rmsnorm: bool) -> nn.Module:
    """What stands before a modulation: RMSNorm has a weight, LayerNorm none."""
    if rmsnorm:
        return nn.RMSNorm(width, eps=1e-6)
    return nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)


def head_norm(qk_norm: QKNorm, rmsnorm: bool) -> Callable[[int], nn.Module]:
    """Of queries and keys, by head; see `DiT`. UserError: an unknown one."""
    if qk_norm not in (False, True, "layer"):
        raise UserError(f"qk_norm={qk_norm}: must be true, false or layer")
    if qk_norm == "layer":
        return nn.LayerNorm
    return partial(nn.RMSNorm, eps=1e-6 if rmsnorm else None) if qk_norm else nn.Identity


class Attention(nn.Module):
    """Every token attends to all, and to those that stand before them.

    Args:
        hidden_size: Width D of a token.
        num_heads: Heads.
        norm: Of queries and keys.
    """

    def __init__(self, hidden_size: int, num_heads: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.num_heads, width = num_heads, hidden_size // num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.q_norm, self.k_norm = norm(width), norm(width)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, h: Tensor, before: int, rotation: Tensor | None) -> Tensor:
        """What tokens (B, N, D) get, of (B, before + N, D) that are seen."""
        q, k, v = self.qkv(h).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q[:, :, before:]), self.k_norm(k)
        if rotation is not None:
            q, turned = rotate(q, rotation), rotate(k[:, :, before:], rotation)
            k = torch.cat([k[:, :, :before], turned], dim=2) if before else turned
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """An MLP with a gate (Shazeer, 2020): W3 (silu(a) * b), where (a, b) = W12 h.

    Args:
        width: Of a token.
        hidden: Of a and b.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w12, self.w3 = nn.Linear(width, 2 * hidden), nn.Linear(hidden, width)

    def forward(self, h: Tensor) -> Tensor:
        a, b = self.w12(h).chunk(2, dim=-1)
        return self.w3(F.silu(a) * b)


def swiglu_width(hidden_size: int, mlp_ratio: float) -> int:
    """Two thirds of that of an MLP without gate: as many parameters."""
    return int(2 / 3 * int(mlp_ratio * hidden_size))


class DiTBlock(nn.Module):
    """Attention and MLP, both modulated by the condition; for the arguments see `DiT`."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        mlp_ratio: float,
        qk_norm: QKNorm = False,
        swiglu: bool = False,
        rmsnorm: bool = False,
        shift: bool = True,
    ) -> None:
        from timm.layers import Mlp  # brings all of timm's models: seconds

        super().__init__()
        self.shift = shift
        self.norm1 = token_norm(hidden_size, rmsnorm)
        self.attn = Attention(hidden_size, num_heads, head_norm(qk_norm, rmsnorm))
        self.norm2 = token_norm(hidden_size, rmsnorm)
        gelu: Any = partial(nn.GELU, approximate="tanh")
        self.mlp: nn.Module
        if swiglu:
            self.mlp = SwiGLU(hidden_size, swiglu_width(hidden_size, mlp_ratio))
        else:
            self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio), act_layer=gelu)
        chunks = 6 if shift else 4
        self.adaLN_modulation = nn.Sequential(
            nn.SiLU(), nn.Linear(hidden_size, chunks * hidden_size)
        )

    def forward(
        self,
        h: Tensor,
        cond: Tensor,
        rotation: Tensor | None = None,
        class_tokens: Tensor | None = None,
    ) -> Tensor:
        """Tokens (B, N, D) behind it.

        Args:
            h: (B, N, D).
            cond: The condition (B, D).
            rotation: Of `Rope`, of the N tokens.
            class_tokens: (B, K, D), which the others see and which are not carried on.
        """
        parts: tuple[Any, ...] = self.adaLN_modulation(cond).chunk(6 if self.shift else 4, dim=1)
        if not self.shift:
            parts = (None, *parts[:2], None, *parts[2:])
        shift1, scale1, gate1, shift2, scale2, gate2 = parts
        seen = h if class_tokens is None else torch.cat([class_tokens, h], dim=1)
        before = seen.shape[1] - h.shape[1]
        change = self.attn(modulate(self.norm1(seen), shift1, scale1), before, rotation)
        h = torch.addcmul(h, gate1.unsqueeze(1), change)
        change = self.mlp(modulate(self.norm2(h), shift2, scale2))
        return torch.addcmul(h, gate2.unsqueeze(1), change)
