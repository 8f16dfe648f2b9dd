"""Published DiT, SiT and LightningDiT weights, converted to the conventions of this project.

| weights | time | predicts | what changes here |
|---|---|---|---|
| REPA and the SGG release | t = 0 is data | velocity | nothing |
| SiT (original) | t = 1 is data | velocity of the reversed path | v(x, t) = -v_SiT(x, 1 - t) |
| LightningDiT | t = 1 is data | the same | the same |
| DiT | steps 0 ... 999, 0 is clean | noise, variance-preserving path | `NoisePredictionField` |

The sign and the time of SiT are absorbed when loading: the last layer is negated and the network
embeds 1 - t. Channels that predict a variance (``learn_sigma``) are dropped from the last layer.
"""

import argparse
import math
import warnings
from typing import Any

import torch
from torch import Tensor

from w2s_train.checkpoint_file import read_file
from w2s_train.errors import UserError
from w2s_train.interpolant import Interpolant
from w2s_train.models.blocks import swiglu_width
from w2s_train.models.dit import DiT
from w2s_train.models.rope import Rope
from w2s_train.models.warm_start import fitted

TEACHING = ("projectors.",)  # of REPA: of training only
PARTS = """
    x_embedder. t_embedder. y_embedder. blocks. final_layer. pos_embed feat_rope.
""".split()
COS, SIN = "feat_rope.freqs_cos", "feat_rope.freqs_sin"  # of LightningDiT: tables that we compute
FC1, SWIGLU, QK = "blocks.0.mlp.fc1.weight", "blocks.0.mlp.w12.weight", "blocks.0.attn.q_norm."
NEEDED = """
    pos_embed x_embedder.proj.weight y_embedder.embedding_table.weight
    blocks.0.adaLN_modulation.1.weight final_layer.linear.weight final_layer.linear.bias
""".split()
HOLDERS = ("ema", "model", "state_dict")  # where training checkpoints have the weights; in order
WRAPPERS = ("_orig_mod.", "module.", "_orig_mod.", "model.")  # of compiled and distributed modules
PUBLISHED_HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}


def architecture(state: dict[str, Tensor], num_heads: int | None = None) -> dict[str, Any]:
    """The arguments of `DiT` that a state dict with the published keys was made with.

    Args:
        state: The state dict.
        num_heads: Heads cannot be told from shapes; None for the published S, B, L and XL.

    Raises:
        UserError: Neither given nor a published width, or another number than the published one.
    """
    tokens, hidden_size = state["pos_embed"].shape[1:]
    _, in_channels, patch_size, _ = state["x_embedder.proj.weight"].shape
    known = PUBLISHED_HEADS.get(hidden_size)
    if COS in state:  # which is as wide as a head
        known = hidden_size // state[COS].shape[1]
    if num_heads is None and known is None:
        raise UserError(f"num_heads=None: must be given for hidden_size={hidden_size}")
    if num_heads is not None and known not in (None, num_heads):
        raise UserError(
            f"num_heads={num_heads}: must be null or {known}, as published for hidden_size="
            f"{hidden_size}; an earlier config may have set it"
        )
    return dict(
        input_size=math.isqrt(tokens) * patch_size,
        patch_size=patch_size,
        in_channels=in_channels,
        hidden_size=hidden_size,
        depth=1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks.")),
        num_heads=num_heads or known,
        mlp_ratio=_mlp_ratio(state, hidden_size),
        num_classes=state["y_embedder.embedding_table.weight"].shape[0] - 1,
        out_channels=state["final_layer.linear.weight"].shape[0] // patch_size**2,
        qk_norm="layer" if f"{QK}bias" in state else f"{QK}weight" in state,
        rope=COS in state,
        swiglu=SWIGLU in state,
        rmsnorm="blocks.0.norm1.weight" in state,
        shift=len(state["blocks.0.adaLN_modulation.1.weight"]) != 4 * hidden_size,
    )


