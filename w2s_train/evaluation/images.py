"""Images on the disk: a grid per validation, and what `predict` and `sample` make."""

import abc
import contextlib
import io
import json
import os
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_warn
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid, save_image

from w2s_train.errors import UserError, one_line, require
from w2s_train.evaluation.scorer import Scorer, gather, protocol_of
from w2s_train.scores import git_commit, grid_name
from w2s_train.secrets import redacted
from w2s_train.shards import ShardWriter

PLAIN = ("ema", "none")  # weights and guidance that a grid's name does not state


def image_grid(images: Tensor, columns: int, scale: int) -> Tensor:
    """Images (N, C, H, W) uint8 row by row, as one of float32 (3, H', W') in [0, 1].

    Args:
        images: What to show.
        columns: Images per row.
        scale: Each pixel becomes a square of this side.
    """
    large = images.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    return make_grid(large.float() / 255, nrow=columns, padding=2, pad_value=0.5)


def log_image(logger: Logger, name: str, image: Tensor, step: int) -> None:
    """Send an image (3, H, W) in [0, 1] to a logger that has a way for it; others keep none."""
    experiment: Any = getattr(logger, "experiment", None)
    if hasattr(logger, "log_image"):  # W&B's, and whoever has the same method
        logger.log_image(name, [to_pil_image(image)], step=step)
    elif hasattr(experiment, "add_image"):  # TensorBoard's
        experiment.add_image(name, image, step)
    elif hasattr(experiment, "log_image") and hasattr(logger, "run_id"):  # MLflow's
        key = re.sub(r"[^\w./ -]", "", name)  # others are refused
        experiment.log_image(logger.run_id, to_pil_image(image), key=key, step=step)
    elif hasattr(experiment, "log_image"):  # Comet's
        experiment.log_image(to_pil_image(image), name=name, step=step)


class SampleGrid(Scorer):
    """Writes the first images of the generation plan as ``grids/step-XXXXXX.png``.

    Of several settings (weights, guidances) each gets a grid, from the same seeds; the file's name
    has the setting in it, but for averaged weights without guidance.

    Args:
        num_images: How many; of the first seeds.
        columns: Images per row; the number of classes gives one column per class.
        scale: Each pixel becomes a square of this side, for small images.

    Raises:
        UserError: A number below 1.
    """

    def __init__(self, num_images: int = 64, columns: int = 8, scale: int = 1) -> None:
        for name, value in dict(num_images=num_images, columns=columns, scale=scale).items():
            require(name, value, "[1, inf)")
        self.num_images, self.columns, self.scale = num_images, columns, scale
        self.seeds = num_images

    def describe(self) -> str:
        return f"grid of {self.num_images}"

    def begin(self, trainer: Trainer, module: Any) -> None:
        self.images: dict[int, dict[int, Tensor]] = {}  # setting -> seed -> image

    def take(self, group: int, images: Tensor, batch: dict[str, Tensor]) -> None:
        for seed, image in zip(batch["seed"].tolist(), images, strict=True):
            if seed < self.plans[0].seeds[0] + self.num_images:
                self.images.setdefault(self.plans[group].setting, {})[seed] = image.cpu()

    def state(self) -> Any:
        return self.images

    def merge(self, state: Any) -> None:
        for setting, images in state.items():
            self.images.setdefault(setting, {}).update(images)

    def score(self, trainer: Trainer, module: Any) -> None:
        shares = gather(self.images, trainer)
        if not trainer.is_global_zero:
            return
        folder = Path(trainer.default_root_dir) / "grids"
        folder.mkdir(parents=True, exist_ok=True)
        for number, setting in enumerate(module.settings):
            found = {k: v for share in shares for k, v in share.get(number, {}).items()}
            images = torch.stack([found[seed] for seed in sorted(found)])
            grid = image_grid(images, self.columns, self.scale)
            kind = (setting.weights, setting.guidance.describe())
            name = grid_name(module.steps_taken, *(() if kind == PLAIN else kind))
            save_image(grid, folder / name)
            tag = f"samples {setting.name}" if number else "samples"
            for logger in trainer.loggers:
                try:
                    log_image(logger, tag, grid, module.steps_taken)
                except Exception as error:  # of any service
                    who = type(logger).__name__
                    rank_zero_warn(f"{who}: no grid was logged ({one_line(error)})")


class SampleWriter(Callback, abc.ABC):
    """Writes generated images, each process its own.

    Args:
        output: File or folder to write; it must not exist.
    """

    suffix: str = ""  # of the file; none for a folder
    about: dict[str, Any] | None = None  # of the record, beside the protocol; None leaves none

    def __init__(self, output: Path) -> None:
        self.output = output

    def check(self) -> None:
        """Refuse to write over something, before any work.

        Raises:
            UserError: There is something.
        """
        if self.suffix and self.output.suffix != self.suffix:
            raise UserError(f"output={self.output}: must end in {self.suffix}")
        if self.output.is_dir() and any(self.output.iterdir()) or self.output.is_file():
            raise UserError(f"output={self.output}: must be new, or an empty folder")
        self.output.parent.mkdir(parents=True, exist_ok=True)

    def write_record(self, about: dict[str, Any]) -> None:
        """Say how the images came about: ``sampling.json`` in a folder, ``FILE.json`` of a file."""
        path = Path(f"{self.output}.json") if self.suffix else self.output / "sampling.json"
        path.write_text(json.dumps(redacted(about), indent=1) + "\n")

    @abc.abstractmethod
    def write(self, trainer: Trainer, images: Tensor, batch: dict[str, list[int]]) -> None:
        """Write images (B, C, H, W) uint8 with their "index", "seed" and "label"."""

    def finish(self, trainer: Trainer) -> None:  # noqa: B027
        """Put together what the processes have; all of them call it."""

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self.write(trainer, outputs.cpu(), {key: rows.tolist() for key, rows in batch.items()})

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.strategy.barrier("all images are there")
        self.finish(trainer)
        if self.about is not None and trainer.is_global_zero:  # a forked parent loads no weights
            self.write_record(protocol_of(pl_module) | self.about | {"git_commit": git_commit()})


