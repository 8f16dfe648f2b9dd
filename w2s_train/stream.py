"""An endless stream of training batches from webdataset shards.

It is a pure function of (seed, rank, worker, position): in epoch e the shards are permuted, dealt
out to the workers of all ranks and read through a bounded shuffle, with generators that depend on
(seed, e) and on the slot alone. A resumed run asks for the position where it stopped and gets the
batches that an uninterrupted run would have got.
"""

import glob
import io
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset as wds
from braceexpand import braceexpand
from PIL import Image
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from w2s_train.errors import UserError

Sample = dict[str, Any]
IMAGE_TYPES = ("png", "jpg", "jpeg", "webp")


def expand_urls(urls: str, name: str = "train_urls") -> list[str]:
    """Local shards that a path, a glob or a brace pattern names, sorted.

    Args:
        urls: The pattern.
        name: What the user calls it.

    Raises:
        UserError: The pattern names no file, or one that does not exist.
    """
    found = []
    for pattern in braceexpand(urls):
        matches = sorted(glob.glob(pattern)) if glob.has_magic(pattern) else [pattern]
        if not matches or not Path(matches[0]).is_file():
            raise UserError(f"{name}={urls}: must name existing files; {pattern} does not")
        found += matches
    return found


def decode(sample: Sample, num_classes: int) -> dict[str, Tensor]:
    """A sample of a shard as tensors.

    Images (``.png``, ``.jpg``, ``.jpeg``, ``.webp``) become float32 (C, H, W) in [-1, 1], grey ones
    with one channel; ``.npy`` arrays (latents) float32 as they are. ``.cls`` is the label as text.

    Raises:
        UserError: No image or label, or a label outside the classes; names key and shard.
    """
    where = f"sample {sample['__key__']} of {sample['__url__']}"
    label = int(sample["cls"]) if "cls" in sample else None
    if label is None or not 0 <= label < num_classes:
        raise UserError(f"label={label}: must be in [0, {num_classes - 1}] ({where})")
    if "npy" in sample:
        array = np.load(io.BytesIO(sample["npy"]), allow_pickle=False)
        return {"image": torch.from_numpy(array.astype(np.float32)), "label": torch.tensor(label)}
    kind = next((kind for kind in IMAGE_TYPES if kind in sample), None)
    if kind is None:
        raise UserError(f"no .npy and no image of a known type in {where}")
    image = Image.open(io.BytesIO(sample[kind]))
    pixels = np.array(image if image.mode == "L" else image.convert("RGB"))
    tensor = torch.from_numpy(pixels).float().div_(127.5).sub_(1)
    tensor = tensor.unsqueeze(0) if tensor.ndim == 2 else tensor.permute(2, 0, 1)
    return {"image": tensor, "label": torch.tensor(label)}


def read_shard(url: str) -> Iterator[Sample]:
    """The samples of one local shard, undecoded."""
    with open(url, "rb") as stream:
        source = [{"url": url, "stream": stream}]
        yield from wds.tariterators.group_by_keys(wds.tariterators.tar_file_expander(source))


class ShardImages(IterableDataset):
    """Every image of some shards once: this process's shards, one after another, nothing shuffled.

    Items are ``{"image": (C, H, W) float32 in [-1, 1], "place": (shard, number in the shard),
    "encoding": "png" and the like}``.

    Args:
        urls: Shards.
        rank: This process, of ``world_size``.
        world_size: Number of processes.
        num_classes: Labels are 0 ... num_classes - 1.
    """

    def __init__(self, urls: list[str], *, rank: int, world_size: int, num_classes: int) -> None:
        self.urls, self.rank, self.world_size = urls, rank, world_size
        self.num_classes = num_classes

    def __iter__(self) -> Iterator[Sample]:
        info = get_worker_info()
        workers, worker = (info.num_workers, info.id) if info else (1, 0)
        slot, slots = self.rank * workers + worker, self.world_size * workers
        for shard in range(slot, len(self.urls), slots):
            for number, sample in enumerate(read_shard(self.urls[shard])):
                encoding = next((kind for kind in IMAGE_TYPES if kind in sample), None)
                if encoding is None:
                    types = ", ".join(IMAGE_TYPES)
                    raise UserError(f"urls={self.urls[shard]}: must hold images, one of {types}")
                image = decode(sample, self.num_classes)["image"]
                yield {"image": image, "place": (shard, number), "encoding": encoding}