def check_positions(path: str, state: dict[str, Tensor], sizes: dict[str, Any]) -> None:
    """Take the tables of rotary positions out of a state dict; those of others are refused.

    Raises:
        UserError: They are not those that `Rope` computes for the sizes.
    """
    if sizes["rope"]:
        side = sizes["input_size"] // sizes["patch_size"]
        ours = Rope(sizes["hidden_size"] // sizes["num_heads"], side).table
        ours[1, :, ::2] *= -1  # signs
        atol = 5e-3 if state[COS].dtype == torch.bfloat16 else 1e-3
        theirs = torch.stack([state.pop(COS), state.pop(SIN)]).float()
        if theirs.shape != ours.shape or not torch.allclose(theirs, ours, rtol=0, atol=atol):
            raise UserError(f"path={path}: must have rotary positions of a grid of {side}x{side}")


def _mlp_ratio(state: dict[str, Tensor], hidden_size: int) -> float:
    if SWIGLU not in state:
        return len(state[FC1]) / hidden_size
    width = len(state[SWIGLU]) // 2  # which rounding has made of the ratio, mostly of 4
    return 4.0 if swiglu_width(hidden_size, 4.0) == width else (1.5 * width + 1) / hidden_size


def published_sit(
    path: str,
    num_heads: int | None = None,
    reversed_time: bool = True,
    num_classes: int | None = None,
    input_size: int | None = None,
) -> DiT:
    """A `DiT` with the weights of a published SiT, predicting velocities in our convention.

    With another number of classes or size it is a start for fine-tuning: each class begins as the
    null class was, and positions are resampled (`models.warm_start`).

    Args:
        path: A ``.pt`` file: a state dict, alone or under the key "ema", "model" or "state_dict".
        num_heads: Attention heads; None for the published S, B, L and XL.
        reversed_time: True for the original SiT (t = 1 is data), False for REPA and SGG.
        num_classes: Instead of the published number.
        input_size: Height and width of the input instead of the published ones, in latent cells.

    Raises:
        UserError: A file that cannot be read, or holds no SiT; a width that needs ``num_heads``.
    """
    state = _read(path)
    sizes = architecture(state, num_heads)
    check_positions(path, state, sizes)
    channels, sign = int(sizes["in_channels"]), -1 if reversed_time else 1
    for key in ("final_layer.linear.weight", "final_layer.linear.bias"):
        # Rows are ordered (p, q, channel); keep the velocity, drop the variance.
        rows = state[key].unflatten(0, (-1, int(sizes["out_channels"])))
        state[key] = sign * rows[:, :channels].flatten(0, 1)
    sizes["out_channels"] = channels
    if reversed_time:
        sizes |= dict(time_scale=-1.0, time_shift=1.0)
    other = dict(num_classes=num_classes, input_size=input_size)
    network = DiT(**(sizes | {key: value for key, value in other.items() if value is not None}))
    return _load(path, network, state)


def published_lightningdit(
    path: str,
    num_heads: int | None = None,
    num_classes: int | None = None,
    input_size: int | None = None,
) -> DiT:
    """A `DiT` with the weights of a published LightningDiT (Yao et al., 2025), as `published_sit`.

    Which switches it was made with is told by its weights.

    Args:
        path: See `published_sit`.
        num_heads: Attention heads; None for the published B, L and XL, and with rotary positions.
        num_classes: Instead of the published number.
        input_size: Height and width of the input instead of the published ones, in latent cells.

    Raises:
        UserError: As `published_sit`; rotary positions of another kind.
    """
    network = published_sit(path, num_heads, True, num_classes, input_size)
    if network.context.rope is None:
        warnings.warn(
            f"path={path}: has no rotary positions (feat_rope), as published", stacklevel=2
        )
    return network


def published_dit(path: str, num_heads: int | None = None) -> DiT:
    """A `DiT` with the weights of a published DiT: its "velocity" is the noise of a DDPM step.

    Its t counts steps, 0 ... 999; sample it through `NoisePredictionField`.

    Args:
        path: A ``.pt`` file: a state dict, alone or under the key "ema", "model" or "state_dict".
        num_heads: Attention heads; None for the published S, B, L and XL.
    """
    state = _read(path)
    return _load(path, DiT(**architecture(state, num_heads)), state)


def _read(path: str) -> dict[str, Tensor]:
    """The weights of a file, under the names that a network of its own gives them."""
    with torch.serialization.safe_globals([argparse.Namespace]):  # training settings, unused
        content = read_file(path)
    whole = next((content[key] for key in HOLDERS if isinstance(content.get(key), dict)), content)
    state, other = dict[str, Tensor](), dict[str, None]()
    for key, value in whole.items():
        for prefix in WRAPPERS:
            key = key.removeprefix(prefix)
        if key.startswith(tuple(PARTS)) and isinstance(value, Tensor):
            state[key] = value
        elif isinstance(value, Tensor) and not key.startswith(TEACHING):
            other[key.partition(".")[0]] = None
    more = [SWIGLU if SWIGLU in state else FC1, *([SIN] if COS in state else [])]
    if missing := [key for key in (*NEEDED, *more) if key not in state]:
        raise UserError(
            f"path={path}: must hold a published DiT, SiT or LightningDiT; lacks {missing[0]}"
        )
    if other:
        said = f"left out {', '.join(other)}, which a DiT does not have"
        warnings.warn(f"path={path}: {said}; what needs it computes something else", stacklevel=4)
    return state


def _load(path: str, network: DiT, state: dict[str, Tensor]) -> DiT:
    fit, unknown = fitted(state, own := network.state_dict()), sorted(state.keys() - own.keys())
    if fit.left or unknown:
        problems = "; ".join([*fit.left, *(f"{key} is unknown" for key in unknown)])[:200]
        raise UserError(f"path={path}: must hold all weights of a DiT, no more; {problems}")
    network.load_state_dict(fit.state)
    if fit.changed:
        warnings.warn(f"path={path}: {'; '.join(fit.changed)}", stacklevel=3)
    return network


class NoisePredictionField:
    """The velocity of ``interpolant`` according to a network that predicts the noise of DDPM steps.

    DDPM mixes z = sqrt(a_k) x + sqrt(1 - a_k) e with a_k the product of 1 - beta up to step k and
    beta linear from 1e-4 to 0.02 (Ho et al., 2020). At equal noise level sigma / alpha the two
    differ by a factor only: z = x_t sqrt(a_k) / alpha(t), at a fractional step k. Then
    x = (x_t - sigma e) / alpha and v = alpha' x + sigma' e.

    Args:
        network: A network from `published_dit`.
        y: Labels (B,) int64.
        interpolant: Whose velocity to return.
    """

    def __init__(self, network: DiT, y: Tensor, interpolant: Interpolant) -> None:
        self.network, self.y, self.interpolant = network, y, interpolant
        self.a = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64).neg().add(1).cumprod(0)
        self.log_level = ((1 - self.a) / self.a).log() / 2

    def step_of(self, log_level: float) -> float:
        """The fractional DDPM step, in [0, 999], at a noise level given by its logarithm."""
        k = int(torch.searchsorted(self.log_level, log_level).clamp(1, 999))
        low, high = self.log_level[k - 1].item(), self.log_level[k].item()
        return min(max(k - 1 + (log_level - low) / (high - low), 0.0), 999.0)

    def __call__(self, x_t: Tensor, t: float, start: float) -> Tensor:
        """The velocity at (x_t, t), shaped and typed like ``x_t``; ``start`` is not used."""
        time = torch.tensor(t, dtype=torch.float64)
        alpha, sigma, alpha_dot, sigma_dot = (float(c) for c in self.interpolant.coefficients(time))
        # Pure noise has no finite level; DDPM's last step is within 0.6 % of it.
        top = self.log_level[-1].item()
        level = math.log(sigma / alpha) if alpha > 1e-9 else top
        step = self.step_of(min(level, top))
        # sqrt(a_k) / alpha, by way of the variance: both mixtures are scaled to a unit norm.
        z = x_t / math.sqrt(alpha**2 + sigma**2)
        steps = torch.full((len(x_t),), step, device=x_t.device)
        noise = self.network(z.float(), steps, self.y).velocity.to(x_t.dtype)
        x = (x_t - sigma * noise) / max(alpha, math.exp(-top) * sigma)
        return alpha_dot * x + sigma_dot * noise
