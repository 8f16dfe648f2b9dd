"""Callbacks that configs name: ``class_path: w2s_train.callbacks.FID``."""

from w2s_train.evaluation.fid import FID
from w2s_train.evaluation.images import SampleGrid
from w2s_train.evaluation.scorer import ResumableEvaluation
from w2s_train.posthoc.averages import PowerAverages

__all__ = ["FID", "PowerAverages", "ResumableEvaluation", "SampleGrid"]
