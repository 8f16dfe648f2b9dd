"""Shards: written, indexed, fetched, put in an order, and read in batches."""

from w2s_train.shards.dataset import ShardBatches, ShardFiles, ShardImages
from w2s_train.shards.format import ShardWriter, is_written, write_index
from w2s_train.shards.storage import Storage, expand_urls, local_shards

__all__ = [
    "ShardBatches",
    "ShardFiles",
    "ShardImages",
    "ShardWriter",
    "Storage",
    "expand_urls",
    "is_written",
    "local_shards",
    "write_index",
]
