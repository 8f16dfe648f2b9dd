"""Guidance, without training, for text-to-image models that diffusers' pipelines run."""

from w2s_train.text2image.base import Guider
from w2s_train.text2image.segmented import SegmentedGuidance

__all__ = ["Guider", "SegmentedGuidance"]
