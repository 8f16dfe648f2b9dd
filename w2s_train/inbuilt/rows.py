"""Which scales the rows of a batch get.

Each source leaves out a share of the rows, by itself. On the others, those that act on a row share
a total: it is drawn by the law of the most cautious of them, the one whose upper end is smallest,
and split in proportion to independent exponential numbers, that is uniformly. So the sum of the
scales of a row, whose guidance is 1 / (1 - sum), never exceeds that end.
"""

import hashlib
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from w2s_train.inbuilt.laws import Drawn
from w2s_train.timesteps import spread


def own_generator(device: torch.device) -> torch.Generator:
    """A generator for scales: others draw the same whether or not there is one.

    It depends on where the global generator of the device stands, which it leaves there: so on
    seed, process and batch (`running.samples.reseed`), and on all that was drawn before.
    """
    on_host = device.type == "cpu"
    state = (
        torch.get_rng_state() if on_host else torch.get_device_module(device).get_rng_state(device)
    )
    digest = hashlib.blake2b(state.numpy().tobytes(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest) >> 1)


class Acting(Protocol):
    """What is needed of a segment."""

    name: str
    only_labelled: bool
    drawn: Drawn | None

    def contains(self, t: Tensor) -> Tensor: ...  # noqa: D102
    def factor(self, step: Any) -> float: ...  # noqa: D102


def scales_of(
    segments: Sequence[Acting], t: Tensor, labelled: Tensor, step: Any
) -> dict[str, Tensor]:
    """The scales (B,) of every segment that draws its own, by name; 0 where it does not act.

    Args:
        segments: Those that do.
        t: Timesteps (B,).
        labelled: Which rows (B,) have a label.
        step: Where training stands; schedules are applied, and the network is told what results.
    """
    if not segments:
        return {}
    laws = [segment.drawn for segment in segments if segment.drawn]
    factors = [segment.factor(step) for segment in segments]
    allowed = [s.contains(t) & (labelled | (not s.only_labelled)) for s in segments]
    acts = [mask & (factor > 0) for mask, factor in zip(allowed, factors, strict=True)]
    scales = draw_scales(laws, torch.stack(acts, 1), own_generator(t.device))
    return {s.name: scales[:, k] * factors[k] for k, s in enumerate(segments)}


def draw_scales(laws: Sequence[Drawn], allowed: Tensor, generator: torch.Generator) -> Tensor:
    """Scales (B, K) of K sources, 0 where one does not act.

    Args:
        laws: Of the K sources.
        allowed: (B, K) bool, where a source may act: in its range, with a label if it needs one.
        generator: What is drawn from.
    """
    rows, device = len(allowed), allowed.device
    left_out = [spread(rows, law.plain, device, generator) for law in laws]
    acts = allowed & ~torch.stack(left_out, 1)
    ends = torch.stack([torch.full((rows,), law.high, device=device) for law in laws], 1)
    cautious = torch.where(acts, ends, torch.inf).argmin(1, keepdim=True)
    u = torch.rand(rows, device=device, generator=generator)
    totals = torch.stack([law.quantile(u) for law in laws], 1)
    parts = torch.empty(rows, len(laws), device=device).exponential_(generator=generator)
    parts = torch.where(acts, parts, 0.0)
    sums = parts.sum(1, keepdim=True).clamp(min=torch.finfo(parts.dtype).tiny)
    return parts / sums * totals.gather(1, cautious)
