"""What a run keeps so that averages of any length can be made after it: two, now and then."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning import Callback, Trainer
from torch import Tensor, nn

from w2s_train.checkpoint_file import FULL
from w2s_train.errors import UserError, require
from w2s_train.posthoc.power import exponent_of, share
from w2s_train.posthoc.snapshots import FOLDER, Snapshot, forget, write

KEY = "PowerAverages"  # of the state in checkpoints
Half = Literal["float16", "float32"]


class PowerAverages(Callback):
    """Follows the network's weights by power-function averages, and keeps them every so often.

    Once per optimizer step, but for those that are passed over; where the host does not know yet
    whether one is, nobody waits. Files ``posthoc/step-NNNNNN-std-X.safetensors`` of the run folder
    hold the weights that are trained; none is ever removed, unless the run goes on from before it.
    The averages themselves stand in the checkpoints: `lightning ema` needs one of these as well.

    Args:
        stds: Of the averages, each above 0 and at most 0.2887; parts of the run that they look
            back. Two, 0.05 and 0.10, span most others (Karras et al., 2024).
        every: Optimizer steps between two snapshots; None is a fiftieth of the run's, or 1000
            where it has no end.
        dtype: Of the files.

    Raises:
        UserError: A number out of its range, or fewer than two averages.
    """

    def __init__(
        self,
        stds: Sequence[float] = (0.05, 0.10),
        every: int | None = None,
        dtype: Half = "float16",
    ) -> None:
        self.stds, self.every = list(stds), every
        if every is not None:
            require("every", every, "[1, inf)")
        self.dtype = getattr(torch, dtype)
        self.exponents = [exponent_of(std) for std in self.stds]
        if len({*self.stds}) < 2 or len({*self.stds}) < len(self.stds):
            raise UserError(f"stds={self.stds}: must be two different ones, or more")
        self.averages = list[list[Tensor]]()
        self.time = torch.zeros((), dtype=torch.float64)  # images of the steps that were taken

    @property
    def state_key(self) -> str:
        """One a run."""
        return KEY

    def state_dict(self) -> dict[str, Any]:
        """Everything that the averages go on from."""
        return {"stds": self.stds, "time": self.time, "averages": self.averages}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with it; UserError if it is of other averages."""
        if state_dict["stds"] != self.stds:
            raise UserError(f"stds={self.stds}: must be {state_dict['stds']}, as in the checkpoint")
        self.time = state_dict["time"].clone()
        self.averages = [[tensor.clone() for tensor in each] for each in state_dict["averages"]]

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Refuse a fit that trains nothing of the network."""
        if stage == "fit" and not any(p.requires_grad for p in pl_module.network.parameters()):
            raise UserError(
                "trainer.callbacks=PowerAverages: must follow a network that is trained; "
                "of this one nothing is"
            )

    @torch.no_grad()
    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Begin with the weights as they are, or go on."""
        device = pl_module.device
        self.time, weights = self.time.to(device), [*trained(pl_module.network).values()]
        if not self.averages:
            self.averages = [[weight.float().clone() for weight in weights] for _ in self.stds]
        self.averages = [[tensor.to(device) for tensor in each] for each in self.averages]
        self.step, self.images = trainer.global_step, pl_module.images_seen
        self.apart = self.every or (
            max(1, trainer.max_steps // 50) if trainer.max_steps > 0 else 1000
        )
        if trainer.is_global_zero:
            forget(Path(trainer.default_root_dir) / FOLDER, self.step)

    def go_back(self, trainer: Trainer, content: dict[str, Any]) -> None:
        """Go back to a checkpoint, while steps and data go on."""
        if KEY in content["callbacks"]:  # else it was saved before there were averages
            self.load_state_dict(content["callbacks"][KEY])
        self.time = self.time.to(trainer.strategy.root_device)
        self.averages = [[x.to(self.time.device) for x in each] for each in self.averages]
        if trainer.is_global_zero:
            forget(Path(trainer.default_root_dir) / FOLDER, content["global_step"])

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Follow, after an optimizer step."""
        if trainer.global_step == self.step:
            return
        images, self.images = pl_module.images_seen - self.images, pl_module.images_seen
        self.step = trainer.global_step
        self.update(pl_module.network, images, pl_module.good)
        if self.step % self.apart == 0 and trainer.is_global_zero:
            self._write(Path(trainer.default_root_dir) / FOLDER, pl_module.network)

    @torch.no_grad()
    def update(self, network: Any, images: int, good: bool | Tensor = True) -> None:
        """Move the averages towards the weights of ``network``.

        Args:
            network: What is followed.
            images: Of the step behind its weights.
            good: Whether it was taken; a tensor () bool where the host does not know yet.
        """
        if good is False:
            return
        self.time = self.time + images * good
        new = [weight.float() for weight in trained(network).values()]
        for exponent, average in zip(self.exponents, self.averages, strict=True):
            weight = share(exponent, images, self.time)
            if isinstance(good, Tensor):
                weight = torch.where(good, weight, 0.0)
            torch._foreach_lerp_(average, new, weights=[weight.float()] * len(new))

    def _write(self, folder: Path, network: Any) -> None:
        """Both; a full disk costs the snapshot, and not the run."""
        folder.mkdir(parents=True, exist_ok=True)
        names, images = trained(network), int(self.time)
        try:
            for std, average in zip(self.stds, self.averages, strict=True):
                tensors = {n: x.to("cpu", self.dtype) for n, x in zip(names, average, strict=True)}
                write(folder, Snapshot(self.step, images, std), tensors)
        except OSError as error:
            if error.errno not in FULL:
                raise
            warnings.warn(f"{error}; training goes on without this snapshot", stacklevel=2)


def trained(network: Any) -> dict[str, nn.Parameter]:
    """Parameters that need gradients, by name; looked for once."""
    if "_trained" not in vars(network):
        named = network.named_parameters()
        vars(network)["_trained"] = {name: p for name, p in named if p.requires_grad}
    return vars(network)["_trained"]
