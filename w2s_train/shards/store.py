"""Random access to the samples of shards."""

import abc
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from w2s_train.errors import UserError
from w2s_train.shards.order import Places

CHUNK = 256  # samples that are read together when all of them are


class Rows(NamedTuple):
    """Samples as they are stored.

    Args:
        image: (B, C, H, W): pixels as uint8, or arrays of their own type and shape. (B, 0) if none
            of them could be read.
        label: (B,) int64.
        bad: Why a sample could not be read, by its number in the batch; its image means nothing.
    """

    image: Tensor
    label: Tensor
    bad: dict[int, str]


class Store(abc.ABC):
    """Samples of shards, numbered from 0 through all of them."""

    @abc.abstractmethod
    def read(self, places: Places) -> Rows:
        """Samples by number, mirrored where ``places`` says so.

        Raises:
            UserError: Their shapes differ.
        """

    @abc.abstractmethod
    def name(self, row: int) -> tuple[str, str]:
        """Shard and key of a sample."""

    @abc.abstractmethod
    def fetch(self, shard: int) -> None:
        """Have a shard at hand that will be read soon."""

    @abc.abstractmethod
    def stores_mirrored(self) -> bool:
        """Whether mirrored samples are stored ones; known when all samples have been read once."""


class MemoryStore(Store):
    """All samples of another store, decoded.

    Args:
        source: Read here, and never again.
        samples: How many it holds.
        flip: Samples are going to be mirrored.

    Raises:
        UserError: None of them can be read, or their shapes differ.
    """

    def __init__(self, source: Store, samples: int, *, flip: bool) -> None:
        self.source, self.flip = source, flip
        self.plain = self._read_all(samples, mirrored=False)
        # Images are mirrored when needed, which costs little; of arrays the mirrored ones are kept.
        stored = flip and source.stores_mirrored()
        self.flipped = self._read_all(samples, mirrored=True) if stored else None

    def _read_all(self, samples: int, *, mirrored: bool) -> Rows:
        image: Tensor | None = None
        label, bad = torch.zeros(samples, dtype=torch.int64), dict[int, str]()
        firsts = range(0, samples, CHUNK)
        for first in tqdm(firsts, "reading samples", delay=5, disable=None, leave=False):
            numbers = np.arange(first, min(first + CHUNK, samples))
            part = self.source.read(Places(numbers, np.full(len(numbers), mirrored)))
            bad |= {first + i: reason for i, reason in part.bad.items()}
            label[first : first + len(numbers)] = part.label
            if len(part.bad) == len(numbers):
                continue
            if image is None:
                image = part.image.new_zeros(samples, *part.image.shape[1:])
            if image.shape[1:] != part.image.shape[1:] or image.dtype != part.image.dtype:
                raise UserError(
                    f"images={tuple(image.shape[1:])}, {tuple(part.image.shape[1:])}: must be of "
                    f"one shape and type ({' of '.join(self.name(first)[::-1])} differs)"
                )
            image[first : first + len(numbers)] = part.image
        if image is None:
            reason = next(iter(bad.values()), "there are none")
            raise UserError(f"train_urls: must hold a readable sample ({reason})")
        return Rows(image, label, bad)

    def read(self, places: Places) -> Rows:
        image, label = self.plain.image[places.rows], self.plain.label[places.rows]
        mirrored = places.mirrored & self.flip
        turn = torch.from_numpy(mirrored)
        kept = [self.plain.bad] * len(mirrored)
        if self.flipped is None:
            image[turn] = image[turn].flip(-1)
        else:
            image[turn] = self.flipped.image[places.rows[mirrored]]
            kept = [self.flipped.bad if turned else self.plain.bad for turned in mirrored]
        found = enumerate(zip(kept, places.rows.tolist(), strict=True))
        return Rows(image, label, {i: bad[row] for i, (bad, row) in found if row in bad})

    def name(self, row: int) -> tuple[str, str]:
        return self.source.name(row)

    def fetch(self, shard: int) -> None:
        """Nothing: everything is here."""

    def stores_mirrored(self) -> bool:
        return self.flipped is not None
