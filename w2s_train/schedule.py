"""When a segment guides, and how strongly, as training goes on.

The scale of a segment is multiplied by

    0                                                        before ``start_step``
    min(1, (step - start) / ramp) * min(1, step / total)^alpha     from then on

with step the optimizer steps taken so far and total those of the whole plan. With alpha = 0 the
last factor is 1 from the first step (0^0 = 1), as in the SGG release.
"""

import math
import warnings
from dataclasses import dataclass

from w2s_train.errors import UserError

Steps = int | float  # a number of optimizer steps; as a float below 1, a share of the plan


@dataclass(frozen=True)
class Timeline:
    """How long training is planned to be, and how long this run is; None is unknown."""

    total: int | None = None  # optimizer steps of the plan: what shares and alpha refer to
    last: int | None = None  # step at which this run ends

    def steps(self, name: str, value: Steps) -> int:
        """A number of optimizer steps; a share above 0 is at least one.

        Args:
            name: Of the value, for the message.
            value: Steps, or a share in [0, 1) as a float: 0.25 of 400,000 steps are 100,000.

        Raises:
            UserError: Negative, not finite, a fraction above 1, or a share of an unknown total.
        """
        if not 0 <= value < math.inf or (value >= 1 and value != int(value)):
            raise UserError(
                f"{name}={value}: must be a number of steps, or a share of the run in [0, 1)"
            )
        if value >= 1 or value == 0:
            return int(value)
        if self.total is None:
            raise UserError(f"{name}={value}: is a share of trainer.max_steps, which must be set")
        return max(round(value * self.total), 1)

    def check(self, name: str, value: Steps, step: int | None = None) -> None:
        """Refuse a step that this run does not reach; warn where it is a share of a longer plan.

        Args:
            name: Of the value.
            value: Steps, or a share.
            step: What follows from it, if it is another one than the value itself.

        Raises:
            UserError: ``value`` counts steps, and that one is not before the last.
        """
        step = self.steps(name, value) if step is None else step
        if self.last is None or step < self.last:
            return
        if value >= 1:
            raise UserError(
                f"{name}={value}: acts from step {step} on, must come before the last step, "
                f"{self.last}"
            )
        warnings.warn(
            f"{name}={value}: is step {step} of the plan; this run ends before, at {self.last}",
            stacklevel=2,
        )


@dataclass(frozen=True)
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
            Timeline(total=1).steps(name, getattr(self, name))
        if not 0 <= self.alpha < math.inf:
            raise UserError(f"alpha={self.alpha}: must be a finite number, at least 0")

    def check(self, timeline: Timeline) -> None:
        """Refuse what a run cannot follow.

        Raises:
            UserError: A start after its end; a share or an alpha when its length is unknown.
        """
        timeline.check("start_step", self.start_step)
        timeline.steps("ramp_steps", self.ramp_steps)
        if self.alpha and timeline.total is None:
            raise UserError(f"alpha={self.alpha}: needs trainer.max_steps, which must be set")

    def factor(self, step: int, timeline: Timeline, not_before: int = 0) -> float:
        """What the scale is multiplied by at a step.

        Args:
            step: Optimizer steps taken so far.
            timeline: The plan.
            not_before: First step at which the weak source can predict.
        """
        start = max(timeline.steps("start_step", self.start_step), not_before)
        if step < start:
            return 0.0
        ramp = timeline.steps("ramp_steps", self.ramp_steps)
        grown = min(1.0, (step - start) / ramp) if ramp else 1.0
        if self.alpha == 0:
            return grown
        assert timeline.total is not None, "checked before the run"
        return grown * min(1.0, step / timeline.total) ** self.alpha
