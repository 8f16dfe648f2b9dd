"""Every image of some shards once, for reference statistics."""

from typing import Any

import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader

from w2s_train.datamodule import ShardDataModule
from w2s_train.errors import UserError
from w2s_train.shards import ShardImages
from w2s_train.shards.index import find_shards
from w2s_train.shards.indexed import IndexedStore


class ReferenceImages(LightningDataModule):
    """Every image of some shards once, uint8, for reference statistics.

    Args:
        urls: Path, glob or brace pattern of shards of images.
        data: The data module of the run, which may have to make the shards first.
    """

    def __init__(self, urls: str, data: ShardDataModule) -> None:
        super().__init__()
        self.urls, self.data = urls, data

    def prepare_data(self) -> None:
        """As for a fit."""
        self.data.prepare_data()

    def predict_dataloader(self) -> DataLoader:
        """This process's batches: "image" (B, C, H, W) uint8, "place" and "encoding" lists of B."""
        assert self.trainer is not None
        storage = self.data.storage
        shards = find_shards(self.data.expand(self.urls, "urls"), storage)
        for shard in shards:
            if shard.damage:  # statistics of a part would pass for those of the whole
                raise UserError(f"urls={shard.url}: must be whole ({shard.loss()})")
        images = ShardImages(
            IndexedStore(shards, storage, flip=False),
            rank=self.trainer.global_rank,
            world_size=self.trainer.world_size,
        )
        size, workers = self.data.generation_batch_size, self.data.num_workers
        return DataLoader(images, size, num_workers=workers, collate_fn=_collate_images)


def _collate_images(rows: list[dict[str, Any]]) -> dict[str, Any]:
    shapes = sorted({tuple(row["image"].shape) for row in rows})
    if len(shapes) > 1:
        raise UserError(f"images={shapes}: must be of one shape (channels, height, width)")
    return {
        "image": torch.stack([row["image"] for row in rows]),
        "place": [row["place"] for row in rows],
        "encoding": [row["encoding"] for row in rows],
    }
