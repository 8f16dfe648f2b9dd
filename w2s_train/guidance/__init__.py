"""Sampling-time guidance, for comparison with unguided sampling; one kind a file."""

from w2s_train.guidance.angle_domain import AngleDomain
from w2s_train.guidance.autoguidance import Autoguidance
from w2s_train.guidance.base import Guidance, Unguided, VelocityField, evaluate
from w2s_train.guidance.classifier_free import ClassifierFree, StageWise
from w2s_train.guidance.frozen_head import FrozenHeadObjective
from w2s_train.guidance.inbuilt import Choice, Inbuilt
from w2s_train.guidance.learned import GuidanceObjective, Learned
from w2s_train.guidance.segmented import Segmented

__all__ = [
    "AngleDomain",
    "Autoguidance",
    "Choice",
    "ClassifierFree",
    "FrozenHeadObjective",
    "Guidance",
    "GuidanceObjective",
    "Inbuilt",
    "Learned",
    "Segmented",
    "StageWise",
    "Unguided",
    "VelocityField",
    "evaluate",
]