def planned(trainer: Trainer) -> int:
    """Number of images in the plan."""
    loader: Any = trainer.predict_dataloaders
    return len(loader.dataset)


def to_pil(image: Tensor) -> Image.Image:
    """An image (C, H, W) uint8, with one channel or three."""
    array = image.permute(1, 2, 0).numpy()
    return Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)


class ImageWriter(SampleWriter):
    """A folder of ``SEED-LABEL.png``."""

    def write(self, trainer: Trainer, images: Tensor, batch: dict[str, list[int]]) -> None:
        self.output.mkdir(parents=True, exist_ok=True)
        for seed, label, image in zip(batch["seed"], batch["label"], images, strict=True):
            to_pil(image).save(self.output / f"{seed:06d}-{label}.png")


class GridWriter(SampleWriter):
    """One ``.png`` with all images in the order of the plan.

    Args:
        output: File to write.
        columns: Images per row.
        scale: Each pixel becomes a square of this side.
    """

    suffix = ".png"

    def __init__(self, output: Path, columns: int = 8, scale: int = 1) -> None:
        super().__init__(output)
        for name, value in dict(columns=columns, scale=scale).items():
            require(name, value, "[1, inf)")
        self.columns, self.scale = columns, scale
        self.images: dict[int, Tensor] = {}

    def write(self, trainer: Trainer, images: Tensor, batch: dict[str, list[int]]) -> None:
        self.images |= dict(zip(batch["index"], images, strict=True))

    def finish(self, trainer: Trainer) -> None:
        images = {k: v for share in gather(self.images, trainer) for k, v in share.items()}
        if trainer.is_global_zero:
            rows = [images[index] for index in sorted(images)]
            save_image(image_grid(torch.stack(rows), self.columns, self.scale), self.output)


class NpzWriter(SampleWriter):
    """The field's ``.npz`` for ADM's evaluator.

    ``arr_0`` (N, H, W, 3) uint8, in the order of the plan, and ``arr_1`` (N,) labels. Images are
    never held in memory all at once.
    """

    suffix = ".npz"

    def __init__(self, output: Path) -> None:
        super().__init__(output)
        self.written = 0

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Drop what a run that was stopped may have left."""
        if trainer.is_global_zero:
            for name in ("arr_0", "arr_1"):
                self._path(name).unlink(missing_ok=True)
        trainer.strategy.barrier("nothing is left")

    def write(self, trainer: Trainer, images: Tensor, batch: dict[str, list[int]]) -> None:
        n = planned(trainer)
        self.written += len(images)
        height, width = images.shape[2:]
        rows = images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()
        for name, shape, part in (
            ("arr_0", (n, height, width, 3), rows),
            ("arr_1", (n,), np.array(batch["label"])),
        ):
            self._open(name, shape, part.dtype)[batch["index"]] = part

    def _path(self, name: str) -> Path:
        return self.output.with_name(f"{self.output.name}.{name}.partial.npy")

    def _open(self, name: str, shape: tuple[int, ...], dtype: Any) -> Any:
        """The array, shared by all processes through the file."""
        path = self._path(name)
        if not path.is_file():
            # Renamed when its header is there; a process that comes second finds or repeats it.
            fresh = path.with_suffix(f".{os.getpid()}.new")
            np.lib.format.open_memmap(fresh, mode="w+", dtype=dtype, shape=shape).flush()
            with contextlib.suppress(FileExistsError):
                path.hardlink_to(fresh)
            fresh.unlink()
        return np.lib.format.open_memmap(path, mode="r+")

    def finish(self, trainer: Trainer) -> None:
        written, n = sum(gather(self.written, trainer)), planned(trainer)
        if written < n:
            raise UserError(f"output={self.output}: must hold {n:,} images, only {written:,} came")
        if not trainer.is_global_zero:
            return
        partial = self.output.with_suffix(".partial")
        with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            for name in ("arr_0", "arr_1"):
                archive.write(self._path(name), f"{name}.npy")
                self._path(name).unlink()
        partial.replace(self.output)


class TarWriter(SampleWriter):
    """A folder of webdataset shards, ``samples-RANK-XXXXXX.tar``, with ``.png`` and ``.cls``.

    Beside each lies its table; both are whole or not there.

    Args:
        output: Folder to write.
        size: Images in a shard.
    """

    def __init__(self, output: Path, size: int = 5000) -> None:
        super().__init__(output)
        self.size, self.count = size, 0
        self.under_way = contextlib.ExitStack()  # at most one shard

    def write(self, trainer: Trainer, images: Tensor, batch: dict[str, list[int]]) -> None:
        for seed, label, image in zip(batch["seed"], batch["label"], images, strict=True):
            if self.count % self.size == 0:
                self.under_way.close()
                name = f"samples-{trainer.global_rank:03d}-{self.count // self.size:06d}.tar"
                self.shard = self.under_way.enter_context(ShardWriter(self.output / name))
            png = io.BytesIO()
            to_pil(image).save(png, "png")
            self.shard.write(f"{seed:06d}", label, png=png.getvalue())
            self.count += 1

    def finish(self, trainer: Trainer) -> None:
        self.under_way.close()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Leave no part of a shard."""
        self.under_way.__exit__(type(exception), exception, exception.__traceback__)
