"""Shards of images to shards of latents: the moments of an autoencoder's posterior.

Images are decoded by threads while the batch before theirs is encoded on one device. Beside the
shards lies ``latents.json``: their recipe and, once all of them are there, mean and std of the
latents. `w2s_train.autoencoder` reads it.
"""

import hashlib
import io
import itertools
import json
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from w2s_train.autoencoder import LATENTS, load_autoencoder, weights_digest
from w2s_train.autoencoder.of_diffusers import encode_images, posterior, shrinks_by
from w2s_train.errors import UserError
from w2s_train.features import ClassifierFeatures, DINOv2Features, FeatureExtractor
from w2s_train.prepare.engine import Task, Work, changed, write_json
from w2s_train.shards.decode import decode_image
from w2s_train.shards.format import ShardTable, ShardWriter, is_written, table_path
from w2s_train.shards.members import FLIPPED, TOKENS
from w2s_train.shards.samples import encoded_image, read_shard, to_float

# ---- the images of a shard

DECODERS = 2  # threads
AHEAD = 64  # images that are decoded before they are asked for


class Image(NamedTuple):
    """A sample: its key, its class and its pixels (C, H, W) uint8."""

    key: str
    label: int
    pixels: Tensor


class DecodedShard:
    """Iterates once over the images of a shard, in their order.

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
        waiting: deque[tuple[str, int, Future[Tensor]]] = deque()
        pool = ThreadPoolExecutor(DECODERS)
        try:
            for sample in read_shard(self.shard):
                samples += 1
                content, label = encoded_image(sample, self.shard)
                waiting.append((sample["__key__"], label, pool.submit(decode_image, content)))
                if len(waiting) > AHEAD:
                    yield from self._image(*waiting.popleft())
            while waiting:
                yield from self._image(*waiting.popleft())
        finally:
            pool.shutdown(cancel_futures=True)
        if len(self.broken) > self.max_broken * samples:
            raise UserError(
                f"max_broken={self.max_broken}: {len(self.broken)} of {samples} images of "
                f"{self.shard} cannot be decoded, the first is {self.broken[0]}"
            )

    def _image(self, key: str, label: int, pixels: Future[Tensor]) -> list[Image]:
        """None or one."""
        try:
            decoded = pixels.result()
        except Exception as error:  # decoders raise almost anything on damaged bytes
            self.broken.append(key)
            if self.max_broken == 0:
                raise UserError(
                    f"max_broken=0: image {key} of {self.shard} cannot be decoded ({error}); "
                    "a share above 0 leaves such images out"
                ) from error
            return []
        return [Image(key, label, self._checked(key, decoded))]

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
    """(H, W) of the first image."""
    for shard in shards:
        for image in DecodedShard(shard, None, None, max_broken):
            return image.pixels.shape[1], image.pixels.shape[2]
    raise UserError(f"source={shards[0]}: must hold images, there are none")


def batched(images: DecodedShard, size: int) -> Iterator[list[Image]]:
    """Up to ``size`` images at a time."""
    found = iter(images)
    while batch := list(itertools.islice(found, size)):
        yield batch


# ---- their latents

FIELDS = {"float16": "npy", "bfloat16": "bf16.npy"}  # by type of the stored numbers
PRECISIONS = ("float32", "bfloat16")
MADE_OF = "source_bytes"  # in the table of a shard of latents: size of that of the images


class Settings(NamedTuple):
    """How images are encoded."""

    autoencoder: str  # folder or hub name
    revision: str | None  # of the hub; None is its main branch
    dtype: str  # of the stored moments, a key of `FIELDS`
    flip: bool  # store the moments of the mirrored image, too
    precision: str  # of the computation, one of `PRECISIONS`
    batch_size: int  # images at a time
    max_broken: float  # share of a shard's images that may be undecodable
    size: tuple[int, int]  # (H, W) of the images
    align: str | None = None  # whose tokens are stored, too; see `extractor_of`
    align_weights: str | None = None  # their file, of a model of timm


class Facts(NamedTuple):
    """What is known once the autoencoder is loaded."""

    weights: str  # digest
    image_shape: tuple[int, int, int]  # (C, H, W)
    latent_shape: tuple[int, int, int]  # (C, h, w)
    align: dict[str, Any] | None = None  # "encoder", and "tokens" [N, F], if they are stored


def extractor_of(align: str, weights: str | None) -> FeatureExtractor:
    """The extractor whose tokens are stored.

    Args:
        align: A small classifier's file (.safetensors), or a model of timm such as
            vit_base_patch14_dinov2.lvd142m.
        weights: The model's file; None is timm's, from the hub.

    Raises:
        UserError: Neither, or weights that cannot be read.
    """
    if align.endswith(".safetensors"):
        found: FeatureExtractor = ClassifierFeatures(align)
    else:
        found = DINOv2Features(align, weights)
    found.load()
    return found


class Encoder(Work):
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
        factor = shrinks_by(vae)
        if height % factor or width % factor:
            raise UserError(
                f"source: must hold images whose height and width are multiples of {factor}, the "
                f"factor of {settings.autoencoder}; they are {height}x{width}"
            )
        latent = (config.latent_channels, height // factor, width // factor)
        image = (config.in_channels, height, width)
        self.vae, self.extractor, about = vae.to(self.device), None, None
        if settings.align is not None:
            extractor = extractor_of(settings.align, settings.align_weights)
            self.extractor = extractor.to(self.device)
            tokens = self.tokens(torch.zeros(1, *image, dtype=torch.uint8))
            about = {"encoder": extractor.describe(), "tokens": list(tokens.shape[1:])}
        self.facts = Facts(weights_digest(vae), image, latent, about)

    def write(self, source: Path, writer: ShardWriter) -> Iterator[int]:
        """Write the latents of a shard of images."""
        channels, *_ = self.facts.image_shape
        settings = self.settings
        images = DecodedShard(source, channels, settings.size, settings.max_broken)
        for batch in batched(images, settings.batch_size):
            self._write(writer, batch, source)
            yield len(batch)
        writer.add("broken", np.array(len(images.broken)))
        writer.add(MADE_OF, np.array(source.stat().st_size))

    def _write(self, writer: ShardWriter, batch: list[Image], source: Path) -> None:
        pixels = torch.stack([image.pixels for image in batch])
        x, kind = to_float(pixels.to(self.device)), FIELDS[self.settings.dtype]
        fields = {kind: self.moments(x)}
        if self.settings.flip:
            fields[FLIPPED + kind] = self.moments(x.flip(-1))
        for moments in fields.values():
            for name, value in sums(moments, self.facts.latent_shape[0]).items():
                writer.add(name, value)
        if self.extractor is not None:
            fields[TOKENS + kind] = self.tokens(pixels)
            if self.settings.flip:
                fields[FLIPPED + TOKENS + kind] = self.tokens(pixels.flip(-1))
        for values in fields.values():
            self._check_finite(values, batch, source)
        for row, image in enumerate(batch):
            contents = {name: array_bytes(moments[row]) for name, moments in fields.items()}
            writer.write(image.key, image.label, **contents)

    @torch.no_grad()
    def moments(self, x: Tensor) -> Tensor:
        """What is stored, (B, 2C, h, w) or latents (B, C, h, w), of images (B, 3, H, W) float32."""
        lower = self.settings.precision == "bfloat16"
        try:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=lower):
                moments = encode_images(self.vae, x)
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"batch_size={self.settings.batch_size}: must be smaller, {self.device} has not "
                "enough memory"
            ) from error
        return moments.to(self.dtype).cpu()

    @torch.no_grad()
    def tokens(self, pixels: Tensor) -> Tensor:
        """Of the encoder (B, N, F), as they are stored, for images (B, C, H, W) uint8."""
        assert self.extractor is not None
        lower = self.settings.precision == "bfloat16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=lower):
            return self.extractor.tokens(pixels.to(self.device)).to(self.dtype).cpu()

    def _check_finite(self, moments: Tensor, batch: list[Image], source: Path) -> None:
        finite = moments.isfinite().flatten(1).all(1)
        if not finite.all():
            key = batch[int(finite.int().argmin())].key
            raise UserError(
                f"dtype={self.settings.dtype}: must hold the moments of image {key} of {source}, "
                "some are too large or not finite; bfloat16 holds larger ones"
            )


def sums(moments: Tensor, channels: int) -> dict[str, np.ndarray]:
    """What mean and variance of latents z need, for moments (B, 2C, h, w) or latents (B, C, h, w).

    Over images, height and width: of E[z] = mean and of E[z^2] = mean^2 + std^2, each (C,)
    float64, and how many numbers of each channel these are.
    """
    mean, std = posterior(moments.double(), channels)
    over, square = (0, 2, 3), mean.square()
    return {
        "first": mean.sum(over).numpy(),
        "second": (square if std is None else square + std.square()).sum(over).numpy(),
        "count": np.array(mean.numel() // mean.shape[1]),
    }


def array_bytes(values: Tensor) -> bytes:
    """A ``.npy`` file; bfloat16 as its bits, which numpy has no type for."""
    stored = values.view(torch.uint16) if values.dtype == torch.bfloat16 else values
    file = io.BytesIO()
    np.save(file, stored.numpy())
    return file.getvalue()


def is_encoded(task: Task) -> bool:
    """Whether a shard is done."""
    if not is_written(task.target):
        return False
    size, made_of = task.source.stat().st_size, ShardTable.load(table_path(task.target)).sums
    if made_of.get(MADE_OF) != size:
        raise UserError(
            f"output={task.target}: must be of {task.source} with its {size:,} bytes, it is of "
            f"another file of {made_of.get(MADE_OF, 0):,}; delete it to encode it again"
        )
    return True


# ---- latents.json

# The same weights may be found under two names, and the same shards by two patterns.
NAMES = ("autoencoder", "revision", "source")


def recipe_of(settings: Settings, facts: Facts, source: str, shards: list[Path]) -> dict[str, Any]:
    """What latents are made of and how.

    Args:
        settings: How they are encoded.
        facts: Of the autoencoder.
        source: How the user has named the shards.
        shards: All of them, whichever this run encodes.
    """
    names = "".join(f"{shard.name}\n" for shard in shards)
    return {
        "autoencoder": settings.autoencoder,
        "revision": settings.revision,
        "weights": facts.weights,
        "dtype": settings.dtype,
        "flip": settings.flip,
        "precision": settings.precision,
        "batch_size": settings.batch_size,  # it decides about the last bits
        "image_shape": list(facts.image_shape),
        "latent_shape": list(facts.latent_shape),
        "align": facts.align,
        "source": source,
        "source_shards": len(shards),
        "source_digest": hashlib.sha256(names.encode()).hexdigest(),
    }


def begin(folder: Path, recipe: dict[str, Any]) -> None:
    """Write ``latents.json``, still without statistics, or agree with the one that is there."""
    path = folder / LATENTS
    if not path.is_file():
        if any(folder.glob("*.tar")):
            raise UserError(
                f"output={folder}: must be empty or hold a {LATENTS}; it holds other shards"
            )
        write_json(path, recipe)
        return
    try:
        stored = json.loads(path.read_text())
        before = {name: stored[name] for name in recipe if name != "align"}
        before["align"] = stored.get("align")  # which older ones lack
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"output={folder}: must hold a {LATENTS} of this command ({error!r})"
        ) from error
    names = [name for name in changed(before, recipe) if name not in NAMES]
    if names:
        differ = "; ".join(f"{name} {before[name]}, now {recipe[name]}" for name in names)
        raise UserError(
            f"output={folder}: must be a folder of its own, it holds latents of {differ} "
            f"(made by {before['autoencoder']} of {before['source']})"
        )


class Summary(NamedTuple):
    """Of all shards of a folder."""

    images: int
    broken: int
    bytes: int
    mean: list[float]  # per channel
    std: list[float]
    std_of_all: float  # over all channels; 1 over it is the one scale for all of them


def complete(folder: Path, shards: list[Path], recipe: dict[str, Any]) -> Summary:
    """Add the statistics to ``latents.json`` when all shards are written.

    Over images (mirrored ones, too), height and width, exact for a posterior N(m, s^2):

        E[z] = E[m],    Var[z] = E[m^2] + E[s^2] - E[z]^2.
    """
    tables = [ShardTable.load(table_path(shard)) for shard in shards]
    first, second, count, broken = (
        np.sum([table.sums[name] for table in tables if name in table.sums], axis=0)
        for name in ("first", "second", "count", "broken")
    )
    mean, square = first / count, second / count
    std = np.sqrt(square - mean**2)
    std_of_all = float(np.sqrt(square.mean() - mean.mean() ** 2))
    images, size = sum(map(len, tables)), sum(table.bytes for table in tables)
    summary = Summary(images, int(broken), size, mean.tolist(), std.tolist(), std_of_all)
    statistics = {name: getattr(summary, name) for name in ("mean", "std", "std_of_all")}
    statistics["count"] = int(count)
    counts = {"images": images, "broken": summary.broken}
    write_json(folder / LATENTS, recipe | counts | {"statistics": statistics})
    return summary
