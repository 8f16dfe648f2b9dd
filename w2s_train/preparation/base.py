"""Where images come from: in shards, or one by one and dealt out to shards."""

import functools
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from w2s_train.errors import UserError
from w2s_train.shards.samples import MOST_CLASSES

Identity = dict[str, str | int]


class Item(NamedTuple):
    """One image that is to go into a shard.

    Args:
        key: Name of the sample.
        label: Its class.
        name: What the user knows it by: a file, a row.
        load: Gives the encoded image; raises OSError if it cannot be read.
    """

    key: str
    label: int
    name: str
    load: Callable[[], bytes]


class Images(ABC):
    """Labelled images that can be read in any order.

    Args:
        labels: (N,) int64, indices into ``classes``.
        classes: Names of the classes; empty if they have none.
        identity: What tells this data from other data.
        notes: What the summary should say of them.
    """

    labels: np.ndarray
    classes: list[str]
    identity: Identity
    notes: list[str]

    @abstractmethod
    def name(self, index: int) -> str:
        """What the user knows an image by."""

    @abstractmethod
    def content(self, index: int) -> bytes:
        """An encoded image; raises OSError if it cannot be read."""


class Source(ABC):
    """Images in shards. What a shard holds depends on the input alone, not on who reads it.

    Args:
        classes: Names of the classes; empty if they are not known.
        identity: What tells this input, and how it is dealt out, from others.
        notes: What the summary should say of it.
    """

    classes: list[str]
    identity: Identity
    notes: list[str]

    @abstractmethod
    def __len__(self) -> int:
        """Number of shards."""

    @abstractmethod
    def read(self, shard: int) -> Iterator[Item]:
        """The images of one shard, in their order."""


class Dealt(Source):
    """Images shuffled once, so that every shard has some of all classes.

    Args:
        images: The images.
        per_shard: Images per shard; the last one has what is left.
        seed: Of the order.
    """

    def __init__(self, images: Images, *, per_shard: int, seed: int) -> None:
        self.images, self.per_shard = images, per_shard
        # RandomState, and not a Generator: NumPy promises that its numbers stay the same.
        self.order = np.random.RandomState(seed).permutation(len(images.labels))
        self.classes, self.notes = images.classes, images.notes
        self.identity = {
            **images.identity,
            "items": len(self.order),
            "per_shard": per_shard,
            "shuffle_seed": seed,
        }

    def __len__(self) -> int:
        return -(-len(self.order) // self.per_shard)

    def read(self, shard: int) -> Iterator[Item]:
        start = shard * self.per_shard
        for place, index in enumerate(self.order[start : start + self.per_shard].tolist(), start):
            load = functools.partial(self.images.content, index)
            yield Item(
                f"{place:08d}", int(self.images.labels[index]), self.images.name(index), load
            )


def digest(parts: Iterable[str]) -> str:
    """Sixteen hexadecimal digits that stand for these texts."""
    sha256 = hashlib.sha256()
    for part in parts:
        sha256.update(part.encode(errors="surrogateescape") + b"\0")
    return sha256.hexdigest()[:16]


def check_labels(labels: Sequence[int], classes: list[str], name: str) -> None:
    """Refuse labels that are no classes.

    Args:
        labels: Of all images, of any size.
        classes: Names of the classes; empty if they have none.
        name: What a label's place is called, such as "row".

    Raises:
        UserError: One is negative or too large; names its place.
    """
    number = len(classes) or MOST_CLASSES
    for place, label in enumerate(labels):
        if not 0 <= label < number:
            allowed = "at least 0" if label < 0 else f"in [0, {number - 1}]"
            raise UserError(f"label={label}: must be {allowed} ({name} {place})")
