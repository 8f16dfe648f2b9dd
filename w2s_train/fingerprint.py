"""Whether processes hold the same tensors, bit for bit, and whether all numbers are finite."""

from typing import NamedTuple

import torch
from torch import Tensor

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
PERIOD = 65_521  # the largest prime below 2^16


class Fingerprint(NamedTuple):
    """Of a state dict: one row per tensor.

    Args:
        names: Of the tensors.
        sums: (tensors, 3) int64: the sum of the bits read as integers, the same with weights that
            depend on the place, and 1 where every number is finite.
    """

    names: list[str]
    sums: Tensor

    def not_finite(self) -> list[str]:
        """Names of tensors with numbers that are not finite."""
        return [name for name, row in zip(self.names, self.sums, strict=True) if not row[2]]

    def differences(self, other: "Fingerprint") -> list[str]:
        """Names of tensors that are not those of ``other``."""
        pairs = zip(self.names, self.sums, other.sums, strict=True)
        return [name for name, mine, theirs in pairs if not torch.equal(mine, theirs)]


@torch.no_grad()
def fingerprint(state: dict[str, object]) -> Fingerprint:
    """The fingerprint of the tensors of a state dict, made where they are and read once."""
    tensors = {name: x for name, x in state.items() if isinstance(x, Tensor)}
    sums = [_sums(x) for x in tensors.values()]
    return Fingerprint(list(tensors), torch.stack(sums).cpu())


def _sums(x: Tensor) -> Tensor:
    bits = x.contiguous().flatten().view(BITS[x.element_size()]).long()
    weights = torch.arange(len(bits), device=x.device) % PERIOD + 1
    return torch.stack([bits.sum(), (bits * weights).sum(), torch.isfinite(x).all().long()])
