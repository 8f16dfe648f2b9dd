"""Weak sources: where the weak prediction of a segment comes from, one file each."""

from w2s_train.weak.base import WeakSource
from w2s_train.weak.ema import EMA
from w2s_train.weak.intermediate_head import IntermediateHead
from w2s_train.weak.layer_skip import LayerSkip
from w2s_train.weak.null_class import NullClass

__all__ = ["EMA", "IntermediateHead", "LayerSkip", "NullClass", "WeakSource"]
