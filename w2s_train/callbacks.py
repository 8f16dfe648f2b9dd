"""Callbacks and loggers for the Lightning trainer."""

from w2s_train.evaluation.fid import FID
from w2s_train.evaluation.images import GridWriter, ImageWriter, NpzWriter, SampleGrid, ShardWriter
from w2s_train.evaluation.leaves import LeavesScores
from w2s_train.evaluation.reference import ReferenceWriter
from w2s_train.evaluation.scorer import ResumableEvaluation
from w2s_train.running.agreement import Agreement
from w2s_train.running.checkpoints import Checkpoints
from w2s_train.running.guard import Guard
from w2s_train.running.loggers import Events, MetricsCSV
from w2s_train.running.profile import Profile
from w2s_train.running.progress import Progress
from w2s_train.running.record import RunRecord, SaveFitConfig
from w2s_train.running.samples import SkippedSamples, StepSeed
from w2s_train.running.stop import GracefulStop
from w2s_train.running.watched_ddp import Position, watched_strategies

__all__ = [
    "Agreement",
    "Checkpoints",
    "Events",
    "FID",
    "GracefulStop",
    "GridWriter",
    "ImageWriter",
    "Guard",
    "LeavesScores",
    "MetricsCSV",
    "NpzWriter",
    "Position",
    "Profile",
    "Progress",
    "ReferenceWriter",
    "ResumableEvaluation",
    "RunRecord",
    "SampleGrid",
    "SaveFitConfig",
    "ShardWriter",
    "SkippedSamples",
    "StepSeed",
    "watched_strategies",
]
