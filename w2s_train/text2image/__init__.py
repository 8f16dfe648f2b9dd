"""Text-to-image models that others have trained: guidance without training, images, scores."""

from w2s_train.text2image.angle_domain import AngleDomainGuidance
from w2s_train.text2image.base import Guider
from w2s_train.text2image.learned import LearnedGuidance, PromptScales, Texts
from w2s_train.text2image.segmented import SegmentedGuidance
from w2s_train.text2image.stage_wise import StageWiseGuidance

__all__ = [
    "AngleDomainGuidance",
    "Guider",
    "LearnedGuidance",
    "PromptScales",
    "SegmentedGuidance",
    "StageWiseGuidance",
    "Texts",
]
