"""What metrics ask of an extractor of features, its weights on disk, and its fingerprint."""

import abc
import importlib.metadata
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from w2s_train.errors import UserError
from w2s_train.files import expanded, locked, sha256_of

# Convolutions round differently for some batch sizes; in blocks of one size, features depend on the
# image alone (to 1e-6 where squeeze-and-excite gates are rounded by row, as AVX2 alone does).
BLOCK = 50
KEEP = 10_000  # features of single images in a reference, for metrics that need them
VERSIONS = ("torch", "torchvision", "clean-fid", "pillow")


class FeatureExtractor(nn.Module, abc.ABC):
    """Images to feature vectors.

    The config builds an extractor before its weights may exist; `load` reads them.

    Args:
        weights: A local file; None where the extractor fetches or finds them itself.
    """

    metric: str = ""  # name of the Fréchet distance in these features
    num_features: int = 0  # F, known once loaded
    protocol_images: int | None = None  # that published scores are made of; None: no such custom
    has_probabilities: bool = False  # whether `probabilities` is defined
    has_tokens: bool = False  # whether `tokens` is

    def __init__(self, weights: str | None = None) -> None:
        super().__init__()
        self.weights = None if weights is None else expanded("weights", weights)

    def check_files(self) -> None:
        """Refuse missing files and libraries that cannot be fetched, without reading them.

        Raises:
            UserError: The weights are missing, or the library that reads them.
        """
        if self.weights is not None and not self.weights.is_file():
            raise UserError(f"weights={self.weights}: must be an existing file")

    @abc.abstractmethod
    def load(self) -> None:
        """Read the weights.

        Raises:
            UserError: They are missing, cannot be fetched, or are of another form.
        """

    @abc.abstractmethod
    def describe(self) -> str:
        """Name and version of weights and resizing; equal only if features are comparable."""

    @abc.abstractmethod
    def features(self, images: Tensor) -> Tensor:
        """(B, C, H, W) uint8 to (B, F) float32."""

    def tokens(self, images: Tensor) -> Tensor:
        """(B, C, H, W) uint8 to features of their parts (B, N, F), row by row of a square grid.

        Raises:
            UserError: The extractor has no such parts.
        """
        raise UserError(
            f"extractor={type(self).__name__}: must be one that has tokens, such as DINOv2Features "
            "or ClassifierFeatures"
        )

    def probabilities(self, features: Tensor) -> Tensor:
        """Features (B, F) to the extractor's class probabilities (B, K), for the Inception Score.

        Raises:
            UserError: The extractor has no classes.
        """
        raise UserError(
            "inception_score: needs an extractor with class probabilities, "
            f"{type(self).__name__} has none"
        )

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Features (N, F) of any number of images (N, C, H, W) uint8, whatever their grouping."""
        parts = []
        for block in images.split(BLOCK):
            padded = torch.cat([block, block[:1].expand(BLOCK - len(block), -1, -1, -1)])
            parts.append(self.features(padded)[: len(block)])
        return torch.cat(parts)


def fetched(target: Path, download: Callable[[Path], object]) -> Path:
    """``target``, downloaded first where it is missing; whole or not at all.

    Args:
        target: Where the file is kept.
        download: Writes the file ``target.name`` into the folder that it is given.

    Raises:
        UserError: The download failed, or there is no folder to keep it in.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"folder={target.parent}: must be a folder that can be written ({error.strerror})"
        ) from error
    with locked(Path(f"{target}.lock")) as alone:  # one process of several fetches
        if not target.is_file():
            folder = target.parent / ("partial" if alone else f"partial-{os.getpid()}")
            folder.mkdir(exist_ok=True)
            (folder / target.name).unlink(missing_ok=True)
            try:
                download(folder)
            except (OSError, RuntimeError) as error:  # of network or disk; a wrong hash
                raise UserError(
                    f"weights=None: must be a local {target.name} where it cannot be fetched "
                    f"({error}); --trainer.callbacks w2s_train.callbacks.SampleGrid does without"
                ) from error
            os.replace(folder / target.name, target)
    return target


def digest(weights: Path) -> str:
    """The first 12 hexadecimal digits of the file's sha256."""
    return sha256_of(weights)[:12]


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
