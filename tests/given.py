"""The objective at given noisy samples, instead of those that it draws."""

from typing import NamedTuple
from unittest.mock import patch

import torch

from w2s_train.interpolant import NoisySample
from w2s_train.log import Log
from w2s_train.models import DiT
from w2s_train.objective import Objective
from w2s_train.segment import Rows, Segment
from w2s_train.weak import Step


class Losses(NamedTuple):
    """What one evaluation gives."""

    per_sample: torch.Tensor  # (B,)
    log: Log

    @property
    def total(self) -> torch.Tensor:
        """What is minimized."""
        return self.per_sample.mean()


def evaluate(
    objective: Objective,
    network: DiT,
    noisy: NoisySample,
    y: torch.Tensor,
    step: Step | None = None,
    *,
    ordered: bool = False,
) -> Losses:
    """The losses at ``noisy``; its timesteps are in any order, or ``ordered`` like drawn ones."""

    def looked_up(segment: Segment, labelled: torch.Tensor, scales: object) -> Rows:
        return segment.contains(noisy.t).nonzero().squeeze(1)

    rows = objective.rows if ordered else looked_up
    log = Log()
    with patch.object(objective, "draw", lambda x: noisy), patch.object(objective, "rows", rows):
        return Losses(objective(network, noisy.x_t, y, step or Step(), log), log)
