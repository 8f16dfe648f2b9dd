"""Turns image folders and published data sets into shards: ``data/prepare.py``."""

from w2s_train.preparation.base import Dealt, Images, Item, Source
from w2s_train.preparation.image import BrokenImage, ColourImage, Conversion, Encoded, center_crop
from w2s_train.preparation.run import Preparation

__all__ = [
    "BrokenImage",
    "ColourImage",
    "Conversion",
    "Dealt",
    "Encoded",
    "Images",
    "Item",
    "Preparation",
    "Source",
    "center_crop",
]
