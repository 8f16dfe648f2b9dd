"""Guidance by the angle between two predictions of the data, which bounds how far it goes."""

import math

import torch
from torch import Tensor

from w2s_train.errors import require
from w2s_train.guidance.base import Guidance, VelocityField, evaluate_both
from w2s_train.interpolant import Interpolant, right_pad
from w2s_train.models import Network
from w2s_train.objective import Objective

LARGEST_ANGLE = math.pi / 3
SMALL_SINE = 1e-3  # below it, the ratio of two sines is taken as that of the angles


class AngleDomain(Guidance):
    """Angle-domain guidance (ADG).

    With x_c and x_u the data predicted with and without the label, theta the angle between them and
    gamma = scale - 1 + 1e-3, the angle is extrapolated to theta' = gamma theta, at most 60 degrees:

        x = cos(theta') x_c + sin(theta') / sin(theta) e,

    e being the part of x_c - x_u that is orthogonal to x_u.

    Args:
        scale: At least 1, which is (nearly) no guidance.

    Raises:
        UserError: A scale below 1, infinite or not a number.
    """

    def __init__(self, scale: float) -> None:
        self.scale = require("scale", scale, "[1, inf)")

    def bind(self, network: Network, objective: Objective) -> None:
        self.interpolant = objective.interpolant

    def rotate(self, x_c: Tensor, x_u: Tensor) -> Tensor:
        """The guided data, from data predicted with and without label (B, C, H, W), in float64."""
        c, u = x_c.double().flatten(1), x_u.double().flatten(1)
        cosine = torch.cosine_similarity(c, u, dim=1, eps=1e-12).clamp(-1, 1)
        theta, gamma = torch.acos(cosine), self.scale - 1 + 1e-3
        turned = (gamma * theta).clamp(-LARGEST_ANGLE, LARGEST_ANGLE)
        difference = c - u
        along = (difference * u).sum(1) / u.square().sum(1).clamp(min=1e-24)
        across = (difference - along.unsqueeze(1) * u).view_as(x_c)
        sine = torch.sin(theta)
        ratio = torch.where(sine > SMALL_SINE, torch.sin(turned) / sine, gamma)
        kept = right_pad(torch.cos(turned), across) * x_c.double()
        return kept + right_pad(ratio, across) * across

    def guided(
        self, v_class: Tensor, v_null: Tensor, x_t: Tensor, t: float, interpolant: Interpolant
    ) -> Tensor:
        """The guided velocity, from those with and without label at x_t, all (B, C, H, W)."""
        time = torch.full((len(x_t),), t, dtype=x_t.dtype, device=x_t.device)
        x_c, x_u = (interpolant.velocity_to_data(v, x_t, time) for v in (v_class, v_null))
        return interpolant.data_to_velocity(self.rotate(x_c, x_u).to(x_t.dtype), x_t, time)

    def field(self, network: Network, y: Tensor, times: list[float]) -> VelocityField:
        def velocity(x_t: Tensor, t: float, start: float) -> Tensor:
            return self.guided(*evaluate_both(network, x_t, t, y), x_t, t, self.interpolant)

        return velocity

    def describe(self) -> str:
        return f"adg({self.scale:g})"
