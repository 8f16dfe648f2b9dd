"""Alignment of the network's tokens with an encoder's.

With tokens h of a block, a projector P that is trained with the network, and tokens z of a frozen
encoder of the same (clean) image, a term adds to the loss of each row

    - weight * mean over tokens of  < z / |z|, P(h) / |P(h)| >

REPA: Yu et al., "Representation Alignment for Generation" (arXiv 2410.06940). With a convolution as
P and z made relative to its mean over tokens, `spatial_norm`, it is iREPA: Singh et al., "What
matters for Representation Alignment" (arXiv 2512.10794). Norms are floored at 1e-12.
"""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from w2s_train.align.encoders import Encoder
from w2s_train.align.projectors import MLP, Projector
from w2s_train.errors import UserError, distinct, require
from w2s_train.log import Log
from w2s_train.models import DiTOutput, Network, offered

EPSILON = 1e-6  # beside the standard deviation, as in iREPA's code


def spatial_norm(tokens: Tensor, alpha: float) -> Tensor:
    """(z - alpha * mean z) / (std z + 1e-6), over the tokens of each row and channel.

    Args:
        tokens: (B, M, F); std is the unbiased one.
        alpha: How much of the mean is taken away. Below 1, a channel that is the same in all tokens
            becomes very large.
    """
    mean, std = tokens.mean(1, keepdim=True), tokens.std(1, keepdim=True)
    return (tokens - alpha * mean) / (std + EPSILON)


def resampled(tokens: Tensor, number: int, name: str) -> Tensor:
    """Tokens (B, M, F) of a square grid for one of ``number`` tokens, bilinear, anti-aliased.

    Raises:
        UserError: The numbers differ and are not both squares.
    """
    if (given := tokens.shape[1]) == number:
        return tokens
    old, new = _sides(given, number, name)
    grid = tokens.transpose(1, 2).unflatten(2, (old, old)).float()
    grid = F.interpolate(grid, (new, new), mode="bilinear", antialias=True)
    return grid.flatten(2).transpose(1, 2)


def _sides(given: int, number: int, name: str) -> tuple[int, int]:
    """Of two square grids, the encoder's and the network's."""
    old, new = math.isqrt(given), math.isqrt(number)
    if given != number and (old * old != given or new * new != number):
        raise UserError(
            f"align={name}: must have as many tokens in the encoder, {given}, as in the network, "
            f"{number}, or square numbers in both; choose another image or patch size"
        )
    return old, new


