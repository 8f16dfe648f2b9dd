"""The images of one shard, in their order, whole or with an error that names what is wrong.

Shards of images to shards of posterior moments, one at a time on one device.

One process per device; each takes the next shard of a common list when it has done one.
"""

import io
import signal
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from w2s_train.autoencoder import load_autoencoder, split_moments, weights_digest
from w2s_train.errors import UserError
from w2s_train.prepare.engine import claim, remove_leftovers
from w2s_train.shards.format import ShardTable, ShardWriter, check_whole, is_written, table_path
from w2s_train.shards.samples import FLIPPED, decode_image, encoded_image, read_shard, to_float

DECODERS = 2  # threads; a batch is decoded while the one before it is encoded


class Image(NamedTuple):
    """A sample: its key, its class and its pixels (C, H, W) uint8."""

    key: str
    label: int
    pixels: Tensor


class Waiting(NamedTuple):
    """A sample whose image is being decoded."""

    key: str
    label: int
    pixels: Future[Tensor]


class ShardImages:
    """Iterates once over the images of a shard.

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
        pool = ThreadPoolExecutor(DECODERS)
        waiting: deque[Waiting] = deque()
        try:
            for sample in read_shard(self.shard):
                samples += 1
                content, label = encoded_image(sample, self.shard)
                pixels = pool.submit(decode_image, content)
                waiting.append(Waiting(sample["__key__"], label, pixels))
                if len(waiting) > 64:
                    yield from self._image(waiting.popleft())
            while waiting:
                yield from self._image(waiting.popleft())
        finally:
            pool.shutdown(cancel_futures=True)
        if len(self.broken) > self.max_broken * samples:
            raise UserError(
                f"max_broken={self.max_broken}: {len(self.broken)} of {samples} images of "
                f"{self.shard} cannot be decoded, the first is {self.broken[0]}"
            )

    def _image(self, waiting: Waiting) -> list[Image]:
        """None or one."""
        key = waiting.key
        try:
            pixels = waiting.pixels.result()
        except Exception as error:  # decoders raise almost anything on damaged bytes
            self.broken.append(key)
            if self.max_broken == 0:
                raise UserError(
                    f"max_broken=0: image {key} of {self.shard} cannot be decoded ({error}); "
                    "a share above 0 leaves such images out"
                ) from error
            return []
        return [Image(key, waiting.label, self._checked(key, pixels))]

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
    """(H, W) of the first image.

    Raises:
        UserError: There is none.
    """
    for shard in shards:
        check_whole(shard)
        for image in ShardImages(shard, None, None, max_broken):
            return image.pixels.shape[1], image.pixels.shape[2]
    raise UserError(f"source={shards[0]}: must hold images, there are none")


def batched(images: ShardImages, size: int) -> Iterator[tuple[list[Image], Tensor]]:
    """Up to ``size`` images at a time, and their pixels (B, C, H, W) uint8."""
    batch: list[Image] = []
    for image in images:
        batch.append(image)
        if len(batch) == size:
            yield batch, torch.stack([each.pixels for each in batch])
            batch = []
    if batch:
        yield batch, torch.stack([each.pixels for each in batch])


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


class Progress(NamedTuple):
    """Images done since the last message, and whether the shard is."""

    images: int
    finished: bool


def work(connection: Connection, settings: Settings, device: str) -> None:
    """What a process does: load, then encode the shards that it is sent.

    It sends `Facts` first, then `Progress`; a `UserError` or an OSError instead of either ends it.
    """
    try:
        encoder = Encoder(settings, device)
        connection.send(encoder.facts)
        while True:
            for images in encoder.encode_shard(connection.recv()):
                connection.send(Progress(images, finished=False))
            connection.send(Progress(0, finished=True))
    except (EOFError, ConnectionError):  # the command has ended
        return
    except (UserError, OSError) as error:
        connection.send(error)


class Worker:
    """A process, seen from the command."""

    def __init__(self, settings: Settings, device: str) -> None:
        context = get_context("spawn")  # CUDA cannot be used after a fork
        self.device = device
        self.connection, theirs = context.Pipe()
        self.process: BaseProcess = context.Process(
            target=work, args=(theirs, settings, device), daemon=True
        )
        self.process.start()
        theirs.close()  # so that the end of the process is the end of the stream
        self.task: Task | None = None

    def give(self, task: Task) -> None:
        """Send it a shard to encode."""
        self.task = task
        try:
            self.connection.send(task)
        except BrokenPipeError:
            raise self._death() from None

    def facts(self) -> Facts:
        """Wait until it has loaded the autoencoder."""
        facts = self._receive()
        assert isinstance(facts, Facts)
        return facts

    def progress(self) -> Progress:
        """Wait for its next batch, or the end of its shard."""
        progress = self._receive()
        assert isinstance(progress, Progress)
        return progress

    def _receive(self) -> Facts | Progress:
        """Wait for its next message.

        Raises:
            UserError: Its own, or it has died.
            OSError: Its own.
        """
        try:
            message = self.connection.recv()
        except (EOFError, OSError):
            raise self._death() from None
        if isinstance(message, (UserError, OSError)):
            raise message
        return message

    def _death(self) -> UserError:
        self.process.join()
        doing = self.task.source if self.task else "loading the autoencoder"
        return UserError(
            f"device={self.device}: its process must live, but ended with code "
            f"{self.process.exitcode} at {doing}; finished shards are kept"
        )

    def end(self) -> None:
        """End the process, and delete what it was writing."""
        self.process.terminate()
        self.process.join(10)
        if self.process.is_alive():  # a driver may hold it
            self.process.kill()
            self.process.join()
        self.connection.close()
        if self.task is not None:
            remove_leftovers(self.task.target)


class Workers:
    """A context manager: processes that encode, one per device, with `Encoder`'s ``run``.

    Args:
        settings: For each of them.
        devices: One name per process.

    Raises:
        UserError: Of any process, also that it has died.
        OSError: Of any process.
    """

    def __init__(self, settings: Settings, devices: list[str]) -> None:
        self.settings, self.devices = settings, devices
        self.workers: list[Worker] = []

    def __enter__(self) -> "Workers":
        # Ctrl-C reaches the processes as well; the command ends them, so they ignore it from birth.
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            self.workers = [Worker(self.settings, device) for device in self.devices]
        finally:
            signal.signal(signal.SIGINT, before)
        try:
            self.facts = [worker.facts() for worker in self.workers][0]
        except BaseException:
            self.end()
            raise
        return self

    def run(self, tasks: list[Task]) -> Iterator[int]:
        """Encode shards; yields the number of images of each batch that is done."""
        waiting = list(reversed(tasks))
        busy: dict[Connection, Worker] = {}
        for worker in self.workers[: len(tasks)]:
            worker.give(waiting.pop())
            busy[worker.connection] = worker
        while busy:
            for connection in wait(list(busy)):
                worker = busy[connection]  # type: ignore[index]
                progress = worker.progress()
                yield progress.images
                if progress.finished:
                    worker.task = None
                    if waiting:
                        worker.give(waiting.pop())
                    else:
                        del busy[connection]  # type: ignore[arg-type]

    def end(self) -> None:
        """End all processes."""
        for worker in self.workers:
            worker.end()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.end()
