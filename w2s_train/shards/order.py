"""What is trained on and what is generated, in which order, and which of it a process does.

The training stream is a pure function of seed, epoch and position. Position p is the p-th sample of
the whole run, over all processes; epoch e = p // N holds each of N samples once. In every epoch the
shards are permuted and cut into windows of about `window` samples, and the samples of a window are
permuted. The order knows nothing of processes, workers or batches: who reads which positions does
not change what lies there, so a run may stop at any position and go on from it on another number of
processes. `Positions` deals positions out to processes, `Remaining` the images of a plan.
"""

import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from torch.utils.data import Dataset, Sampler

GOLDEN = 0x9E3779B97F4A7C15  # (sqrt(5) - 1) / 2 times 2^64, to the nearest odd number


class Places(NamedTuple):
    """Samples at consecutive positions: rows (n,) in 0 ... N - 1, and which are to be mirrored."""

    rows: np.ndarray
    mirrored: np.ndarray

    @classmethod
    def of(cls, rows: Sequence[int], *, mirrored: bool = False) -> "Places":
        """Of these rows, all of them mirrored or none."""
        return cls(np.asarray(rows, np.int64), np.full(len(rows), mirrored))

    @classmethod
    def join(cls, parts: Sequence["Places"]) -> "Places":
        """One after another."""
        return cls(*(np.concatenate(each) for each in zip(*parts, strict=True)))


class Epoch(NamedTuple):
    """Shards of an epoch in its order, where each begins, and where its windows begin."""

    shards: np.ndarray
    starts: np.ndarray
    windows: np.ndarray


class StreamOrder:
    """Which sample lies at which position.

    Args:
        counts: Samples per shard, not all 0.
        seed: Of the order, at least 0.
        window: Samples within which rows are shuffled: whole shards, the last of which may exceed
            it. 0 leaves the rows of a shard as they are.
        repeated: The first so many positions come again and again; 0 is all of them, endlessly.
    """

    def __init__(self, counts: Sequence[int], *, seed: int, window: int, repeated: int = 0) -> None:
        self.repeated = repeated
        self.counts, self.seed, self.window = np.asarray(counts, np.int64), seed, window
        self.firsts = np.cumsum(self.counts) - self.counts
        self.samples = int(self.counts.sum())
        self._epoch: tuple[int, Epoch] | None = None
        self._window: tuple[tuple[int, int], Places] | None = None

    def at(self, first: int, last: int) -> Places:
        """Samples at positions ``first`` ... ``last`` - 1."""
        parts, position = [], first
        while position < last:
            epoch, place = self._place(position)
            start, places = self._window_at(epoch, place)
            left = last - position
            if self.repeated:
                left = min(left, self.repeated - position % self.repeated)
            part = slice(place - start, min(place - start + left, len(places.rows)))
            parts.append(Places(places.rows[part], places.mirrored[part]))
            position += part.stop - part.start
        return Places.join(parts)

    def substitute(self, position: int, attempt: int) -> int:
        """A row to take in place of the one at ``position``, which cannot be read."""
        epoch, place = self._place(position)
        generator = np.random.default_rng((self.seed, epoch, place, attempt + 1))
        return int(generator.integers(self.samples))

    def upcoming(self, position: int) -> list[int]:
        """Shards of the window after the one that ``position`` lies in."""
        epoch, place = self._place(position)
        start, places = self._window_at(epoch, place)
        following = epoch * self.samples + start + len(places.rows)
        epoch, place = divmod(following, self.samples)
        order = self._epoch_order(epoch)
        last = np.append(order.windows, self.samples)
        last = last[np.searchsorted(last, place, "right")]
        inside = (order.starts >= place) & (order.starts < last)
        return order.shards[inside].tolist()

    def _place(self, position: int) -> tuple[int, int]:
        """Epoch, and number within it, of what lies at a position."""
        return divmod(position % self.repeated if self.repeated else position, self.samples)

    def _epoch_order(self, epoch: int) -> Epoch:
        if self._epoch is None or self._epoch[0] != epoch:
            shards = np.random.default_rng((self.seed, epoch, 0)).permutation(len(self.counts))
            shards = shards[self.counts[shards] > 0]
            starts = np.cumsum(self.counts[shards]) - self.counts[shards]
            numbers = starts // self.window if self.window else np.arange(len(starts))
            windows = starts[np.append(True, np.diff(numbers) > 0)]
            self._epoch = epoch, Epoch(shards, starts, windows)
        return self._epoch[1]

    def _window_at(self, epoch: int, place: int) -> tuple[int, Places]:
        """The window of an epoch that holds its sample number ``place``, and where it begins."""
        order = self._epoch_order(epoch)
        number = int(np.searchsorted(order.windows, place, "right")) - 1
        start = int(order.windows[number])
        if self._window is None or self._window[0] != (epoch, start):
            end = order.windows[number + 1] if number + 1 < len(order.windows) else self.samples
            inside = (order.starts >= start) & (order.starts < end)
            rows = np.concatenate(
                [self.firsts[s] + np.arange(self.counts[s]) for s in order.shards[inside]]
            )
            generator = np.random.default_rng((self.seed, epoch, 1 + number))
            mirrored = generator.random(len(rows)) < 0.5
            if self.window:
                rows = generator.permutation(rows)
            self._window = (epoch, start), Places(rows, mirrored)
        return start, self._window[1]


