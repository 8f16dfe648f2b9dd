"""Segments: what a range of timesteps adds to the target and to the loss."""

from w2s_train.segment.base import (
    Chosen,
    Segment,
    SegmentTerms,
    Statistic,
    StrongPass,
    mean_square,
)
from w2s_train.segment.consistency import Consistency
from w2s_train.segment.extrapolation import Extrapolation

__all__ = [
    "Chosen",
    "Consistency",
    "Extrapolation",
    "Segment",
    "SegmentTerms",
    "Statistic",
    "StrongPass",
    "mean_square",
]
