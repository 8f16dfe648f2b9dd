"""The times of a run, which guiders are not told: only the current one, and how many there are."""

import functools
from typing import Any

from w2s_train.errors import UserError

TOLERANCE = 1e-3  # of a noise level; steps are longer


@functools.cache
def times_of(steps: int, shift: float) -> list[float]:
    """From 1 to 0, as diffusers' scheduler for flow matching spaces that many steps."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    return scheduler.sigmas.tolist()


def times_at(step: int, steps: int, sigma: float, shift: float) -> list[float]:
    """The times of a run, if its current one is among them where it must be.

    Args:
        step: The current one, from 0.
        steps: How many there are.
        sigma: The noise level at which the current one starts.
        shift: Of the scheduler, fixed.

    Raises:
        UserError: The run has other times: image to image, another scheduler or shift.
    """
    times = times_of(steps, shift)
    if step >= steps or abs(times[step] - sigma) > TOLERANCE:
        raise UserError(
            f"shift={shift}: must be that of FlowMatchEulerDiscreteScheduler in a whole run, whose "
            f"step {step} of {steps} is not at noise level {sigma:.4f}"
        )
    return times
