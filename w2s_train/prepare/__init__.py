"""Turns image folders and published data sets into shards: ``data/prepare.py``."""

from w2s_train.prepare.engine import Preparation
from w2s_train.prepare.images import BrokenImage, ColourImage, Conversion, Encoded, center_crop
from w2s_train.prepare.sources import Dealt, Images, Item, Source

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
