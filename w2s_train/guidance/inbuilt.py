"""Guidance that is an input of the network: it was trained with every scale."""

from dataclasses import dataclass

import torch
from torch import Tensor

from w2s_train.errors import UserError, require
from w2s_train.guidance.base import Guidance, VelocityField, check_scale, network_inputs
from w2s_train.inbuilt.laws import Drawn
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
        inside = self.low <= t < self.high or self.low < t == self.high == 1
        return self.scale if inside else 0.0


class Inbuilt(Guidance):
    """The scales that a network takes as inputs, at one evaluation per call, as unguided.

    Args:
        scales: By the name of the segment that drew the scale in training; a number is one at all
            times, and sources that are not named have scale 0.

    Raises:
        UserError: A number out of its range; in `bind`, a name that is no input of the network, a
            scale or a range that training did not draw, or a sum that it did not.
    """

    needs_label = False

    def __init__(self, scales: dict[str, Choice | float]) -> None:
        self.scales = {k: c if isinstance(c, Choice) else Choice(c) for k, c in scales.items()}
        self.order: list[str] = []  # of the network's inputs, from `bind`
        self.laws: dict[str, Drawn] = {}

    def bind(self, network: Network, objective: Objective) -> None:
        self.order = list(getattr(network, "scales", []))
        known = ", ".join(self.order) or "none, as without configs/weak/drawn.yaml"
        unknown = [name for name in self.scales if name not in self.order]
        if unknown or not self.order:
            name = ", ".join(unknown) or "all 0"
            raise UserError(f"scales={name}: must be inputs of the network; it has {known}")
        self.laws = {s.name: s.drawn for s in objective.segments if s.drawn}
        ranges = {s.name: (s.low, s.high) for s in objective.segments}
        for name, choice in self.scales.items():
            low, high = ranges.get(name, (0.0, 1.0))
            if choice.scale > 0 and not low <= choice.low <= choice.high <= high:
                raise UserError(
                    f"scales.{name}.low={choice.low}, high={choice.high}: must be in [{low:g}, "
                    f"{high:g}], as it was trained"
                )
        ends = {end for choice in self.scales.values() for end in (choice.low, choice.high)}
        for start in sorted({0.0, *ends}):
            self._check_sum(start)

    def _check_sum(self, t: float) -> None:
        """Refuse a sum of scales, at a time, that the network was never told there.

        Of scales that no segment of the run draws (of a network from elsewhere), only sums of 1.
        """
        acting = {name: c.at(t) for name, c in self.scales.items() if c.at(t) > 0}
        total, laws = sum(acting.values()), [self.laws[n] for n in acting if n in self.laws]
        law = min(laws, key=lambda each: each.high) if laws else None
        low, high = (law.low, law.high) if law and len(laws) == len(acting) else (0.0, 1.0)
        if acting and (total >= 1 or not low - 1e-9 <= total <= high + 1e-9):
            what = ", ".join(f"scales.{name}.scale={scale:g}" for name, scale in acting.items())
            most = f"[{low:g}, {high:g}" + ("], as it was trained" if high < 1 else ")")
            rule = "be in" if len(acting) == 1 else "sum to what is in"
            raise UserError(f"{what}: must {rule} {most}; it is {total:g} at t={t:g}")

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
        known = sorted(self.scales.items(), key=lambda each: [*self.order, each[0]].index(each[0]))
        acting = [(name, c) for name, c in known if c.scale > 0 and c.low < c.high]
        parts = [f"{name} {c.scale:g} [{c.low:g}, {c.high:g})" for name, c in acting]
        return f"inbuilt({', '.join(parts) or 'all 0'})"
