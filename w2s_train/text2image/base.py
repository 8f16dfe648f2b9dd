"""What the guiders share: which passes a step takes, with which of the prompts.

A guider serves any of diffusers' modular pipelines that predicts velocities. At each step it is
told the timestep, makes a batch per pass, meets the network before and after each pass, and
combines their predictions. The network is as it was after each pass, whether it ended or failed.
"""

import abc
from collections.abc import Callable
from typing import Any

from diffusers.guiders import BaseGuidance
from diffusers.guiders.guider_utils import GuiderOutput
from diffusers.utils.torch_utils import unwrap_module
from torch import Tensor, nn

from w2s_train.errors import UserError
from w2s_train.text2image.forwards import Armed, Forward, disarm

PROMPT, NEGATIVE, WEAK = "pred_cond", "pred_uncond", "pred_weak"  # passes, as diffusers names them
TIMESTEPS = 1000  # of noise alone; diffusers' schedulers for flow matching count so


def is_unet(network: nn.Module) -> bool:
    """Whether a network is one of diffusers' UNets, of which none is imported for this."""
    return type(unwrap_module(network)).__module__.startswith("diffusers.models.unets.")


class Guider(BaseGuidance, abc.ABC):
    """A guider with one or two passes a step.

    Args:
        enabled: False guides nothing.
    """

    _input_predictions: Any = [PROMPT, NEGATIVE, WEAK]

    def __init__(self, enabled: bool = True) -> None:
        super().__init__(0.0, 1.0, enabled)
        self._kinds = [PROMPT]

    @abc.abstractmethod
    def passes(self) -> list[str]:
        """Those of the current step: the prompt's, and at most one more."""

    @abc.abstractmethod
    def combine(self, velocities: dict[str, Tensor]) -> Tensor:
        """The guided velocity of the current step, from those of its passes, if these are two."""

    @abc.abstractmethod
    def describe(self) -> str:
        """One word, or name and numbers, for the protocol of an image."""

    @property
    def negative(self) -> bool:
        """Whether any step needs the negative prompt."""
        return self._enabled

    def forward_at(self, kind: str, denoiser: nn.Module) -> Forward | None:
        """What runs in the place of the network's forward in a pass, if anything does."""
        return None

    def check(self, denoiser: nn.Module) -> None:  # noqa: B027
        """Refuse a network that this cannot guide; before its first pass, or sooner.

        Raises:
            UserError: Why it cannot.
        """

    @property
    def num_conditions(self) -> int:
        """2 if a step needs the negative prompt, at any time: text encoders ask this."""
        return 1 + self.negative

    def set_state(self, step: int, num_inference_steps: int, timestep: Any) -> None:
        super().set_state(step, num_inference_steps, timestep)
        self._sigma = float(timestep) / TIMESTEPS  # waits for the device, once per step
        self._kinds = self.passes() if self._enabled else [PROMPT]

    def prepare_inputs(self, data: Any) -> list[Any]:
        return self._batches(lambda i, kind: self._prepare_batch(data, i, kind))

    def prepare_inputs_from_block_state(self, data: Any, input_fields: dict[str, Any]) -> list[Any]:
        make = self._prepare_batch_from_block_state
        return self._batches(lambda i, kind: make(input_fields, data, i, kind))

    def _batches(self, make: Callable[[int, str], Any]) -> list[Any]:
        batches = {kind: make(int(kind == NEGATIVE), kind) for kind in self._kinds}
        if NEGATIVE in batches:
            positive, negative = (vars(batches[kind]) for kind in (PROMPT, NEGATIVE))
            names = negative.keys() - {self._identifier_key}
            if not any(negative[n] is not None and negative[n] is not positive[n] for n in names):
                raise UserError('negative_prompt=None: must be given to be guided; "" will do')
        return list(batches.values())

    def prepare_models(self, denoiser: nn.Module) -> None:
        disarm(denoiser)
        self.check(denoiser)
        kind = self._kinds[self._count_prepared]
        self._count_prepared += 1
        run = self.forward_at(kind, denoiser)
        if run is not None:
            Armed(denoiser, run)

    def cleanup_models(self, denoiser: nn.Module) -> None:
        disarm(denoiser)

    def __call__(self, data: list[Any]) -> GuiderOutput:
        velocities = {getattr(batch, self._identifier_key): batch.noise_pred for batch in data}
        return self.forward(**velocities)

    def forward(self, **velocities: Tensor) -> GuiderOutput:
        prompt = velocities[PROMPT]
        guided = self.combine(velocities) if len(velocities) > 1 else prompt
        return GuiderOutput(pred=guided, pred_cond=prompt, pred_uncond=velocities.get(NEGATIVE))

    @property
    def is_conditional(self) -> bool:
        return self._kinds[max(self._count_prepared - 1, 0)] != NEGATIVE
