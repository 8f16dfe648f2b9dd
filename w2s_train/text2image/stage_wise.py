"""Classifier-free guidance whose scale varies over the steps, for diffusers' pipelines."""

from diffusers.configuration_utils import register_to_config
from torch import Tensor

from w2s_train.errors import require
from w2s_train.guidance import StageWise
from w2s_train.guidance.base import extrapolate
from w2s_train.text2image.base import NEGATIVE, PROMPT, Guider
from w2s_train.text2image.grid import times_at


class StageWiseGuidance(Guider):
    """`w2s_train.guidance.StageWise`: a triangle over the steps, with a given mean over time.

    Args:
        guidance_scale: Mean guidance scale over time, at least 1.
        shift: Of the pipeline's scheduler, from which the run's times follow; 3 for Stable
            Diffusion 3 and 3.5. A run with other times is refused.
        enabled: False guides nothing.

    Raises:
        UserError: A scale below 1, or a shift that is not positive.
    """

    @register_to_config
    def __init__(
        self, guidance_scale: float = 4.5, shift: float = 3.0, enabled: bool = True
    ) -> None:
        super().__init__(enabled)
        self.rule = StageWise(require("guidance_scale", guidance_scale, "[1, inf)"))
        self.shift = require("shift", shift, "(0, inf)")

    def passes(self) -> list[str]:
        where = self._step, self._num_inference_steps, self._sigma
        self._scale = self.rule.scales(times_at(*where, self.shift))[self._step]
        return [PROMPT] if self._scale == 1 else [PROMPT, NEGATIVE]

    def combine(self, velocities: dict[str, Tensor]) -> Tensor:
        return extrapolate(velocities[NEGATIVE], velocities[PROMPT], self._scale)

    def describe(self) -> str:
        return self.rule.describe() if self._enabled else "none"