class ShardStream(IterableDataset):
    """Endless shuffled batches for one rank.

    Args:
        urls: Shards, at least one per worker of all ranks.
        num_classes: Labels are 0 ... num_classes - 1.
        batch_size: Rows per batch.
        seed: Of the order.
        rank: This process, of ``world_size``.
        world_size: Number of processes.
        start: Batches of this rank to leave out, as a resumed run does.
        shuffle: Samples held for shuffling.
        flip: Mirror every other image at random.
        in_memory: Keep decoded samples: for data sets that fit.
    """

    def __init__(
        self,
        urls: list[str],
        *,
        num_classes: int,
        batch_size: int,
        seed: int,
        rank: int,
        world_size: int,
        start: int,
        shuffle: int,
        flip: bool,
        in_memory: bool,
    ) -> None:
        self.urls, self.num_classes, self.batch_size, self.seed = (
            urls,
            num_classes,
            batch_size,
            seed,
        )
        self.rank, self.world_size, self.start = rank, world_size, start
        self.shuffle, self.flip, self.in_memory = shuffle, flip, in_memory
        self.decoded: dict[tuple[str, str], dict[str, Tensor]] = {}
        self.shards: dict[str, list[Sample]] = {}

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        info = get_worker_info()
        workers, worker = (info.num_workers, info.id) if info else (1, 0)
        # The loader takes batches from its workers in turn, beginning with worker 0: that worker
        # must go on where batch `start` would have come from.
        slot = (worker + self.start) % workers
        done = len(range(slot, self.start, workers))
        samples = self._samples(self.rank * workers + slot, self.world_size * workers)
        flips = np.random.default_rng((self.seed, self.rank, slot, 1))
        for i in itertools.count():
            rows = [next(samples) for _ in range(self.batch_size)]
            mirrored = flips.random(self.batch_size) < (0.5 if self.flip else 0.0)
            if i >= done:
                yield self._batch(rows, mirrored)

    def _samples(self, slot: int, slots: int) -> Iterator[Sample]:
        """Undecoded samples of one slot, epoch after epoch, in a shuffled order."""
        for epoch in itertools.count():
            order = np.random.default_rng((self.seed, epoch)).permutation(len(self.urls))
            rng = np.random.default_rng((self.seed, epoch, slot))
            held: list[Sample] = []
            for index in order[slot::slots]:
                for sample in self._read(self.urls[index]):
                    held.append(sample)
                    if len(held) > self.shuffle:
                        yield held.pop(int(rng.integers(len(held))))
            for i in rng.permutation(len(held)):
                yield held[i]

    def _read(self, url: str) -> Iterator[Sample]:
        if not self.in_memory:
            yield from read_shard(url)
            return
        if url not in self.shards:
            self.shards[url] = list(read_shard(url))
        yield from self.shards[url]

    def _batch(self, rows: list[Sample], mirrored: np.ndarray) -> dict[str, Tensor]:
        decoded = [self._decode(row) for row in rows]
        pairs = zip(decoded, mirrored, strict=True)
        images = [d["image"].flip(-1) if mirror else d["image"] for d, mirror in pairs]
        return {"image": torch.stack(images), "label": torch.stack([d["label"] for d in decoded])}

    def _decode(self, row: Sample) -> dict[str, Tensor]:
        if not self.in_memory:
            return decode(row, self.num_classes)
        key = (row["__url__"], row["__key__"])
        if key not in self.decoded:
            self.decoded[key] = decode(row, self.num_classes)
        return self.decoded[key]
