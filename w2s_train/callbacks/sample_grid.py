"""An image grid per validation."""

from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torchvision.utils import make_grid, save_image

from w2s_train.callbacks.scorer import Scorer, gather
from w2s_train.errors import UserError
from w2s_train.scores import grid_name


def image_grid(images: Tensor, columns: int, scale: int) -> Tensor:
    """Images (N, C, H, W) uint8 row by row, as one of float32 (3, H', W') in [0, 1].

    Args:
        images: What to show.
        columns: Images per row.
        scale: Each pixel becomes a square of this side.
    """
    large = images.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    return make_grid(large.float() / 255, nrow=columns, padding=2, pad_value=0.5)


class SampleGrid(Scorer):
    """Writes the first images of the generation plan as ``grids/step-XXXXXX.png``.

    Of several settings (weights, guidances) each gets a grid, from the same seeds.

    Args:
        num_images: How many; seeds 0 ... num_images - 1.
        columns: Images per row; the number of classes gives one column per class.
        scale: Each pixel becomes a square of this side, for small images.

    Raises:
        UserError: A number below 1.
    """

    def __init__(self, num_images: int = 64, columns: int = 8, scale: int = 1) -> None:
        for name, value in dict(num_images=num_images, columns=columns, scale=scale).items():
            if value < 1:
                raise UserError(f"{name}={value}: must be at least 1")
        self.num_images, self.columns, self.scale = num_images, columns, scale

    def describe(self) -> str:
        """What is kept of the images."""
        return f"grid of {self.num_images}"

    def begin(self, trainer: Trainer, module: Any) -> None:
        """Start with no images."""
        self.images: dict[int, dict[int, Tensor]] = {}  # setting -> seed -> image

    def take(self, group: int, images: Tensor, batch: dict[str, Tensor]) -> None:
        """Keep this process's share of the first images."""
        for seed, image in zip(batch["seed"].tolist(), images, strict=True):
            if seed < self.num_images:
                self.images.setdefault(self.plans[group].setting, {})[seed] = image.cpu()

    def state(self) -> Any:
        """Images by setting and seed."""
        return self.images

    def merge(self, state: Any) -> None:
        """Add those of another process."""
        for setting, images in state.items():
            self.images.setdefault(setting, {}).update(images)

    def score(self, trainer: Trainer, module: Any) -> None:
        """Put the shares of all processes together and write the grids."""
        shares = gather(self.images, trainer)
        if not trainer.is_global_zero:
            return
        folder = Path(trainer.default_root_dir) / "grids"
        folder.mkdir(parents=True, exist_ok=True)
        for number, setting in enumerate(module.settings):
            found = {k: v for share in shares for k, v in share.get(number, {}).items()}
            images = torch.stack([found[seed] for seed in sorted(found)])
            grid = image_grid(images, self.columns, self.scale)
            kind = (setting.weights, setting.guidance.describe()) if number else ()
            save_image(grid, folder / grid_name(module.steps_taken, *kind))
            for logger in trainer.loggers:
                if isinstance(logger, TensorBoardLogger):
                    tag = f"samples {setting.name}" if number else "samples"
                    logger.experiment.add_image(tag, grid, module.steps_taken)
