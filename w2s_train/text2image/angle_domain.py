"""Guidance by the angle between two predictions of the data, for diffusers' pipelines."""

from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from w2s_train.errors import UserError, require
from w2s_train.guidance import AngleDomain
from w2s_train.interpolant import LinearInterpolant
from w2s_train.text2image.base import NEGATIVE, PROMPT, Guider, is_unet
from w2s_train.text2image.forwards import Forward


class AngleDomainGuidance(Guider):
    """`w2s_train.guidance.AngleDomain` at x_t, the input of the network, in float32.

    Args:
        guidance_scale: At least 1, which is (nearly) no guidance.
        enabled: False guides nothing.

    Raises:
        UserError: A scale below 1; a UNet, which predicts no velocity; in `combine`, an input that
            is more than the sample, such as one with an image's latents beside it.
    """

    @register_to_config
    def __init__(self, guidance_scale: float = 4.5, enabled: bool = True) -> None:
        super().__init__(enabled)
        self.rule = AngleDomain(require("guidance_scale", guidance_scale, "[1, inf)"))
        self._sample: Tensor | None = None

    def passes(self) -> list[str]:
        return [PROMPT, NEGATIVE]

    def check(self, denoiser: nn.Module) -> None:
        if self._enabled and is_unet(denoiser):
            raise UserError(f"guider={type(self).__name__}: must guide velocities, not a UNet's")

    def forward_at(self, kind: str, denoiser: nn.Module) -> Forward | None:
        return self._watch if kind == PROMPT and NEGATIVE in self._kinds else None

    def _watch(self, former: Forward, *args: Any, **kwargs: Any) -> Any:
        """The network itself; its sample is kept."""
        named = kwargs.get("hidden_states", kwargs.get("x"))
        sample = args[0] if named is None else named
        self._sample = sample if isinstance(sample, Tensor) else torch.stack(list(sample))
        return former(*args, **kwargs)

    def combine(self, velocities: dict[str, Tensor]) -> Tensor:
        prompt, sample, self._sample = velocities[PROMPT], self._sample, None
        assert sample is not None
        if sample.numel() != prompt.numel():
            raise UserError(
                f"hidden_states={tuple(sample.shape)}: must be the sample alone, of "
                f"{tuple(prompt.shape)}, for angle-domain guidance"
            )
        x_t = sample.reshape(prompt.shape).float()
        guided = self.rule.guided(
            prompt.float(), velocities[NEGATIVE].float(), x_t, self._sigma, LinearInterpolant()
        )
        return guided.to(prompt.dtype)

    def describe(self) -> str:
        return self.rule.describe() if self._enabled else "none"
