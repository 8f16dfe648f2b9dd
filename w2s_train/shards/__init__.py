"""Shards: written, indexed, fetched, put in an order, and streamed."""

from w2s_train.shards.storage import Storage
from w2s_train.shards.stream import ShardImages, ShardStream
from w2s_train.shards.urls import expand_urls, local_shards
from w2s_train.shards.writer import ShardWriter, is_written, write_index

__all__ = [
    "ShardImages",
    "ShardStream",
    "ShardWriter",
    "Storage",
    "expand_urls",
    "is_written",
    "local_shards",
    "write_index",
]
