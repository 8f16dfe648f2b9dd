"""Power-function averages, and how one of any width is put together from a few of others.

    average(T) = sum_i w_i [(t_i / T)^(e+1) - (t_(i-1) / T)^(e+1)],      t in images

w_i are the weights after step i. The average weighs time t by (e + 1) t^e / T^(e+1), whose standard
deviation as a part of T is the ``std`` that names it: it looks back so far, at any length of a run.
All here is float64; Karras et al. (2024), "Analyzing and Improving the Training Dynamics of
Diffusion Models", section 3 and appendix C.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from w2s_train.errors import UserError

WIDEST = 12**-0.5  # of the plain mean, e = 0; one with e < 0 weighs the beginning most


def exponent_of(std: float) -> float:
    """The e of a std in (0, 12^-0.5].

    Raises:
        UserError: A std out of its range.
    """
    if not 0 < std <= round(WIDEST, 4):
        raise UserError(f"std={std:g}: must be above 0 and at most {WIDEST:.4f}, a plain mean's")
    s = min(float(std), WIDEST) ** -2
    return float(np.roots([1, 7, 16 - s, 12 - s]).real.max())


def share(exponent: float, images: Any, seen: Any) -> Any:
    """1 - beta: what the weights after a step get in the average.

    Args:
        exponent: e.
        images: Of the step.
        seen: Up to the step, its own included; all of them at the first one.
    """
    return 1 - (1 - images / seen) ** (exponent + 1)


class Mix(NamedTuple):
    """How much of each of some averages makes another one."""

    coefficients: list[float]  # their sum is 1
    miss: float  # of the profile over time: root mean square of what is wrong, as a part of it


def mix(stds: Sequence[float], times: Sequence[float], std: float, time: float) -> Mix:
    """The least-squares fit of an average's profile by those of others.

    Args:
        stds: (N,) of the averages that there are.
        times: (N,) images when they were kept.
        std: Of the wanted one.
        time: Images when it would have been kept.

    Raises:
        UserError: A std out of its range.
    """
    e, t = np.array([exponent_of(each) for each in stds]), np.asarray(times, dtype=np.float64)
    gram = products(e[:, None], t[:, None], e[None], t[None])
    wanted = exponent_of(std)
    right = products(e, t, wanted, float(time))
    x = np.linalg.lstsq(gram, right, rcond=None)[0]
    x = x / x.sum()
    norm = float(products(wanted, float(time), wanted, float(time)))
    error = norm - 2 * x @ right + x @ gram @ x
    return Mix(x.tolist(), float(max(error, 0.0) / norm) ** 0.5)


def products(e_a: Any, t_a: Any, e_b: Any, t_b: Any) -> Any:
    """Integrals of the product of two profiles over all time."""
    m = np.minimum(t_a, t_b)
    scale = (e_a + 1) * (e_b + 1) / (t_a * t_b) * m / (e_a + e_b + 1)
    return scale * (m / t_a) ** e_a * (m / t_b) ** e_b
