"""Sampling-time guidance: velocity fields made of one or more network evaluations.

A velocity field is called as ``field(x_t, t, start)`` with x_t (B, C, H, W), the time t of the
evaluation and the time at which the solver's current step began, and returns a velocity like x_t.
Whether and how strongly guidance applies is decided at ``start``: within one step a solver then
integrates one smooth field, and a second-order step keeps its order at the ends of an interval.
"""

import abc
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from w2s_train.errors import UserError, require
from w2s_train.models import DiTOutput, Network, as_output
from w2s_train.objective import Objective

VelocityField = Callable[[Tensor, float, float], Tensor]


def network_inputs(network: Network, x_t: Tensor, t: float) -> tuple[Tensor, Tensor]:
    """The state and its time, for every row, in the precision of the network's weights."""
    dtype = next(network.parameters()).dtype
    return x_t.to(dtype), torch.full((len(x_t),), t, dtype=dtype, device=x_t.device)


def run_network(
    network: Network, x_t: Tensor, t: float, y: Tensor, keep_hidden: Collection[int] = ()
) -> DiTOutput:
    """One pass at one time for the whole batch."""
    options = {"keep_hidden": keep_hidden} if keep_hidden else {}
    return as_output(network(*network_inputs(network, x_t, t), y, **options), x_t)


def evaluate(network: Network, x_t: Tensor, t: float, y: Tensor) -> Tensor:
    """The network's velocity, typed like ``x_t``: the solver's state is float64."""
    return run_network(network, x_t, t, y).velocity.to(x_t.dtype)


def evaluate_both(network: Network, x_t: Tensor, t: float, y: Tensor) -> tuple[Tensor, Tensor]:
    """The velocities with the labels ``y`` (B,) and with the null class, in one pass."""
    both = torch.cat([y, torch.full_like(y, network.null_class)])
    v_class, v_null = evaluate(network, torch.cat([x_t, x_t]), t, both).chunk(2)
    return v_class, v_null


def extrapolate(weak: Tensor, strong: Tensor, scale: float | Tensor) -> Tensor:
    """The velocity weak + scale (strong - weak), of two of one shape."""
    return weak + scale * (strong - weak)


class Guidance(abc.ABC):
    """How a network and labels become a velocity field."""

    needs_label: bool = True  # compares with and without label: meaningless if there is none
    needs_seeds: bool = False  # `field` takes ``seeds=``, too: one per row, for random draws

    def bind(self, network: Network, objective: Objective) -> None:  # noqa: B027
        """Meet the network and what it is trained with; once, before sampling.

        Raises:
            UserError: The guidance does not fit them.
        """

    @abc.abstractmethod
    def field(self, network: Network, y: Tensor, times: list[float]) -> VelocityField:
        """The velocity field for labels ``y`` (B,) on a solver's grid of times, from 1 to 0."""

    def seeded_field(
        self, network: Network, y: Tensor, times: list[float], seeds: list[int] | None
    ) -> VelocityField:
        """`field`, with ``seeds`` (one per row) if it needs them."""
        more: dict[str, Any] = {"seeds": seeds} if self.needs_seeds else {}
        return self.field(network, y, times, **more)

    @abc.abstractmethod
    def describe(self) -> str:
        """One word, or name and numbers, for the protocol of a score."""


class Unguided(Guidance):
    """The network's own velocity: one evaluation per call."""

    needs_label = False

    def field(self, network: Network, y: Tensor, times: list[float]) -> VelocityField:
        return lambda x_t, t, start: evaluate(network, x_t, t, y)

    def describe(self) -> str:
        return "none"


def check_scale(scale: float, low: float = 0.0, high: float = 1.0) -> None:
    """Refuse a guidance scale or an interval that cannot be meant.

    Raises:
        UserError: A scale that is negative, infinite or not a number; an interval not in [0, 1].
    """
    require("scale", scale, "[0, inf)")
    if not 0 <= low <= high <= 1:
        raise UserError(f"low={low}, high={high}: must be 0 <= low <= high <= 1")
