"""Shards: written, indexed, fetched, put in an order, and streamed."""

from w2s_train.shards.writer import ShardWriter, is_written, write_index

__all__ = ["ShardWriter", "is_written", "write_index"]
