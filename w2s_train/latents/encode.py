"""Shards of images to shards of posterior moments, one at a time on one device."""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from w2s_train.errors import UserError
from w2s_train.latents.images import Image, ShardImages, batched
from w2s_train.latents.kl import load_autoencoder, split_moments, weights_digest
from w2s_train.latents.locks import claim
from w2s_train.shards.samples import FLIPPED, to_float
from w2s_train.shards.table import ShardTable
from w2s_train.shards.whole import check_whole
from w2s_train.shards.writer import ShardWriter, is_written, table_path

FIELDS = {"float16": "npy", "bfloat16": "bf16.npy"}  # by type of the stored numbers
PRECISIONS = ("float32", "bfloat16")
MADE_OF = "source_bytes"  # in the table of a shard of latents: size of that of the images


@dataclass(frozen=True)
class Settings:
    """How images are encoded.

    Args:
        autoencoder: Folder or hub name.
        revision: Of the hub; None is its main branch.
        dtype: Of the stored moments, a key of `FIELDS`.
        flip: Store the moments of the mirrored image, too.
        precision: Of the computation, one of `PRECISIONS`.
        batch_size: Images at a time.
        max_broken: Share of a shard's images that may be undecodable.
        size: (H, W) of the images.
    """

    autoencoder: str
    revision: str | None
    dtype: str
    flip: bool
    precision: str
    batch_size: int
    max_broken: float
    size: tuple[int, int]


class Task(NamedTuple):
    """A shard to read, and the one to write."""

    source: Path
    target: Path


class Facts(NamedTuple):
    """What is known once the autoencoder is loaded."""

    weights: str  # digest
    image_shape: tuple[int, int, int]
    latent_shape: tuple[int, int, int]  # (C, h, w)


def is_encoded(task: Task) -> bool:
    """Whether the task is done.

    Raises:
        UserError: It is, but for another file of the source's name.
    """
    if not is_written(task.target):
        return False
    size, made_of = task.source.stat().st_size, ShardTable.load(table_path(task.target)).sums
    if made_of.get(MADE_OF) != size:
        raise UserError(
            f"output={task.target}: must be of {task.source} with its {size:,} bytes, it is of "
            f"another file of {made_of.get(MADE_OF, 0):,}; delete it to encode it again"
        )
    return True


class Encoder:
    """Encodes on one device, in this process, which it sets up for equal results everywhere.

    Raises:
        UserError: The autoencoder cannot be loaded, or does not take images of this size.
    """

    def __init__(self, settings: Settings, device: str) -> None:
        # How sums are split over threads changes the last bits, and so would a search for the
        # fastest kernels; TensorFloat-32 would change more than these.
        torch.set_num_threads(1)
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        self.settings, self.device = settings, torch.device(device)
        self.dtype = getattr(torch, settings.dtype)
        vae = load_autoencoder(settings.autoencoder, "autoencoder", settings.revision)
        config, (height, width) = vae.config, settings.size
        factor = 2 ** (len(config.block_out_channels) - 1)
        if height % factor or width % factor:
            raise UserError(
                f"source: must hold images whose height and width are multiples of {factor}, the "
                f"factor of {settings.autoencoder}; they are {height}x{width}"
            )
        latent = (config.latent_channels, height // factor, width // factor)
        self.facts = Facts(weights_digest(vae), (config.in_channels, height, width), latent)
        self.vae = vae.to(self.device)

    def run(self, tasks: list[Task]) -> Iterator[int]:
        """Encode shards; yields the number of images of each batch that is done."""
        for task in tasks:
            yield from self.encode_shard(task)

    def encode_shard(self, task: Task) -> Iterator[int]:
        """As `run`, for one."""
        check_whole(task.source)
        channels, *_ = self.facts.image_shape
        settings = self.settings
        images = ShardImages(task.source, channels, settings.size, settings.max_broken)
        with claim(task.target), ShardWriter(task.target) as writer:
            for batch, pixels in batched(images, settings.batch_size):
                self._write(writer, batch, pixels, task.source)
                yield len(batch)
            writer.add("broken", np.array(len(images.broken)))
            writer.add(MADE_OF, np.array(task.source.stat().st_size))

    def _write(self, writer: ShardWriter, batch: list[Image], pixels: Tensor, source: Path) -> None:
        x = to_float(pixels.to(self.device))
        kind = FIELDS[self.settings.dtype]
        fields = {kind: self.moments(x)}
        if self.settings.flip:
            fields[FLIPPED + kind] = self.moments(x.flip(-1))
        for moments in fields.values():
            self._check_finite(moments, batch, source)
            for name, value in sums(moments).items():
                writer.add(name, value)
        for row, image in enumerate(batch):
            contents = {name: array_bytes(moments[row]) for name, moments in fields.items()}
            writer.write(image.key, image.label, **contents)

    @torch.no_grad()
    def moments(self, x: Tensor) -> Tensor:
        """Of the posterior (B, 2C, h, w), as they are stored, for images (B, C, H, W) float32."""
        lower = self.settings.precision == "bfloat16"
        try:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=lower):
                moments = self.vae.encode(x).latent_dist.parameters
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"batch_size={self.settings.batch_size}: must be smaller, {self.device} has not "
                "enough memory"
            ) from error
        return moments.to(self.dtype).cpu()

    def _check_finite(self, moments: Tensor, batch: list[Image], source: Path) -> None:
        finite = moments.isfinite().flatten(1).all(1)
        if not finite.all():
            key = batch[int(finite.int().argmin())].key
            raise UserError(
                f"dtype={self.settings.dtype}: must hold the moments of image {key} of {source}, "
                "some are too large or not finite; bfloat16 holds larger ones"
            )


def sums(moments: Tensor) -> dict[str, np.ndarray]:
    """What mean and variance of latents z need, for moments (B, 2C, h, w).

    Over images, height and width: of E[z] = mean and of E[z^2] = mean^2 + std^2, each (C,)
    float64, and how many numbers of each channel these are.
    """
    mean, std = split_moments(moments.double())
    over = (0, 2, 3)
    return {
        "first": mean.sum(over).numpy(),
        "second": (mean.square() + std.square()).sum(over).numpy(),
        "count": np.array(mean.numel() // mean.shape[1]),
    }


def array_bytes(values: Tensor) -> bytes:
    """A ``.npy`` file; bfloat16 as its bits, which numpy has no type for."""
    stored = values.view(torch.uint16) if values.dtype == torch.bfloat16 else values
    file = io.BytesIO()
    np.save(file, stored.numpy())
    return file.getvalue()
