"""Distances of all images together to a reference, by the extractors and metrics of runs."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from w2s_train.evaluation.fid import FID
from w2s_train.evaluation.folder import score_files
from w2s_train.features import FeatureExtractor
from w2s_train.metrics import FeatureMetric
from w2s_train.text2image.record import Item


class Distance:
    """The Fréchet distance to a reference, and what else the same features tell.

    Args:
        reference: An ``.npz`` of ``lightning reference``, of images of the same size.
        features: The extractor that it was made with.
        metrics: Beside the distance.

    Raises:
        UserError: The reference or the extractor's weights are missing.
    """

    def __init__(
        self,
        reference: str,
        features: FeatureExtractor,
        metrics: list[FeatureMetric] | None = None,
    ) -> None:
        self.fid = FID(reference, features, metrics)
        self.fid.check_files()

    def load(self, height: int, width: int) -> None:
        """Read extractor and reference.

        Args:
            height: Of the images, in pixels.
            width: The same.

        Raises:
            UserError: One cannot be read, or they are not of each other or of such images.
        """
        self.fid.load(None, None)
        self.fid.check_shape(torch.empty(0, 3, height, width))

    def about(self, items: Sequence[Item]) -> dict[str, Any]:
        """Which images, extractor and reference distances are of: comparable only if equal."""
        pairs = json.dumps(sorted((item.prompt, item.seed) for item in items))
        return {
            "images": f"{len(items)}, sha256:{hashlib.sha256(pairs.encode()).hexdigest()[:12]}",
            "extractor": self.fid.describe(),
            "reference": self.fid.fingerprint,
        }

    def of(self, files: Iterable[Path], folder: Path, device: torch.device) -> dict[str, float]:
        """Distances by name.

        Args:
            files: The images, at least two.
            folder: Where they lie.
            device: Where features are computed.

        Raises:
            UserError: An image cannot be read.
        """
        self.fid.extractor.to(device)
        return score_files(self.fid, files, folder)
