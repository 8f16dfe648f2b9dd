"""Segmented guidance: one kind at high noise, another at low noise."""

from torch import Tensor

from w2s_train.errors import require
from w2s_train.guidance.base import Guidance, VelocityField
from w2s_train.models import Network
from w2s_train.objective import Objective


class Segmented(Guidance):
    """SGG at sampling time: ``high_noise`` while t >= border, ``low_noise`` below.

    The released script for SD3.5 guides 28 steps: the first half without the prompt, the second
    half with skipped layers, as v + s (v - v_weak), which is `Autoguidance` with scale 1 + s. Each
    half evaluates only what it needs.

    Args:
        border: Between the two, in (0, 1).
        low_noise: Guidance below the border.
        high_noise: Guidance from the border on.

    Raises:
        UserError: A border outside (0, 1).
    """

    def __init__(self, border: float, low_noise: Guidance, high_noise: Guidance) -> None:
        require("border", border, "(0, 1)")
        self.border, self.low_noise, self.high_noise = border, low_noise, high_noise

    @property
    def needs_label(self) -> bool:  # type: ignore[override]
        """Whether either half does."""
        return self.low_noise.needs_label or self.high_noise.needs_label

    @property
    def needs_seeds(self) -> bool:  # type: ignore[override]
        """Whether either half does."""
        return self.low_noise.needs_seeds or self.high_noise.needs_seeds

    def bind(self, network: Network, objective: Objective) -> None:
        self.low_noise.bind(network, objective)
        self.high_noise.bind(network, objective)

    def field(
        self, network: Network, y: Tensor, times: list[float], seeds: list[int] | None = None
    ) -> VelocityField:
        low = self.low_noise.seeded_field(network, y, times, seeds)
        high = self.high_noise.seeded_field(network, y, times, seeds)
        return lambda x_t, t, start: (high if start >= self.border else low)(x_t, t, start)

    def describe(self) -> str:
        low, high = self.low_noise.describe(), self.high_noise.describe()
        return f"sgg(t < {self.border:g}: {low}, above: {high})"
