"""Webdataset shards: other people's, compressed ones, or our own in another size."""

import functools
from collections.abc import Iterator

from w2s_train.preparation.base import Item, Source, digest
from w2s_train.shards import local_shards
from w2s_train.shards.samples import MOST_CLASSES, encoded_image, read_shard
from w2s_train.shards.whole import check_whole
from w2s_train.shards.writer import CLASSES


class ShardSource(Source):
    """One shard per shard, with the same keys in the same order; fields but image and label go.

    Args:
        urls: Path, glob or brace pattern of the shards; ``classes.txt`` may lie beside them.

    Raises:
        UserError: It names no shard.
    """

    def __init__(self, urls: str) -> None:
        self.paths = local_shards(urls, "shards")
        names = self.paths[0].parent / CLASSES
        self.classes = (
            names.read_text("utf-8", "surrogateescape").splitlines() if names.is_file() else []
        )
        files = [f"{path.name} {path.stat().st_size}" for path in self.paths]
        self.identity = {"source": "shards", "files": digest(files)}
        self.notes = []

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, shard: int) -> Iterator[Item]:
        path = self.paths[shard]
        check_whole(path)
        for sample in read_shard(path):
            content, label = encoded_image(sample, path, len(self.classes) or MOST_CLASSES)
            key = sample["__key__"]
            yield Item(key, label, f"{path.name} {key}", functools.partial(bytes, content))
