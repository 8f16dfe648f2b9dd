"""The Fréchet distance between generated images and a reference, with its protocol."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from w2s_train.autoencoder import PixelSpace
from w2s_train.datamodule import ShardDataModule
from w2s_train.errors import UserError
from w2s_train.evaluation.scorer import Scorer, gather
from w2s_train.features import FeatureExtractor, shape_name
from w2s_train.features.frechet import FeatureSums, Reference, frechet_distance
from w2s_train.metrics import FeatureMetric
from w2s_train.scores import append_scores
from w2s_train.shards.order import total_variation

# Total variation between the classes of the data and those generated. ImageNet's and CIFAR's are
# below 0.02; 375 images of ten classes are at 0.06 by chance.
UNEQUAL = 0.1


def summed(sums: FeatureSums, trainer: Trainer) -> FeatureSums:
    """Over all processes; always in the order of ranks, which fixes the last digits."""
    if trainer.world_size == 1:
        return sums
    whole, device = FeatureSums(len(sums.total)), sums.total.device
    totals = []
    for mine in (sums.total, sums.outer, torch.tensor(sums.count, device=device)):
        shares = [torch.empty_like(mine) for _ in range(trainer.world_size)]
        torch.distributed.all_gather(shares, mine)
        totals.append(torch.stack(shares).sum(0))
    whole.add(*totals)
    return whole


class FID(Scorer):
    """Scores the images of every validation and appends the scores to ``scores.json``.

    The Fréchet distance is named by the extractor: "fid" for Inception, "fd_..." for others; with
    fewer images than its protocol asks for, "fid@5k" and the like. It is logged as ``val/<name>``.

    Args:
        reference: Statistics file (``.npz``) made with the same extractor.
        features: The feature extractor.
        metrics: Further scores of the same features, such as `w2s_train.metrics.KernelDistance`.
    """

    def __init__(
        self,
        reference: str,
        features: FeatureExtractor,
        metrics: list[FeatureMetric] | None = None,
    ) -> None:
        self.reference_path, self.extractor = Path(reference), features
        self.metrics = metrics or []
        self.reference: Reference | None = None  # from `load`
        self.settings: dict[str, FeatureMetric] = {}  # by the name of a score

    def check_files(self) -> None:
        """Refuse files that are not there, without reading them.

        Raises:
            UserError: The reference or the extractor's weights are missing.
        """
        if not self.reference_path.is_file():
            raise UserError(f"reference={self.reference_path}: must be an existing file")
        self.extractor.check_files()

    def check(self, module: Any, data: Any, *, made_later: bool) -> None:
        try:
            self.check_files()
        except UserError:
            if not made_later:
                raise
        else:
            self.load(module, data)

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Load extractor and reference, unless `check` did so already."""
        if stage != "predict" and self.reference is None:
            self.load(pl_module, getattr(trainer, "datamodule", None))
        if stage == "fit":
            pl_module.objective.align.refuse_judge(self.extractor.describe())

    def load(self, module: Any, data: Any) -> None:
        """Load extractor and reference, and refuse what does not belong together.

        Args:
            module: The Lightning module, or None.
            data: The data module, or None.

        Raises:
            UserError: A reference that cannot be read, or of another extractor, data set or image
                shape; a metric that cannot be computed of so few images or with this extractor.
        """
        self.extractor.load()
        reference = Reference.load(self.reference_path)
        pairs = [("extractor", self.extractor.describe())]
        if data is not None:
            pairs.append(("dataset", data.dataset))
        if module is not None and isinstance(module.autoencoder, PixelSpace):
            pairs.append(("images", shape_name(module.input_shape)))
        for key, ours in pairs:
            self._compare(reference, key, ours)
        n = data.num_generated if data is not None else None
        if n is not None and n < 2:
            raise UserError(f"num_generated={n}: must be at least 2 for a covariance")
        for metric in self.metrics:
            if metric.needs_reference and not len(reference.features):
                raise UserError(
                    f"reference={self.reference_path}: holds no features of single images, which "
                    f"{type(metric).__name__} needs; make it of shards with lightning reference, "
                    "or score without"
                )
            metric.check(n, len(reference.features), self.extractor)
            if metric.needs_labels:
                self._check_labels(metric, module, data)
        self.reference = reference

    def _check_labels(self, metric: FeatureMetric, module: Any, data: Any) -> None:
        """Refuse a metric of asked classes where none are asked for."""
        if data is None or (module is not None and module.unconditional):
            asked = "images of a folder" if data is None else "model.label_dropout=1"
            raise UserError(
                f"metrics={type(metric).__name__}: must know which class each image was asked "
                f"for, {asked} has none; leave it out"
            )
        metric.check_classes(data.num_classes, self.extractor)

    def _compare(self, reference: Reference, key: str, ours: str) -> None:
        """Refuse a reference that was made with something else."""
        if (made := reference.fingerprint.get(key, ours)) != ours:
            raise UserError(
                f"reference={self.reference_path}: was made with {key} {made}, must be {ours}"
            )

    def check_shape(self, images: Tensor) -> None:
        """Refuse images (N, C, H, W) of another shape than those of the reference.

        Raises:
            UserError: They are.
        """
        self._compare(self._loaded, "images", shape_name(images.shape[1:]))

    def describe(self) -> str:
        return ", ".join([self.extractor.describe(), *(m.describe() for m in self.metrics)])

    @property
    def fingerprint(self) -> dict[str, str | int]:
        """Of the reference, once loaded."""
        return self._loaded.fingerprint

    @property
    def _loaded(self) -> Reference:
        assert self.reference is not None
        return self.reference

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Say so if the classes that are generated are not as frequent as those of the data."""
        data = getattr(trainer, "datamodule", None)
        if not isinstance(data, ShardDataModule) or not trainer.is_global_zero:
            return
        if pl_module.unconditional or data.labels_as_in_training or data.num_classes == 1:
            return
        counts = data.class_counts()
        distance = total_variation(counts, np.ones(len(counts)))
        if distance > UNEQUAL:
            rank_zero_warn(
                f"data.labels_as_in_training=False: each class is generated equally often, but "
                f"the training set has {counts.min():,} to {counts.max():,} images of a class "
                f"(total variation {distance:.2g}, above {UNEQUAL}): the distance to its "
                "statistics is large for that alone; true generates them as frequently as it has"
            )

    def begin(self, trainer: Trainer, module: Any) -> None:
        self.extractor.to(module.device)
        size = self.extractor.num_features
        self.sums = [FeatureSums(size, module.device) for _ in self.plans]
        self.kept: list[list[tuple[Tensor, Tensor]]] = [[] for _ in self.plans]
        self.began = time.perf_counter()

    def take(self, group: int, images: Tensor, batch: dict[str, Tensor]) -> None:
        self.check_shape(images)
        features = self.extractor(images)
        self.sums[group].update(features)
        if self.metrics:
            self.kept[group].append((batch["index"].cpu(), features.cpu()))

    def state(self) -> Any:
        kept = [[list(part) for part in parts] for parts in self.kept]
        return {"sums": [sums.state() for sums in self.sums], "kept": kept}

    def merge(self, state: Any) -> None:
        for mine, other in zip(self.sums, state["sums"], strict=True):
            mine.add(**other)
        for kept, parts in zip(self.kept, state["kept"], strict=True):
            kept += [(index, features) for index, features in parts]

    def score(self, trainer: Trainer, module: Any) -> None:
        entries = []
        for group in range(len(self.plans)):
            scores, n = self.found(group, trainer)
            about = {
                "extractor": self.extractor.describe(),
                "reference": self._loaded.fingerprint,
                "evaluation_seconds": round(time.perf_counter() - self.began, 3),
            }
            found = self.record(group, scores, n, module, about)
            for entry in found:
                if metric := self.settings.get(entry["metric"]):
                    entry["protocol"]["metric_settings"] = metric.describe()
                    entry["protocol"]["reference_features"] = len(self._loaded.features)
            entries += found
        if trainer.is_global_zero:
            append_scores(Path(trainer.default_root_dir), entries)

    def found(self, group: int, trainer: Trainer) -> tuple[dict[str, float], int]:
        """The scores of a group by name, and the number of images behind them."""
        sums = summed(self.sums[group], trainer)
        n = sums.count
        if n <= self.extractor.num_features:
            rank_zero_warn(
                f"{n:,} images are too few for a covariance of {self.extractor.num_features:,} "
                "features: the distance is far too large, and comparable at equal numbers only"
            )
        features, labels = list[Tensor](), list[int]()
        if self.metrics:
            parts = [part for share in gather(self.kept[group], trainer) for part in share]
            indices, order = torch.cat([index for index, _ in parts]).sort()
            features = [torch.cat([features for _, features in parts])[order]]
            labels = [self.plans[group][i]["label"] for i in indices.tolist()]
        return self.scores(sums, features, labels), n

    def scores(
        self, sums: FeatureSums, features: list[Tensor], labels: Sequence[int] = ()
    ) -> dict[str, float]:
        """The scores by name, with the number of images where it is below the protocol's.

        Args:
            sums: Of the features of all images, at least two.
            features: Of single images, (N, F) in parts; empty where there are no other metrics.
            labels: The class that each was asked for; empty where no metric needs them.
        """
        suffix = self._suffix(sums.count)
        scores = {self.extractor.metric: frechet_distance(sums.moments(), self._loaded.moments)}
        if self.metrics:
            device = next(self.extractor.parameters()).device
            generated, reference = torch.cat(features).to(device), self._loaded.features.to(device)
            for metric in self.metrics:
                asked = [torch.tensor(labels)] if metric.needs_labels else []
                found = metric.compute(generated, reference, self.extractor, *asked)
                scores |= {self._name(name): value for name, value in found.items()}
                self.settings |= {f"{self._name(name)}{suffix}": metric for name in found}
        # Float64 sums over another grouping of the same features differ in their last bits, and the
        # root in the distance magnifies that to about 1e-9: keep the digits that are always equal.
        return {f"{name}{suffix}": float(f"{v:.6g}") for name, v in scores.items()}

    def _name(self, metric: str) -> str:
        """Of another metric: plain for FID's Inception, else with the features it is made of."""
        features = self.extractor.metric.removeprefix("fd_").removeprefix("fid").strip("_")
        return f"{metric}_{features}" if features else metric

    def _suffix(self, n: int) -> str:
        """What sets a score of fewer images than its protocol's apart."""
        if n >= (self.extractor.protocol_images or 0):
            return ""
        return f"@{n // 1000}k" if n % 1000 == 0 else f"@{n}"
