"""Weights of an average of any width, from what a run has kept, and as a file."""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from w2s_train.checkpoint_file import read_file, write_checkpoint
from w2s_train.errors import UserError
from w2s_train.models.saved import PREFIX
from w2s_train.posthoc.averages import KEY, trained
from w2s_train.posthoc.power import Mix, mix
from w2s_train.posthoc.snapshots import FOLDER, Read, Snapshot, combined, read

MISS = 0.25  # of a profile, beyond which another one would go by its name
TRAINING = ("optimizer_states", "lr_schedulers", "callbacks")  # what an average has no part in


class Kept:
    """The averages up to a checkpoint: snapshots in its run's folder, and those in itself.

    Args:
        path: A checkpoint of a run.
        network: Of its architecture.

    Raises:
        UserError: It has none, or a snapshot does not fit.
    """

    def __init__(self, path: Path, network: Any) -> None:
        content, self.path, self.names = read_file(str(path), mmap=True), path, [*trained(network)]
        state, step = (content.get("callbacks") or {}).get(KEY), content["global_step"]
        if state is None or not int(state["time"]):
            raise UserError(
                f"ckpt_path={path}: must hold averages of w2s_train.callbacks.PowerAverages, which "
                "trainer.callbacks of its fit must name (docs/ema.md)"
            )
        self.time, self.stds = int(state["time"]), list(state["stds"])
        before = read(path.parent.parent / FOLDER, trained(network), step)
        self.snapshots = [each for each in before if each.step < step]
        now = zip(self.stds, state["averages"], strict=True)
        reads = [dict(zip(self.names, tensors, strict=True)).__getitem__ for _, tensors in now]
        self.inputs: list[tuple[Snapshot, Read]] = [(s, _reader(s)) for s in self.snapshots]
        self.inputs += [
            (Snapshot(step, self.time, std), get) for std, get in zip(self.stds, reads, strict=True)
        ]

    def mix(self, std: float) -> Mix:
        """How the average of ``std`` is made; UserError if it cannot be."""
        stds, times = ([getattr(each, n) for each, _ in self.inputs] for n in ("std", "images"))
        made = mix(stds, times, std, self.time)
        if made.miss > MISS:
            known = ", ".join(f"{each:g}" for each in self.stds)
            raise UserError(
                f"std={std:g}: must be nearer to {known}, whose averages at {len({*times})} times "
                f"miss {made.miss:.0%} of it; more snapshots (every) reach further"
            )
        return made

    def weights(self, std: float) -> dict[str, Tensor]:
        """Of the parameters that were trained, by name; others are as in the checkpoint."""
        parts = zip(self.mix(std).coefficients, (get for _, get in self.inputs), strict=True)
        return combined([*parts], self.names)

    def save(self, std: float, path: Path) -> None:
        """Write a checkpoint whose main average is that of ``std``; nothing trains on from it."""
        content: dict[str, Any] = dict(read_file(str(self.path)))
        state = dict(content["state_dict"])
        made = {f"{PREFIX['ema']}{name}": value for name, value in self.weights(std).items()}
        state |= made | {"ema.std": torch.tensor(std, dtype=torch.float64)}
        content["state_dict"] = state
        write_checkpoint({k: v for k, v in content.items() if k not in TRAINING}, path)


def _reader(snapshot: Snapshot) -> Read:
    def get(name: str) -> Tensor:
        with safe_open(snapshot.path, "pt") as file:
            return file.get_tensor(name)

    return get
