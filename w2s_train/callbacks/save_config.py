"""``config.yaml``: the complete config of a run."""

from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.cli import SaveConfigCallback

from w2s_train.files import atomic_write
from w2s_train.secrets import redacted


class SaveFitConfig(SaveConfigCallback):
    """Writes ``config.yaml``, without secrets, when fitting; scoring leaves the run's alone."""

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Write it."""
        if stage == "fit":
            super().setup(trainer, pl_module, stage)

    def save_config(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """On one process."""
        config = yaml.safe_load(self.parser.dump(self.config, skip_none=False))
        with atomic_write(Path(trainer.default_root_dir) / "config.yaml") as file:
            file.write(yaml.safe_dump(redacted(config), sort_keys=False).encode())
