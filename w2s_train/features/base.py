"""What metrics ask of a feature extractor."""

import abc

import torch
from torch import Tensor, nn

from w2s_train.errors import UserError

# Convolutions of some libraries round differently for some batch sizes. Features are computed in
# blocks of one size, so that they depend on the image alone.
BLOCK = 50


class FeatureExtractor(nn.Module, abc.ABC):
    """Images to feature vectors.

    The config builds an extractor before its weights may exist; `load` reads them.
    """

    metric: str = ""  # name of the Fréchet distance in these features
    num_features: int = 0  # F, known once loaded
    protocol_images: int | None = None  # that published scores are made of; None: no such custom
    has_probabilities: bool = False  # whether `probabilities` is defined

    def check_files(self) -> None:
        """Refuse missing files and libraries that cannot be fetched, without reading them.

        Raises:
            UserError: The weights are missing, or the library that reads them.
        """
        return None

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
