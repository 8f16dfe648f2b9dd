"""Reference statistics of a data set in the features of an extractor."""

from pathlib import Path

from torch import Tensor

from w2s_train.features.base import FeatureExtractor
from w2s_train.frechet import Moments, Reference


def write_reference(
    path: Path, extractor: FeatureExtractor, images: Tensor, *, dataset: str, split: str
) -> None:
    """Write the statistics of images (N, C, H, W) uint8, with their fingerprint."""
    features = extractor(images).double()
    moments = Moments.from_sums(features.sum(0), features.T @ features, len(features))
    fingerprint: dict[str, str | int] = {
        "dataset": dataset,
        "split": split,
        "n": len(images),
        "resize": f"none, {images.shape[-2]}x{images.shape[-1]}",
        "extractor": extractor.describe(),
    }
    Reference(moments, fingerprint).save(path)
