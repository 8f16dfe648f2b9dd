"""What `lightning predict` makes: one PNG per seed."""

from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from torchvision.io import write_png


class ImageWriter(Callback):
    """Writes each generated image as ``samples/SEED-LABEL.png`` in the run folder."""

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write this rank's images."""
        folder = Path(trainer.default_root_dir) / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        rows = zip(batch["seed"].tolist(), batch["label"].tolist(), outputs, strict=True)
        for seed, label, image in rows:
            write_png(image.cpu(), str(folder / f"{seed:06d}-{label}.png"))
