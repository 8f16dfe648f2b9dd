"""The images of one shard, in their order, whole or with an error that names what is wrong."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from w2s_train.errors import UserError
from w2s_train.shards.samples import decode_image, encoded_image, read_shard
from w2s_train.shards.whole import check_whole

DECODERS = 2  # threads; a batch is decoded while the one before it is encoded


class Image(NamedTuple):
    """A sample: its key, its class and its pixels (C, H, W) uint8."""

    key: str
    label: int
    pixels: Tensor


class Waiting(NamedTuple):
    """A sample whose image is being decoded."""

    key: str
    label: int
    pixels: Future[Tensor]


class ShardImages:
    """Iterates once over the images of a shard.

    Args:
        shard: A local file.
        channels: C; grey images are repeated to them. None: as they are.
        size: (H, W) that every image must have; None: any.
        max_broken: Share of the images that may be undecodable; they are left out.

    Raises:
        UserError: More are, or a sample has no image, no label, or an image of another shape.
    """

    def __init__(
        self, shard: Path, channels: int | None, size: tuple[int, int] | None, max_broken: float
    ) -> None:
        self.shard, self.channels, self.size = shard, channels, size
        self.max_broken = max_broken
        self.broken: list[str] = []  # keys

    def __iter__(self) -> Iterator[Image]:
        samples = 0
        pool = ThreadPoolExecutor(DECODERS)
        waiting: deque[Waiting] = deque()
        try:
            for sample in read_shard(self.shard):
                samples += 1
                content, label = encoded_image(sample, self.shard)
                pixels = pool.submit(decode_image, content)
                waiting.append(Waiting(sample["__key__"], label, pixels))
                if len(waiting) > 64:
                    yield from self._image(waiting.popleft())
            while waiting:
                yield from self._image(waiting.popleft())
        finally:
            pool.shutdown(cancel_futures=True)
        if len(self.broken) > self.max_broken * samples:
            raise UserError(
                f"max_broken={self.max_broken}: {len(self.broken)} of {samples} images of "
                f"{self.shard} cannot be decoded, the first is {self.broken[0]}"
            )

    def _image(self, waiting: Waiting) -> list[Image]:
        """None or one."""
        key = waiting.key
        try:
            pixels = waiting.pixels.result()
        except Exception as error:  # decoders raise almost anything on damaged bytes
            self.broken.append(key)
            if self.max_broken == 0:
                raise UserError(
                    f"max_broken=0: image {key} of {self.shard} cannot be decoded ({error}); "
                    "a share above 0 leaves such images out"
                ) from error
            return []
        return [Image(key, waiting.label, self._checked(key, pixels))]

    def _checked(self, key: str, pixels: Tensor) -> Tensor:
        channels, *size = pixels.shape
        if self.size is not None and tuple(size) != self.size:
            wanted, found = ("x".join(map(str, each)) for each in (self.size, size))
            raise UserError(
                f"source={self.shard}: must hold images of {wanted} pixels, as the first one; "
                f"{key} has {found}"
            )
        if self.channels is None or channels == self.channels:
            return pixels
        if channels != 1:
            raise UserError(
                f"source={self.shard}: must hold images of {self.channels} channel(s), as the "
                f"autoencoder takes; {key} has {channels}"
            )
        return pixels.expand(self.channels, -1, -1)


def first_size(shards: list[Path], max_broken: float) -> tuple[int, int]:
    """(H, W) of the first image.

    Raises:
        UserError: There is none.
    """
    for shard in shards:
        check_whole(shard)
        for image in ShardImages(shard, None, None, max_broken):
            return image.pixels.shape[1], image.pixels.shape[2]
    raise UserError(f"source={shards[0]}: must hold images, there are none")


def batched(images: ShardImages, size: int) -> Iterator[tuple[list[Image], Tensor]]:
    """Up to ``size`` images at a time, and their pixels (B, C, H, W) uint8."""
    batch: list[Image] = []
    for image in images:
        batch.append(image)
        if len(batch) == size:
            yield batch, torch.stack([each.pixels for each in batch])
            batch = []
    if batch:
        yield batch, torch.stack([each.pixels for each in batch])
