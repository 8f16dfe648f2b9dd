"""A guidance scale that a small network learns for each prompt and step, optionally for a reward.

After Galashov et al. (2025, "Learn to Guide Your Diffusion Model", arXiv 2510.00815); the formulas
are those of `w2s_train.guidance.learned`, with a prompt's pooled embedding in the place of a label.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers.configuration_utils import register_to_config
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from w2s_train.errors import UserError, require
from w2s_train.files import expanded
from w2s_train.guidance.base import extrapolate
from w2s_train.guidance.learned import ScaleNetwork, step_distance
from w2s_train.interpolant import LinearInterpolant, right_pad
from w2s_train.text2image.base import NEGATIVE, PROMPT, TIMESTEPS, Guider
from w2s_train.text2image.grid import times_at

Reward = Callable[[Tensor, Tensor], Tensor]


class Texts(NamedTuple):
    """Prompts as Stable Diffusion 3 takes them."""

    embeds: Tensor  # (B, tokens, D)
    pooled: Tensor  # (B, P)


class PromptScales(nn.Module):
    """A `ScaleNetwork` for prompts, and the loss that teaches it beside a frozen transformer.

    The loss is the energy distance of `w2s_train.guidance.GuidanceObjective`. A reward R(x, p) of
    data and pooled prompts, such as a CLIP score of the decoded data, is subtracted with its
    weight; x is where the guided velocity points, x_t - t v. The paper tilts the distribution that
    it aims at by such a reward; this estimate of it is ours, and has been tried on toys alone.

    Args:
        width: Length of the pooled embedding.
        hidden_size: Width of the scale network.
        particles: Noisy samples of each datum, at least 2.
        longest_step: Longest step t - s, in (0, 1).
        reward: Takes data (B, C, H, W) and pooled prompts (B, P), gives (B,), differentiable.
        reward_weight: Of the reward; 0 without one.

    Raises:
        UserError: A number out of its range, or a weight without a reward.
    """

    def __init__(
        self,
        width: int,
        hidden_size: int = 64,
        particles: int = 4,
        longest_step: float = 0.1,
        reward: Reward | None = None,
        reward_weight: float = 0.0,
    ) -> None:
        super().__init__()
        self.scales = ScaleNetwork(0, hidden_size, vectors=width)
        self.particles = require("particles", particles, "[2, inf)")
        self.longest_step = require("longest_step", longest_step, "(0, 1)")
        self.reward, self.reward_weight = (
            reward,
            require("reward_weight", reward_weight, "[0, inf)"),
        )
        if (reward is None) != (reward_weight == 0):
            raise UserError(f"reward_weight={reward_weight}: must be 0 without a reward, or above")
        self.interpolant = LinearInterpolant()

    def forward(self, network: nn.Module, x: Tensor, prompts: Texts, negative: Texts) -> Tensor:
        """Losses (B,) of data (B, C, H, W) with their prompts.

        Args:
            network: An ``SD3Transformer2DModel``; takes no gradient.
            x: Latents, as the network is trained on.
            prompts: Of the data.
            negative: The empty prompt, for each.
        """
        t = torch.rand(len(x), device=x.device)
        s = (t - self.longest_step * torch.rand_like(t)).clamp(min=0)
        x, t, s, *texts = (
            a.repeat_interleave(self.particles, 0) for a in (x, t, s, *prompts, *negative)
        )
        noisy = self.interpolant.corrupt(x, torch.randn_like(x), t)
        x_s = self.interpolant.corrupt(x, torch.randn_like(x), s).x_t
        with torch.no_grad():
            v, v_null = (
                network(noisy.x_t, embeds, pooled, t * TIMESTEPS, return_dict=False)[0]
                for embeds, pooled in (texts[:2], texts[2:])
            )
        scale = right_pad(self.scales(s, t, texts[1], self.interpolant), x)
        guided = extrapolate(v_null, v, scale)
        loss = step_distance(guided, noisy, s, x_s, self.particles)
        if self.reward is None:
            return loss
        data = self.interpolant.velocity_to_data(guided, noisy.x_t, t)
        reward = self.reward(data, texts[1]).unflatten(0, (-1, self.particles)).mean(1)
        return loss - self.reward_weight * reward

    def save(self, path: str) -> None:
        """Write the scale network for `LearnedGuidance`."""
        Path(path).write_bytes(save(self.scales.state_dict()))


class LearnedGuidance(Guider):
    """Classifier-free guidance with the scale of `PromptScales`, for Stable Diffusion 3 and 3.5.

    Args:
        path: What `PromptScales.save` has written.
        shift: Of the pipeline's scheduler, from which the run's times follow. A run with other
            times is refused.
        enabled: False guides nothing.

    Raises:
        UserError: A file without such a network; at a run, prompts of another width, or none.
    """

    @register_to_config
    def __init__(self, path: str, shift: float = 3.0, enabled: bool = True) -> None:
        super().__init__(enabled)
        self.path, self.shift = str(expanded("path", path)), require("shift", shift, "(0, inf)")
        self.scales, self.interpolant = _read(self.path), LinearInterpolant()

    def passes(self) -> list[str]:
        where = self._step, self._num_inference_steps, self._sigma
        self._ends = times_at(*where, self.shift)[self._step :][:2]
        return [PROMPT, NEGATIVE]

    def _batches(self, make: Callable[[int, str], Any]) -> list[Any]:
        batches = super()._batches(make)
        pooled, width = (
            getattr(batches[0], "text_embeds", None),
            self.scales.embedding.weight.shape[1],
        )
        if self._enabled and (pooled is None or pooled.shape[-1] != width):
            shape = None if pooled is None else tuple(pooled.shape)
            raise UserError(f"text_embeds={shape}: must be pooled prompts of width {width}")
        self._pooled: Any = pooled
        return batches

    @torch.no_grad()
    def combine(self, velocities: dict[str, Tensor]) -> Tensor:
        prompt, pooled = velocities[PROMPT], self._pooled.float()
        t, s = (torch.full((len(pooled),), time, device=pooled.device) for time in self._ends)
        scale = self.scales.to(pooled.device)(s, t, pooled, self.interpolant)
        return extrapolate(velocities[NEGATIVE], prompt, right_pad(scale, prompt).to(prompt.dtype))

    def describe(self) -> str:
        return f"learned({self.path})" if self._enabled else "none"


def _read(path: str) -> ScaleNetwork:
    try:
        state = load_file(path)
        hidden_size, width = state["embedding.weight"].shape
        scales = ScaleNetwork(0, hidden_size, vectors=width)
        scales.load_state_dict(state)
    except (OSError, KeyError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"path={path}: must be written by PromptScales.save") from error
    return scales.requires_grad_(False)
