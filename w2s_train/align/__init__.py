"""Alignment: tokens of a block are drawn towards those of a frozen encoder; see docs/align.md."""

from w2s_train.align.encoders import Encoder, Extractor, Stored
from w2s_train.align.projectors import MLP, Convolution, Projector
from w2s_train.align.terms import Alignment, Alignments, spatial_norm

__all__ = [
    "MLP",
    "Alignment",
    "Alignments",
    "Convolution",
    "Encoder",
    "Extractor",
    "Projector",
    "Stored",
    "spatial_norm",
]
