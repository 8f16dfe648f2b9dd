"""When a segment guides, and how strongly, as training goes on.

The scale of a segment is multiplied by

    0                                                        before ``start_step``
    min(1, (step - start) / ramp) * min(1, step / total)^alpha     from then on

with step the optimizer steps taken so far and total those of the whole plan. With alpha = 0 the
last factor is 1 from the first step (0^0 = 1), as in the SGG release.
"""

import dataclasses
import math
import warnings

from w2s_train.errors import UserError, require

Steps = int | float  # a number of optimizer steps; as a float below 1, a share of the plan


def whole_steps(name: str, value: Steps, total: int | None) -> int:
    """A number of optimizer steps; a share above 0 is at least one.

    A share in [0, 1) is one of the ``total`` steps of the plan: 0.25 of 400,000 steps are 100,000.

    Raises:
        UserError: Negative, not finite, a fraction above 1, or a share of an unknown total (None).
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


def check_reached(name: str, value: Steps, step: int, last: int | None) -> None:
    """Refuse a step, which follows from ``value``, that this run does not reach (None: unknown).

    Raises:
        UserError: It is not before the last; where ``value`` is a share of the plan, a warning.
    """
    if last is None or step < last:
        return
    if value >= 1:
        raise UserError(
            f"{name}={value}: acts from step {step} on, must come before the last step, {last}"
        )
    warnings.warn(
        f"{name}={value}: is step {step} of the plan; this run ends before, at {last}",
        stacklevel=2,
    )


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Start, linear ramp and power law of a segment's scale; see the module.

    Args:
        start_step: First optimizer step that guides, or a share of the plan.
        ramp_steps: Steps from there to the full scale, or a share of the plan; 0 is at once.
        alpha: Exponent of step / total; 0 is constant.

    Raises:
        UserError: A negative or infinite number.
    """

    start_step: Steps = 0
    ramp_steps: Steps = 0
    alpha: float = 0.0

    def __post_init__(self) -> None:
        for name in ("start_step", "ramp_steps"):
            whole_steps(name, getattr(self, name), total=1)
        require("alpha", self.alpha, "[0, inf)")

    def plan(self, total: int | None, last: int | None, not_before: int = 0) -> "Schedule":
        """The same in whole steps.

        Args:
            total: Steps of the plan; None is unknown.
            last: Step at which the run ends; None is unknown.
            not_before: First step at which the weak source can predict.

        Raises:
            UserError: A start after its end; a share or an alpha when the length is unknown.
        """
        start = whole_steps("start_step", self.start_step, total)
        check_reached("start_step", self.start_step, start, last)
        ramp = whole_steps("ramp_steps", self.ramp_steps, total)
        if self.alpha and total is None:
            raise UserError(f"alpha={self.alpha}: needs trainer.max_steps, which must be set")
        return dataclasses.replace(self, start_step=max(start, not_before), ramp_steps=ramp)

    def factor(self, step: int, total: int | None) -> float:
        """What the scale is multiplied by after ``step`` steps of a plan of ``total``."""
        if step < self.start_step:
            return 0.0
        grown = min(1.0, (step - self.start_step) / self.ramp_steps) if self.ramp_steps else 1.0
        if self.alpha == 0:
            return grown
        assert total is not None, "checked by `plan`"
        return grown * min(1.0, step / total) ** self.alpha
