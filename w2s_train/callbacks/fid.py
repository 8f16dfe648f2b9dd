"""The Fréchet distance between generated images and a reference, with its protocol."""

import time
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer
from torch import Tensor
from torchmetrics import Metric

from w2s_train.callbacks.run_record import append_scores, git_commit
from w2s_train.errors import UserError
from w2s_train.features import FeatureExtractor
from w2s_train.frechet import Moments, Reference, frechet_distance


class FeatureSums(Metric):
    """Sums of features and of their outer products, float64, added over processes.

    Args:
        num_features: Length F of a feature vector.
    """

    total: Tensor
    outer: Tensor
    count: Tensor

    def __init__(self, num_features: int) -> None:
        super().__init__()
        zeros = torch.zeros(num_features, dtype=torch.float64)
        self.add_state("total", zeros, dist_reduce_fx="sum")
        self.add_state("outer", torch.outer(zeros, zeros), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, features: Tensor) -> None:
        """Take in features (B, F)."""
        features = features.double()
        self.total += features.sum(0)
        self.outer += features.T @ features
        self.count += len(features)

    def compute(self) -> tuple[Tensor, Tensor, Tensor]:
        """The three sums over everything seen by all processes."""
        return self.total, self.outer, self.count


class FID(Callback):
    """Scores the images of every validation and appends the score to ``scores.json``.

    The score is named by the extractor: "fid" for Inception, "fd_..." for others. It is logged as
    ``val/<name>``.

    Args:
        reference: Statistics file (``.npz``) made with the same extractor.
        features: The feature extractor.
    """

    def __init__(self, reference: str, features: FeatureExtractor) -> None:
        self.reference_path, self.extractor = Path(reference), features

    def check_files(self) -> None:
        """Refuse files that are not there, without reading them.

        Raises:
            UserError: The reference or the extractor's weights are missing.
        """
        if not self.reference_path.is_file():
            raise UserError(f"reference={self.reference_path}: must be an existing file")
        self.extractor.check_files()

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Load extractor and reference, and refuse a pair that does not belong together."""
        if stage == "predict":
            return
        self.extractor.load()
        self.reference = Reference.load(self.reference_path)
        made_with, ours = self.reference.fingerprint["extractor"], self.extractor.describe()
        if made_with != ours:
            raise UserError(
                f"reference={self.reference_path}: was made with {made_with}, must be {ours}"
            )
        self.sums = FeatureSums(self.extractor.num_features)

    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Start with empty sums, on the device of the module."""
        self.extractor.to(pl_module.device)
        self.sums.to(pl_module.device).reset()
        self.began = time.perf_counter()

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Take in the images of one batch, (B, C, H, W) uint8."""
        self.sums.update(self.extractor(outputs))

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Compute, log and append the score."""
        if trainer.sanity_checking:
            return
        total, outer, count = (state.cpu() for state in self.sums.compute())
        if count < 2:
            raise UserError(f"num_generated={int(count)}: must be at least 2 for a covariance")
        generated = Moments.from_sums(total, outer, int(count))
        distance = frechet_distance(generated, self.reference.moments)
        # Float64 sums over another grouping of the same features differ in their last bits, and the
        # root in the distance magnifies that to about 1e-9: keep the digits that are always equal.
        score = float(f"{distance:.6g}")
        pl_module.record({f"val/{self.extractor.metric}": score})
        if trainer.is_global_zero:
            append_scores(
                Path(trainer.default_root_dir), [self._entry(score, generated.n, pl_module)]
            )

    on_test_start = on_validation_start
    on_test_batch_end = on_validation_batch_end
    on_test_end = on_validation_end

    def _entry(self, score: float, n: int, pl_module: Any) -> dict[str, Any]:
        """One element of ``scores.json``."""
        protocol = pl_module.protocol() | {
            "extractor": self.extractor.describe(),
            "reference": self.reference.fingerprint,
            "n": n,
            "seeds": [0, n - 1],
            "evaluation_seconds": round(time.perf_counter() - self.began, 3),
            "wall_clock_seconds": round(pl_module.wall_clock(), 3),
            "git_commit": git_commit(),
        }
        shared = {key: protocol[key] for key in ("step", "weights", "guidance")}
        return {"metric": self.extractor.metric, "value": score, **shared, "protocol": protocol}
