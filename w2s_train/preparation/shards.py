"""Webdataset shards: other people's, compressed ones, or our own in another size."""

import functools
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from w2s_train.errors import UserError
from w2s_train.preparation.base import Item, Source, digest
from w2s_train.shards import local_shards
from w2s_train.shards.samples import IMAGE_TYPES, Sample, read_shard

CLASSES = "classes.txt"


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
        try:
            for sample in read_shard(path):
                yield self._item(sample, path)
        except (tarfile.TarError, EOFError, zlib.error, OSError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"shards={path}: must be a whole tar ({reason})") from error

    def _item(self, sample: Sample, path: Path) -> Item:
        key = sample["__key__"]
        where = f"sample {key} of {path}"
        field = next((field for field in IMAGE_TYPES if field in sample), None)
        if field is None:
            held = ", ".join(name for name in sample if not name.startswith("__"))
            types = ", ".join(IMAGE_TYPES)
            raise UserError(f"shards={path}: must hold images ({types}); {key} holds {held}")
        text = sample.get("cls", b"").decode(errors="replace").strip()
        most = len(self.classes) - 1 if self.classes else float("inf")
        if not text.isascii() or not text.isdigit() or int(text) > most:
            allowed = f"in [0, {most}]" if self.classes else "a whole number"
            raise UserError(f"label={text[:20]}: must be {allowed}, in KEY.cls ({where})")
        return Item(key, int(text), f"{path.name} {key}", functools.partial(bytes, sample[field]))
