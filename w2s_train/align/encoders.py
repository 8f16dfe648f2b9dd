"""Where the encoder's tokens come from: computed at each step, or stored beside the latents."""

import abc
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from w2s_train.errors import UserError
from w2s_train.features import FeatureExtractor

MAKE = "data/encode_latents.py --align MODEL stores tokens beside latents"


class Encoder(abc.ABC):
    """A frozen encoder of images. No module: its weights are neither trained nor kept."""

    stored = False  # whether batches must bring tokens along
    width: int | None = None  # F, once it is known

    def load(self) -> None:  # noqa: B027
        """Read the weights, if any; UserError: they cannot be read."""

    def check(self, made: dict[str, Any], where: str) -> None:  # noqa: B027
        """Look at the ``latents.json`` beside the shards; UserError: its data will not do."""

    def number(self, shape: tuple[int, int, int]) -> int | None:
        """How many tokens it has of one sample of the network's ``shape``; None: not known yet."""
        return None

    @abc.abstractmethod
    def describe(self) -> str:
        """Name and version of the weights, once they are known."""

    @abc.abstractmethod
    def tokens(self, batch: Mapping[str, Any]) -> Tensor:
        """Tokens (B, M, F) of a training batch; UserError: it has not what they are made of."""


class Extractor(Encoder):
    """Tokens of an extractor of features, computed at each step from the batch's pixels.

    Args:
        extractor: One that has tokens, and is not that of the scores.

    Raises:
        UserError: It has no tokens.
    """

    def __init__(self, extractor: FeatureExtractor) -> None:
        if not extractor.has_tokens:
            extractor.tokens(torch.zeros(0))  # which refuses
        self.extractor, self.loaded = extractor, False

    def load(self) -> None:
        if not self.loaded:
            self.extractor.load()
        self.loaded, self.width = True, self.extractor.num_features

    def check(self, made: dict[str, Any], where: str) -> None:
        raise UserError(
            f"encoder=Extractor: must get pixels, {where} is of latents; {MAKE}, and "
            "encoder=w2s_train.align.Stored reads them"
        )

    def number(self, shape: tuple[int, int, int]) -> int:
        return self.tokens({"image": torch.zeros(1, *shape, dtype=torch.uint8)}).shape[1]

    def describe(self) -> str:
        self.load()
        return self.extractor.describe()

    def tokens(self, batch: Mapping[str, Any]) -> Tensor:
        images = batch["image"]
        if images.dtype != torch.uint8:
            raise UserError(f"encoder=Extractor: must get pixels, not {images.dtype}; {MAKE}")
        self.load()
        if next(self.extractor.parameters()).device != images.device:
            self.extractor.to(images.device)
        with torch.no_grad():
            return self.extractor.tokens(images)


class Stored(Encoder):
    """Tokens that ``data/encode_latents.py --align MODEL`` has stored beside the latents."""

    stored = True

    def __init__(self) -> None:
        self.made: dict[str, Any] | None = None  # what latents.json says of them

    def check(self, made: dict[str, Any], where: str) -> None:
        if not made.get("align"):
            raise UserError(
                f"encoder=Stored: must have tokens beside the latents of {where}; {MAKE}"
            )
        self.made, self.width = made["align"], int(made["align"]["tokens"][1])

    def number(self, shape: tuple[int, int, int]) -> int | None:
        return int(self.made["tokens"][0]) if self.made else None

    def describe(self) -> str:
        return str(self.made["encoder"]) if self.made else "stored tokens"

    def tokens(self, batch: Mapping[str, Any]) -> Tensor:
        if "tokens" not in batch:
            raise UserError(f"encoder=Stored: must have tokens in the shards; {MAKE}")
        return batch["tokens"]