class Alignment(nn.Module):
    """A term of the loss; as it stands that of REPA.

    Args:
        encoder: Where the tokens z come from.
        features: Width F of a token of the encoder; 768 for DINOv2-B.
        projector: P; None is an `MLP`.
        block: Whose tokens h are, counted from 0; None is the end of the first third.
        weight: Of the term; 0.5 in REPA. A run that goes on may end it with 0.
        alpha: Of `spatial_norm`, 0.6 in iREPA on latents; None leaves the encoder's tokens alone.
        name: In logs.

    Raises:
        UserError: A number out of its range.
    """

    def __init__(
        self,
        encoder: Encoder,
        features: int,
        projector: Projector | None = None,
        block: int | None = None,
        weight: float = 0.5,
        alpha: float | None = None,
        name: str = "encoder",
    ) -> None:
        super().__init__()
        self.encoder, self.features = encoder, require("features", features, "[1, inf)")
        self.projector, self.block = projector or MLP(), block
        self.weight = require("weight", weight, "[0, inf)")
        self.alpha = None if alpha is None else require("alpha", alpha, "[0, 1]")
        if not re.fullmatch(r"[A-Za-z][\w-]*", name, re.ASCII):
            raise UserError(f"name={name}: must be letters, digits, _ and -, a letter first")
        self.name, self.kept = name, 0
        # Of the network's input, (C, H, W), where it says, and the number of its tokens then.
        self.shape: tuple[int, int, int] | None = None
        self.number = 0

    def bind(self, network: Network) -> None:
        """Make the projector; UserError: the network has no such block, or offers no tokens."""
        wanted = ("depth", "hidden_size", "keep_hidden=")
        depth, width = offered(network, "an alignment", *wanted)
        self.kept = max(depth // 3 - 1, 0) if self.block is None else self.block
        if not 0 <= self.kept < depth:
            raise UserError(
                f"block={self.block}: must be in [0, {depth - 1}], the network has {depth} blocks"
            )
        self.projector.bind(width, self.features)
        shape, patch = getattr(network, "shape", None), getattr(network, "patch_size", 0)
        if shape is not None and patch > 0:  # else found at the first step
            self.shape, self.number = shape, math.prod(n // patch for n in shape[1:])

    def forward(self, batch: Mapping[str, Any] | None, out: DiTOutput, log: Log) -> Tensor:
        """The weighted term of each row (B,).

        Args:
            batch: What the data module has read.
            out: The strong pass, with the tokens of block ``kept``.
            log: Takes the unweighted term.

        Raises:
            UserError: The encoder's tokens are not as many, or as wide, as they must be.
        """
        if batch is None:
            raise UserError(f"align={self.name}: must be trained with the batch, Step(batch=...)")
        h, z = out.hidden[self.kept], self.encoder.tokens(batch)
        self._check_width(z.shape[-1])
        z = resampled(z, h.shape[1], self.name).float()
        if self.alpha is not None:
            z = spatial_norm(z, self.alpha)
        found = -F.cosine_similarity(z, self.projector(h).float(), dim=-1, eps=1e-12).mean(1)
        log.add((f"align/{self.name}/loss",), found[None])
        return self.weight * found

    def load(self) -> None:
        """Read the encoder's weights, and compare its tokens with the network's where they say.

        Raises:
            UserError: They cannot be read; ``features`` is wrong; the tokens are not as many.
        """
        self.encoder.load()
        self._check_width(self.encoder.width)
        if self.shape is not None and self.weight > 0:
            given = self.encoder.number(self.shape)
            _sides(self.number if given is None else given, self.number, self.name)

    def _check_width(self, width: int | None) -> None:
        if width not in (None, self.features):
            raise UserError(f"features={self.features}: must be {width}, as the encoder has")

    def describe(self) -> str:
        """One line: block, encoder, weight."""
        how = f"block {self.kept}, {self.encoder.describe()}, weight {self.weight:g}"
        return f"alignment {self.name}: {how}"


def weights_of(described: str) -> str:
    """The hash in what an extractor says of itself, or all that it says."""
    found = re.search(r"sha256:\w+", described)
    return found[0] if found else described


class Alignments(nn.ModuleList):
    """All terms of an objective; mostly none.

    Args:
        terms: None is none.

    Raises:
        UserError: Two have one name.
    """

    def __init__(self, terms: Iterable[Alignment] | None = None) -> None:
        super().__init__(terms or ())
        self.terms: list[Alignment] = list(terms or ())
        distinct("align", [term.name for term in self.terms])

    @property
    def blocks(self) -> set[int]:
        """Whose tokens the strong pass must keep."""
        return {term.kept for term in self.terms}

    @property
    def weight(self) -> float:
        """Of all together: their sum is never below minus this."""
        return sum(term.weight for term in self.terms)

    @property
    def stored(self) -> bool:
        """Whether batches must bring tokens along."""
        return any(term.encoder.stored for term in self.terms)

    def bind(self, network: Network) -> None:
        """Introduce all to the network."""
        for term in self.terms:
            term.bind(network)

    def load(self) -> None:
        """Read the encoders' weights, before the first step."""
        for term in self.terms:
            term.load()

    def check(self, made: dict[str, Any], where: str) -> None:
        """Compare with the ``latents.json`` beside the shards; UserError: its data will not do."""
        for term in self.terms:
            term.encoder.check(made, where)

    def encoders(self) -> dict[str, str]:
        """What each term's encoder is, by name; for the record of a run."""
        return {term.name: term.encoder.describe() for term in self.terms}

    def refuse_judge(self, judge: str) -> None:
        """Refuse to train towards what scores.

        Args:
            judge: `FeatureExtractor.describe` of an extractor of the scores.

        Raises:
            UserError: One of the terms has that very extractor.
        """
        for name, encoder in self.encoders().items():
            if weights_of(encoder) == weights_of(judge):
                raise UserError(
                    f"align={name}: must not have the extractor of the scores as its encoder "
                    f"({judge}); one trained with another seed is made by data/classifier.py"
                )

    def forward(self, batch: Mapping[str, Any] | None, out: DiTOutput, log: Log) -> list[Tensor]:
        """The weighted term of each row (B,), of all terms; see `Alignment.forward`."""
        return [term(batch, out, log) for term in self.terms]
