"""Callbacks and loggers for the Lightning trainer."""

from w2s_train.callbacks.agreement import Agreement
from w2s_train.callbacks.checkpoints import Checkpoints
from w2s_train.callbacks.fid import FID
from w2s_train.callbacks.graceful_stop import GracefulStop
from w2s_train.callbacks.guard import Guard
from w2s_train.callbacks.leaves import LeavesScores
from w2s_train.callbacks.metrics_csv import Events, MetricsCSV
from w2s_train.callbacks.profile import Profile
from w2s_train.callbacks.progress import Progress
from w2s_train.callbacks.reference_writer import ReferenceWriter
from w2s_train.callbacks.resumable_evaluation import ResumableEvaluation
from w2s_train.callbacks.run_record import RunRecord
from w2s_train.callbacks.sample_grid import SampleGrid
from w2s_train.callbacks.sample_writer import GridWriter, ImageWriter, NpzWriter, ShardWriter
from w2s_train.callbacks.save_config import SaveFitConfig
from w2s_train.callbacks.skipped_samples import SkippedSamples
from w2s_train.callbacks.step_seed import StepSeed
from w2s_train.callbacks.watch import Position, watched_strategies

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
