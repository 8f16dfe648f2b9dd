"""A lagging average of the network."""

import torch
from torch import Tensor

from w2s_train.errors import UserError, require
from w2s_train.interpolant import NoisySample
from w2s_train.models import DiTOutput, Network, WeightAverage
from w2s_train.models.average import Dtype, as_kept, frozen_copy
from w2s_train.schedule import Steps, check_reached, whole_steps
from w2s_train.weak.base import Fresh, Step, WeakSource


class EMA(WeakSource):
    """An exponential moving average of the weights, with a decay of its own.

    An ordinary average is *better* than the live weights and so points the wrong way; it is weak
    only when it looks back far, over 1 / (1 - decay) optimizer steps, into a worse network, or when
    it is an old one: with a lag L the average in use is the one of L to 2 L steps ago.

    Args:
        decay: Per optimizer step, in [0, 1), whatever ``update_every`` is.
        lag: Least age of the average in use, in optimizer steps or as a share of the plan; 0 is the
            current average. Two more copies of the network are kept.
        update_every: Optimizer steps between two updates of the average.
        dtype: Of the matrices of the two more copies, see `frozen_copy`; the average is float32.

    Raises:
        UserError: A decay outside [0, 1), a negative lag, an interval below 1, or another dtype
            without a lag, where there is no copy.
    """

    from_training = True
    scale_limit = 0.8  # at 0.9 it diverged where other sources only over-sharpened

    def __init__(
        self,
        decay: float = 0.9999,
        lag: Steps = 0,
        update_every: int = 1,
        dtype: Dtype = "float32",
    ) -> None:
        super().__init__()
        if 0.5 <= lag < 1:
            raise UserError(f"lag={lag}: must be below 0.5 as a share: it guides from 2 lag on")
        if dtype != "float32" and not lag:
            raise UserError(f"dtype={dtype}: must be float32 without a lag: the average itself is")
        self.dtype: Dtype = dtype
        self.update_every = require("update_every", update_every, "[1, inf)")
        self.decay, self.lag = require("decay", decay, "[0, 1)"), lag

    def bind(self, network: Network) -> None:
        self.average = WeightAverage(network, self.decay**self.update_every)
        if self.lag:
            self.waiting = frozen_copy(network, self.dtype)
            self.used = frozen_copy(network, self.dtype)
        self.old_enough = not self.lag

    @property
    def ready(self) -> bool:
        return self.old_enough

    def get_extra_state(self) -> dict[str, bool]:
        """Whether the copy in use is one of the training, kept with its weights."""
        return {"old_enough": self.old_enough}

    def set_extra_state(self, state: dict[str, bool]) -> None:
        """Restore it."""
        self.old_enough = state["old_enough"]

    def describe(self) -> str:
        return f"EMA({self.decay:g}, lag {self.lag:g})"

    def plan(self, total: int | None, last: int | None) -> int:
        self.lag_steps = whole_steps("lag", self.lag, total)
        first = 2 * self.lag_steps  # before, the copy in use would be the untrained network
        check_reached("lag", self.lag, first, last)
        if self.lag and self.update_every > self.lag_steps:
            raise UserError(
                f"update_every={self.update_every}: must be at most the lag, {self.lag_steps} steps"
            )
        return first

    def predict(self, network: Network, noisy: NoisySample, y: Tensor, strong: DiTOutput) -> Tensor:
        weak = self.used if self.lag else self.average.module
        with as_kept(weak):
            return weak(noisy.x_t, noisy.t, y).velocity

    @torch.no_grad()
    def after_step(self, network: Network, step: Step, fresh: Fresh) -> None:
        if step.number % self.update_every == 0:
            self.average.update(network, step.good)
        if self.lag and step.number % self.lag_steps == 0:
            self.used.load_state_dict(self.waiting.state_dict())
            self.waiting.load_state_dict(self.average.module.state_dict())
            self.old_enough = self.old_enough or step.number >= 2 * self.lag_steps
