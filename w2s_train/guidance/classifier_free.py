"""Classifier-free guidance."""

from torch import Tensor

from w2s_train.guidance.base import Guidance, VelocityField, check_scale, evaluate, evaluate_both
from w2s_train.models import DiT


class ClassifierFree(Guidance):
    """v = v_null + scale (v_class - v_null) while low <= t <= high (Ho & Salimans, 2022;
    Kynkaanniemi et al., 2024, for the interval).

    Args:
        scale: 1 is no guidance and costs no second evaluation.
        low: Start of the interval, inclusive.
        high: End of the interval, inclusive.

    Raises:
        UserError: A scale that is negative, infinite or not a number; an interval not in [0, 1].
    """

    def __init__(self, scale: float, low: float = 0.0, high: float = 1.0) -> None:
        check_scale(scale, low, high)
        self.scale, self.low, self.high = scale, low, high

    def field(self, network: DiT, y: Tensor, times: list[float]) -> VelocityField:
        def velocity(x_t: Tensor, t: float, start: float) -> Tensor:
            if self.scale == 1 or not self.low <= start <= self.high:
                return evaluate(network, x_t, t, y)
            v_class, v_null = evaluate_both(network, x_t, t, y)
            return v_null + self.scale * (v_class - v_null)

        return velocity

    def describe(self) -> str:
        return f"cfg({self.scale:g}, [{self.low:g}, {self.high:g}])"
