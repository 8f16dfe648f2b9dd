"""An image grid per validation."""

from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torchvision.utils import make_grid, save_image

from w2s_train.errors import UserError


class SampleGrid(Callback):
    """Writes the first images of the generation plan as ``grids/step-XXXXXX.png``.

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
        self.images: dict[int, torch.Tensor] = {}

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: Any,
        outputs: Any,
        batch: dict[str, torch.Tensor],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep this rank's share of the first images."""
        for seed, image in zip(batch["seed"].tolist(), outputs, strict=True):
            if seed < self.num_images:
                self.images[seed] = image.cpu()

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Put the shares of all ranks together and write the grid."""
        shares = [self.images]
        if trainer.world_size > 1:
            shares = [{} for _ in range(trainer.world_size)]
            torch.distributed.all_gather_object(shares, self.images)
        self.images = {}
        if not trainer.is_global_zero:
            return
        merged = {seed: image for share in shares for seed, image in share.items()}
        images = torch.stack([merged[seed] for seed in sorted(merged)]).float() / 255
        large = images.repeat_interleave(self.scale, 2).repeat_interleave(self.scale, 3)
        folder = Path(trainer.default_root_dir) / "grids"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"step-{pl_module.steps_taken:06d}.png"
        grid = make_grid(large, nrow=self.columns, padding=2, pad_value=0.5)
        save_image(grid, path)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image("samples", grid, pl_module.steps_taken)

    on_test_batch_end = on_validation_batch_end
    on_test_end = on_validation_end
