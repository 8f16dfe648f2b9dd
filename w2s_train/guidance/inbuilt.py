"""Guidance that is an input of the network: it was trained with every scale."""

from dataclasses import dataclass

import torch
from torch import Tensor

from w2s_train.errors import UserError, require
from w2s_train.guidance.base import (
    Guidance,
    VelocityField,
    check_scale,
    network_inputs,
)
from w2s_train.models import Network, as_output
from w2s_train.objective import Objective


@dataclass(frozen=True)
class Choice:
    """How strongly a source guides, and where.

    Args:
        scale: W, in [0, 1); the guidance is 1 / (1 - sum of those that act).
        low: Start of the range, inclusive, in [0, 1].
        high: End of the range, exclusive, in [low, 1]; 1 itself belongs to a range that ends there.

    Raises:
        UserError: A number out of its range.
    """

    scale: float
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        require("scale", self.scale, "[0, 1)")
        check_scale(self.scale, self.low, self.high)

    def at(self, t: float) -> float:
        """The scale at a time in [0, 1]."""
        return self.scale if self.low <= t < self.high or t == self.high == 1 else 0.0


class Inbuilt(Guidance):
    """The scales that a network takes as inputs, at one evaluation per call, as unguided.

    Args:
        scales: By the name of the segment that drew the scale in training; sources that are not
            named have scale 0.

    Raises:
        UserError: A number out of its range; in `bind`, a name that is no input of the network, a
            scale or a range that training did not draw, or a sum that it did not.
    """

    needs_label = False

    def __init__(self, scales: dict[str, Choice]) -> None:
        self.scales = scales
        self.order: list[str] = []  # of the network's inputs, from `bind`

    def bind(self, network: Network, objective: Objective) -> None:
        self.order = list(getattr(network, "scales", []))
        known = ", ".join(self.order) or "none, as without configs/weak/drawn.yaml"
        unknown = [name for name in self.scales if name not in self.order]
        if unknown or not self.order:
            name = ", ".join(unknown) or "all 0"
            raise UserError(f"scales={name}: must be inputs of the network; it has {known}")
        ends = {s.name: s.drawn.high for s in objective.segments if s.drawn}
        ranges = {s.name: (s.low, s.high) for s in objective.segments}
        for name, choice in self.scales.items():
            if name in ends and choice.scale > 0:
                self._check(name, choice, *ranges[name], ends[name])
        self._check_sums(ends)

    def _check(self, name: str, choice: Choice, low: float, high: float, end: float) -> None:
        if choice.scale > end + 1e-9:
            raise UserError(
                f"scales.{name}.scale={choice.scale}: must be in [0, {end:g}], as it was trained"
            )
        if choice.low < low or choice.high > high:
            raise UserError(
                f"scales.{name}.low={choice.low}, high={choice.high}: must be in [{low:g}, "
                f"{high:g}], as it was trained"
            )

    def _check_sums(self, ends: dict[str, float]) -> None:
        """Refuse a sum, at any time, of which the network was told none so large."""
        for start in [0.0, *(choice.low for choice in self.scales.values())]:
            acting = {name: c.at(start) for name, c in self.scales.items() if c.at(start) > 0}
            end = min((ends[name] for name in acting if name in ends), default=1.0)
            if sum(acting.values()) > end + 1e-9 or sum(acting.values()) >= 1:
                raise UserError(
                    f"scales={'+'.join(acting)}: sum to {sum(acting.values()):g} at t={start:g}, "
                    f"must be at most {end:g}, as they were trained"
                )

    def field(self, network: Network, y: Tensor, times: list[float]) -> VelocityField:
        choices = [self.scales.get(name, Choice(0.0)) for name in self.order]
        told = torch.tensor([[each.at(start) for each in choices] for start in times]).to(y.device)
        rows = dict(zip(times, told, strict=True))

        def velocity(x_t: Tensor, t: float, start: float) -> Tensor:
            seen, time = network_inputs(network, x_t, t)
            scales = rows[start].expand(len(x_t), -1)
            return as_output(network(seen, time, y, scales=scales), x_t).velocity.to(x_t.dtype)

        return velocity

    def describe(self) -> str:
        acting = [(name, c) for name, c in self.scales.items() if c.scale > 0 and c.low < c.high]
        parts = [f"{name} {c.scale:g} [{c.low:g}, {c.high:g})" for name, c in acting]
        return f"inbuilt({', '.join(parts) or 'all 0'})"
