"""When a segment guides, and how strongly, as training goes on.

The scale of a segment is multiplied by

    0                                                 before ``start_step``
    min(1, (step - start) / ramp) * (step / total)^alpha     from then on

with step the optimizer steps taken so far and total those of the run (``trainer.max_steps``). With
alpha = 0 the last factor is 1 from the first step (0^0 = 1), as in the SGG release.
"""

import math
from dataclasses import dataclass

from w2s_train.errors import UserError

Steps = int | float


def resolve_steps(name: str, value: Steps, total: int | None) -> int:
    """A number of optimizer steps; written as a float below 1 it is a share of the run.

    A share above 0 is at least one step.

    Args:
        name: Of the value, for the message.
        value: Steps, or a share in [0, 1) as a float: 0.25 of 400,000 steps are 100,000.
        total: Optimizer steps of the run, None when unknown.

    Raises:
        UserError: Negative, not finite, a fraction above 1, or a share of an unknown total.
    """
    if not 0 <= value < math.inf or (value >= 1 and value != int(value)):
        raise UserError(
            f"{name}={value}: must be a number of steps, or a share of the run in [0, 1)"
        )
    if value >= 1 or value == 0:
        return int(value)
    if total is None:
        raise UserError(f"{name}={value}: is a share of trainer.max_steps, which must be set")
    return max(round(value * total), 1)


@dataclass(frozen=True)
class Schedule:
    """Start, linear ramp and power law of a segment's scale; see the module.

    Args:
        start_step: First optimizer step that guides, or a share of the run.
        ramp_steps: Steps from there to the full scale, or a share of the run; 0 is at once.
        alpha: Exponent of step / total; 0 is constant.

    Raises:
        UserError: A negative or infinite number.
    """

    start_step: Steps = 0
    ramp_steps: Steps = 0
    alpha: float = 0.0

    def __post_init__(self) -> None:
        for name in ("start_step", "ramp_steps"):
            resolve_steps(name, getattr(self, name), total=1)
        if not 0 <= self.alpha < math.inf:
            raise UserError(f"alpha={self.alpha}: must be a finite number, at least 0")

    def factor(self, step: int, total: int | None, not_before: int = 0) -> float:
        """What the scale is multiplied by at a step.

        Args:
            step: Optimizer steps taken so far.
            total: Optimizer steps of the run, None when unknown.
            not_before: First step at which the weak source can predict.
        """
        start = max(resolve_steps("start_step", self.start_step, total), not_before)
        if step < start:
            return 0.0
        ramp = resolve_steps("ramp_steps", self.ramp_steps, total)
        grown = min(1.0, (step - start) / ramp) if ramp else 1.0
        if self.alpha == 0:
            return grown
        if total is None:
            raise UserError(f"alpha={self.alpha}: needs trainer.max_steps, which must be set")
        return grown * min(1.0, step / total) ** self.alpha
