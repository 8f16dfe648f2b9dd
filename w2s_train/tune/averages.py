"""Weights of averages that are made after training, in the place of those that a run samples."""

from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from w2s_train.errors import UserError
from w2s_train.evaluation.scorer import weights_digest
from w2s_train.module import DiffusionModule
from w2s_train.posthoc.weights import Kept


class Averages:
    """Puts averages of any std in the place of a module's own, which is sampled from then on."""

    def __init__(self, module: DiffusionModule, path: str | Path | None) -> None:
        if path is None:
            raise UserError("ckpt_path=null: must be a run, or a checkpoint of one")
        self.kept = Kept(Path(path), module.network)
        self.network = cast(nn.Module, module.ema.module)
        self.own: dict[str, Tensor] = {
            name: value.clone() for name, value in self.network.state_dict().items()
        }
        self.digest = weights_digest([self.network]).hexdigest()[:16]
        self.std: float | None = None
        module.scored_weights = ["ema"]

    def use(self, std: float | None) -> None:
        """That of a std; None for the run's own."""
        if std != self.std:
            self.network.load_state_dict(self.own | (self.kept.weights(std) if std else {}))
            self.std = std

    def describe(self) -> dict[str, Any]:
        """What they are made of."""
        snapshots = [[each.step, each.std] for each in self.kept.snapshots]
        return {"weights_sha256": self.digest, "stds": self.kept.stds, "snapshots": snapshots}