class Positions(Sampler[range]):
    """The positions of each batch of one process, endlessly: the processes take batches in turn.

    It lives in the main process, so that whoever reads a batch need not know where the run stands.

    Args:
        position: Gives the samples that all processes have had; asked each time that one begins to
            iterate, as at every virtual epoch.
        batch_size: Rows per batch.
        rank: This process, of ``world_size``.
        world_size: Number of processes.
    """

    def __init__(
        self, position: Callable[[], int], batch_size: int, rank: int, world_size: int
    ) -> None:
        self.position, self.batch_size = position, batch_size
        self.rank, self.world_size = rank, world_size

    def __iter__(self) -> Iterator[range]:
        size = self.batch_size
        first = self.position() + self.rank * size  # of now, not of the first batch's time
        return (range(p, p + size) for p in itertools.count(first, self.world_size * size))


class Shares:
    """Labels with the frequencies of a data set, each fixed by its seed alone.

    With the N samples of the data sorted by class, seed s gets the label of the sample at place

        floor(N frac(s a)),   a = (sqrt(5) - 1) / 2 in 64 bits.

    Multiples of the golden ratio fill the unit interval evenly (Knuth, The Art of Computer
    Programming 3, 6.4), so that any range of seeds has the frequencies, and nearly without noise.

    Args:
        counts: (K,) samples of each class, not all 0.
    """

    def __init__(self, counts: np.ndarray) -> None:
        self.counts, self.ends = counts, np.cumsum(counts)

    def of(self, seed: int) -> int:
        """The label of an image."""
        place = (seed * GOLDEN % 2**64 * int(self.ends[-1])) >> 64
        return int(np.searchsorted(self.ends, place, "right"))

    def describe(self) -> str:
        """For the record of a score."""
        digest = hashlib.sha256(np.asarray(self.counts, "<i8").tobytes()).hexdigest()
        return f"as in training, counts sha256:{digest[:12]}"


def total_variation(counts: np.ndarray, other: np.ndarray) -> float:
    """Half the sum of the differences of two frequencies (K,), in [0, 1]: 0 if they are equal."""
    return float(np.abs(counts / counts.sum() - other / other.sum()).sum() / 2)


class GenerationPlan(Dataset):
    """Item i is the i-th seed, with the i-th of the labels, which repeat, or that of its seed.

    Args:
        seeds: One per image.
        labels: Of the first images, then they start over; or `Shares`.
        setting: Which of the module's settings generates them.
    """

    def __init__(
        self, seeds: Sequence[int], labels: Sequence[int] | Shares, setting: int = 0
    ) -> None:
        self.seeds, self.labels, self.setting = seeds, labels, setting

    def __len__(self) -> int:
        return len(self.seeds)

    def __getitem__(self, index: int) -> dict[str, int]:
        seed, setting, labels = self.seeds[index], self.setting, self.labels
        if isinstance(labels, Shares):
            label = labels.of(seed)
        else:
            label = labels[index % len(labels)]
        return {"index": index, "seed": seed, "label": label, "setting": setting}


class Remaining(Sampler[int]):
    """This process's share of what a plan has left: nothing padded, nothing twice.

    Args:
        plan: The plan.
        rank: This process, of ``world_size``.
        world_size: Number of processes.
    """

    def __init__(self, plan: GenerationPlan, rank: int, world_size: int) -> None:
        self.plan, self.rank, self.world_size = plan, rank, world_size
        self.done = set[int]()  # indices that need no image any more

    def __iter__(self) -> Iterator[int]:  # a generator: looks at `done` when the first is asked for
        left = [i for i in range(len(self.plan)) if i not in self.done]
        yield from left[self.rank :: self.world_size]

    def __len__(self) -> int:
        """Of the whole plan; fewer come where some are done."""
        return len(range(self.rank, len(self.plan), self.world_size))
