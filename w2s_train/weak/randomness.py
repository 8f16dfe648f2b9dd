"""Where a random weak source gets its draws from: one door in training, another at sampling."""

import abc

import numpy as np
import torch
from torch import Tensor


class Randomness(abc.ABC):
    """What one weak pass over B rows may draw."""

    @abc.abstractmethod
    def numbers(self, n: int) -> Tensor:
        """Uniform in [0, 1), float32 (B, n), on the device of the rows; anew at each call."""

    @abc.abstractmethod
    def choice(self, n: int) -> int:
        """A whole number below ``n``, for all rows of the pass; to be called once in it."""


class Drawn(Randomness):
    """From torch's global generators, which a run seeds anew at each batch: it resumes bitwise.

    The choice comes from the host's, so that nobody waits for the device.

    Args:
        rows: Number of rows B.
        device: Where they are.
    """

    def __init__(self, rows: int, device: torch.device) -> None:
        self.rows, self.device = rows, device

    def numbers(self, n: int) -> Tensor:
        return torch.rand(self.rows, n, device=self.device)

    def choice(self, n: int) -> int:
        return int(torch.randint(n, ()).numpy())


class Seeded(Randomness):
    """At sampling: an image depends on its seed, and not on its neighbours or their number.

    Each image has a generator for its numbers, on the host and beside the one of its noise, which
    stays as it is without guidance. One choice serves a pass with many images, so it does not
    depend on their seeds: the time ``t`` of the evaluation fixes it, alike for all images.

    Args:
        seeds: One per row.
        device: Where the rows are.
    """

    def __init__(self, seeds: list[int], device: torch.device) -> None:
        self.generators = [torch.Generator().manual_seed(_hashed(1, seed)) for seed in seeds]
        self.device, self.t = device, 1.0

    def at(self, t: float) -> "Seeded":
        """Itself, for an evaluation at time ``t``."""
        self.t = t
        return self

    def numbers(self, n: int) -> Tensor:
        numbers = torch.empty(len(self.generators), n, pin_memory=self.device.type == "cuda")
        for row, generator in zip(numbers, self.generators, strict=True):
            row.uniform_(generator=generator)
        return numbers.to(self.device, non_blocking=True)

    def choice(self, n: int) -> int:
        return _hashed(2, round(self.t * 2**32)) % n


def _hashed(*key: int) -> int:
    """A number of 32 bits that looks random."""
    return int(np.random.SeedSequence([part % 2**64 for part in key]).generate_state(1)[0])
