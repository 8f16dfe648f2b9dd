"""Images from networks: each is fixed by its seed, its label and the weights alone."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from w2s_train.autoencoder import Autoencoder
from w2s_train.errors import UserError
from w2s_train.guidance import Guidance
from w2s_train.models import Network, WeightAverage
from w2s_train.sampler import Sampler


class Setting(NamedTuple):
    """What one evaluation samples: which weights, guided how."""

    weights: str  # "ema", "ema 0.999" for a further average, "raw" for the live weights
    ema_decay: float | None  # None for live weights
    network: Network
    guidance: Guidance

    @property
    def name(self) -> str:
        """Weights, and the guidance if there is one."""
        guidance = self.guidance.describe()
        return self.weights if guidance == "none" else f"{self.weights}, {guidance}"

    def describe(self) -> dict[str, Any]:
        """For the record of a score."""
        guidance = self.guidance.describe()
        return {"weights": self.weights, "ema_decay": self.ema_decay, "guidance": guidance}


def all_settings(
    network: Network,
    averages: list[WeightAverage],
    scored: Sequence[str],
    guidances: list[Guidance],
) -> list[Setting]:
    """Every pair of weights and guidance; the first average, first guided, is the main one.

    Args:
        network: The live weights.
        averages: Of the network, the main one first.
        scored: "ema" for the averages, "raw" for the live weights, or both.
        guidances: At least one.
    """
    networks: list[tuple[str, float | None, Network]] = []
    if "ema" in scored:
        main, *more = averages
        made = main.std is not None  # after training
        name, decay = (f"ema std {main.std:g}", None) if made else ("ema", main.decay)
        networks.append((name, decay, main.module))
        networks += [(f"ema {average.decay:g}", average.decay, average.module) for average in more]
    if "raw" in scored:
        networks.append(("raw", None, network))
    return [Setting(*each, guidance) for each in networks for guidance in guidances]


@torch.no_grad()
def generate(
    setting: Setting,
    sampler: Sampler,
    autoencoder: Autoencoder,
    seeds: list[int],
    labels: list[int],
    *,
    shape: torch.Size,
    block: int,
    device: torch.device,
) -> Tensor:
    """Images (N, C, H, W) uint8 for N seeds and labels.

    Args:
        setting: Network and guidance.
        sampler: The solver.
        autoencoder: From the network's space to images.
        seeds: One per image.
        labels: One per image.
        shape: (C, H, W) of the network's input.
        block: Images per network evaluation. Seeds are cut or padded to it: kernels of some
            libraries round differently for some batch sizes.
        device: Where the network is.
    """
    images = []
    for i in range(0, len(seeds), block):
        rows = slice(i, i + block)
        padding = block - len(seeds[rows])
        padded = [list_[rows] + list_[i : i + 1] * padding for list_ in (seeds, labels)]
        # Every image has a generator of its own, on the host: its noise is the same on any device.
        generators = [torch.Generator().manual_seed(seed) for seed in padded[0]]
        draw = functools.partial(standard_normal, generators, shape, device)
        y = torch.tensor(padded[1], device=device)
        velocity = setting.guidance.seeded_field(setting.network, y, sampler.times(), padded[0])
        x = autoencoder.decode(sampler(velocity, draw(), draw).float())
        images.append(x[: block - padding])
    return torch.cat(images)


def standard_normal(
    generators: list[torch.Generator], shape: torch.Size, device: torch.device
) -> Tensor:
    """Noise (N, *shape), each row from its own generator on the host."""
    # Pinned, so that the copy waits in the device's queue, and the host does not: it launches the
    # evaluation of the step, and draws the noise while the device is busy with it.
    noise = torch.empty(len(generators), *shape, pin_memory=device.type == "cuda")
    for row, generator in zip(noise, generators, strict=True):
        row.normal_(generator=generator)
    return noise.to(device, non_blocking=True)


def parse_seeds(seeds: str) -> range:
    """FIRST:LAST as a range.

    Args:
        seeds: The last one is not included.

    Raises:
        UserError: It is not of that form, or holds none.
    """
    first, _, last = seeds.partition(":")
    if not (first.isdecimal() and last.isdecimal() and int(first) < int(last)):
        raise UserError(f"seeds={seeds}: must be FIRST:LAST with 0 <= FIRST < LAST, such as 0:64")
    return range(int(first), int(last))
