"""Skip-layer guidance beside the classifier-free one, as diffusers and SD 3.5 combine them."""

from torch import Tensor

from w2s_train.errors import require
from w2s_train.guidance.base import (
    Guidance,
    VelocityField,
    check_scale,
    evaluate,
    extrapolate,
    network_inputs,
    run_network,
)
from w2s_train.interpolant import NoisySample
from w2s_train.models import Network
from w2s_train.objective import Objective
from w2s_train.weak import LayerSkip


class SkipLayer(Guidance):
    """v_null + scale (v - v_null), and while low <= t <= high + skip_scale (v - v_skipped).

    Two evaluations a step, and inside the interval what is left of the network behind the first
    skipped block; one less where ``scale`` is 1, and nothing is skipped where ``skip_scale`` is 0.

    Args:
        scale: Of the null class.
        skip_scale: Of the skipped blocks, at least 0.
        blocks: Those to skip, counted from 0.
        low: Start of the interval, inclusive.
        high: End of the interval, inclusive.

    Raises:
        UserError: A negative scale, an interval not in [0, 1]; in `bind`, no such block.
    """

    def __init__(
        self, scale: float, skip_scale: float, blocks: list[int], low: float, high: float
    ) -> None:
        check_scale(scale)
        check_scale(1.0, low, high)
        require("skip_scale", skip_scale, "[0, inf)")
        self.scale, self.skip_scale, self.low, self.high = scale, skip_scale, low, high
        self.weak = LayerSkip(blocks)

    def bind(self, network: Network, objective: Objective) -> None:
        self.weak.bind(network)

    def field(self, network: Network, y: Tensor, times: list[float]) -> VelocityField:
        def velocity(x_t: Tensor, t: float, start: float) -> Tensor:
            inside = self.skip_scale > 0 and self.low <= start <= self.high
            kept = self.weak.keep_hidden if inside else ()
            strong = run_network(network, x_t, t, y, keep_hidden=kept)
            v = guided = strong.velocity.to(x_t.dtype)
            if self.scale != 1:
                null = y.new_full(y.shape, network.null_class)
                guided = extrapolate(evaluate(network, x_t, t, null), v, self.scale)
            if inside:
                seen, time = network_inputs(network, x_t, t)
                skipped = self.weak.predict(network, NoisySample(seen, time, seen), y, strong)
                guided = guided + self.skip_scale * (v - skipped.to(v.dtype))
            return guided

        return velocity

    def describe(self) -> str:
        return (
            f"slg({self.scale:g}, {self.skip_scale:g} {self.weak.describe()} "
            f"[{self.low:g}, {self.high:g}])"
        )
