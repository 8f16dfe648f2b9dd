"""Reference statistics of a data set in the features of an extractor."""

import importlib.metadata
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from w2s_train.features.base import FeatureExtractor
from w2s_train.frechet import Moments, Reference

VERSIONS = ("torch", "torchvision", "clean-fid", "pillow")
KEEP = 10_000  # features of single images in a reference, for metrics that need them


def fingerprint(
    extractor: FeatureExtractor, *, dataset: str, split: str, n: int, images: str, encoding: str
) -> dict[str, str | int]:
    """What a reference was made of; each score repeats it.

    Args:
        extractor: Where the features come from.
        dataset: Name of the data set.
        split: Name of its part.
        n: Number of images.
        images: Their shape, CxHxW.
        encoding: How they were stored, such as png.
    """
    return {
        "dataset": dataset,
        "split": split,
        "n": n,
        "images": images,
        "resize": f"none, {images.partition('x')[2]}",
        "encoding": encoding,
        "extractor": extractor.describe(),
        "versions": ", ".join(f"{name} {importlib.metadata.version(name)}" for name in VERSIONS),
    }


def shape_name(shape: Sequence[int]) -> str:
    """CxHxW of a shape (C, H, W)."""
    return "x".join(str(side) for side in shape)


def write_reference(
    path: Path,
    extractor: FeatureExtractor,
    images: Tensor,
    *,
    dataset: str,
    split: str,
    encoding: str = "png",
) -> None:
    """Write the statistics of images (N, C, H, W) uint8, with their fingerprint."""
    features = extractor(images)
    double = features.double()
    moments = Moments.from_sums(double.sum(0), double.T @ double, len(double))
    about = fingerprint(
        extractor,
        dataset=dataset,
        split=split,
        n=len(images),
        images=shape_name(images.shape[1:]),
        encoding=encoding,
    )
    Reference(moments, about, features[:KEEP]).save(path)
