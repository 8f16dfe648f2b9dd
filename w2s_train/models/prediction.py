"""Networks whose last layer says the data, and not the velocity (Li & He, 2025, "JiT").

What data x at a noisy sample x_t mean as a velocity follows from the interpolant,

    v = (sigma' x_t - d x) / max(sigma, 0.05),        (x_t - x) / max(t, 0.05) for the linear one,

and everything outside of the network sees that. Losses stay those of velocities, which weighs the
squared error of the data by (d / sigma)^2. The floor is that of JiT. Velocities are exact below
it, too: there the last layer says x_t - 0.05 v, between data and sample (for the linear one).
"""

from typing import Any

from torch import Tensor

from w2s_train.errors import UserError
from w2s_train.interpolant import CosineInterpolant, Interpolant, LinearInterpolant

FLOOR = 0.05  # of sigma
INTERPOLANTS: dict[str, Interpolant] = {
    "linear": LinearInterpolant(),
    "cosine": CosineInterpolant(),
}


def known(data_on: Any) -> Any:
    """The same.

    Raises:
        UserError: It names no interpolant.
    """
    if data_on not in (None, *INTERPOLANTS):
        raise UserError(f"data_on={data_on}: must be null, {' or '.join(INTERPOLANTS)}")
    return data_on


def to_velocity(network: Any, said: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """The velocity (B, C, H, W) that a last layer or head means.

    Args:
        network: Of which the layer is; its ``data_on`` names the interpolant, if it says data.
        said: What the layer says.
        x_t: Noisy samples (B, C, H, W).
        t: (B,).
    """
    data_on = getattr(network, "data_on", None)
    if data_on is None or said.shape != x_t.shape:  # of some tokens only: nobody reads it
        return said
    return INTERPOLANTS[data_on].data_to_velocity(said.float(), x_t, t, FLOOR).to(x_t.dtype)


def check_prediction(network: Any, interpolant: Interpolant) -> None:
    """Refuse to train what says data on another interpolant.

    Raises:
        UserError: It does.
    """
    data_on = getattr(network, "data_on", None)
    if data_on is not None and type(INTERPOLANTS[data_on]) is not type(interpolant):
        name = type(interpolant).__name__
        raise UserError(f"network.data_on={data_on}: must be that of the objective, {name}")
