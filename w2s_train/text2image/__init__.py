"""Text-to-image models that others have trained: guidance without training, images, scores."""

from w2s_train.text2image.base import Guider
from w2s_train.text2image.segmented import SegmentedGuidance

__all__ = ["Guider", "SegmentedGuidance"]
