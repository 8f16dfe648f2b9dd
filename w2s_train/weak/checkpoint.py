"""A frozen early checkpoint: the bad version of itself that autoguidance calls for.

Karras et al. (2024, "Guiding a Diffusion Model with a Bad Version of Itself") found a partner
trained for 1/16 of the steps, of the same size or smaller, the best one at sampling time.
"""

from typing import Literal

import torch
from torch import Tensor

from w2s_train.errors import UserError
from w2s_train.interpolant import NoisySample
from w2s_train.models import DiTOutput, Network, saved_network
from w2s_train.models.average import Dtype, as_kept, check_partner, frozen_copy
from w2s_train.schedule import Steps, check_reached, whole_steps
from w2s_train.weak.base import Fresh, Step, WeakSource


class Checkpoint(WeakSource):
    """A frozen network from a file, of the same or a smaller architecture, with the same label.

    The file is read when the source is built, and its weights are kept in the run's checkpoints;
    resuming and scoring still need the file, for the architecture.

    Args:
        path: A checkpoint of a run of ours.
        weights: Which of its weights: the running average ("ema") or the live ones ("raw").
        network: Instead of a path, any network, such as `w2s_train.models.published_sit`.
        dtype: Of the copy's matrices; "bfloat16" takes half the memory, see `frozen_copy`.
        unlabelled: Give it the null class in place of the label: domain guidance (arXiv
            2504.01521), if it is what a fine-tuned network began with. It may have other classes.

    Raises:
        UserError: Both or neither given; a file that is missing or cannot be read; in `bind`,
            another input, other classes or a larger network than the one being trained.
    """

    def __init__(
        self,
        path: str | None = None,
        weights: Literal["ema", "raw"] = "ema",
        network: Network | None = None,
        dtype: Dtype = "float32",
        unlabelled: bool = False,
    ) -> None:
        super().__init__()
        if (path is None) == (network is None):
            raise UserError(f"path={path}: must be given, or else network, but not both")
        self.where = f"path={path}" if path else "network=(given)"
        self.weights = weights if path else "given"
        loaded = saved_network(path, weights) if path is not None else network
        assert loaded is not None
        self.network, self.unlabelled = frozen_copy(loaded, dtype), unlabelled

    def bind(self, network: Network) -> None:
        check_partner(self.network, network, self.where, labels=not self.unlabelled)

    def describe(self) -> str:
        label = ", unlabelled" if self.unlabelled else ""
        return f"Checkpoint({self.where}, {self.weights}{label})"

    def predict(self, network: Network, noisy: NoisySample, y: Tensor, strong: DiTOutput) -> Tensor:
        y = torch.full_like(y, self.network.null_class) if self.unlabelled else y
        with as_kept(self.network):
            return self.network(noisy.x_t, noisy.t, y).velocity


class Snapshot(WeakSource):
    """The network as it was at a step of this run, frozen there; no guidance before that step.

    Args:
        step: When to take it, in optimizer steps or as a share of the plan.
        refresh_every: Take it anew at every so many steps after that (or a share); None never.
        weights: The live ones ("raw") or those of the running average ("ema"), of which the initial
            weights still are the share ema_decay**step: nearly all of it where the step is early.
        dtype: Of the copy's matrices; "bfloat16" takes half the memory, see `frozen_copy`.

    Raises:
        UserError: A step at or after the run's last one, or a refresh interval of zero.
    """

    from_training = True

    def __init__(
        self,
        step: Steps = 0.0625,
        refresh_every: Steps | None = None,
        weights: Literal["ema", "raw"] = "raw",
        dtype: Dtype = "float32",
    ) -> None:
        super().__init__()
        for name, value in dict(step=step, refresh_every=refresh_every).items():
            if value == 0:
                raise UserError(f"{name}={value}: must be at least one step")
        self.step, self.refresh_every, self.weights = step, refresh_every, weights
        self.dtype: Dtype = dtype

    def bind(self, network: Network) -> None:
        self.network = frozen_copy(network, self.dtype)
        self.taken = False

    @property
    def ready(self) -> bool:
        return self.taken

    def get_extra_state(self) -> dict[str, bool]:
        """Whether there is a snapshot, kept with its weights."""
        return {"taken": self.taken}

    def set_extra_state(self, state: dict[str, bool]) -> None:
        """Restore it."""
        self.taken = state["taken"]

    def describe(self) -> str:
        return f"Snapshot({self.step:g}, {self.weights})"

    def plan(self, total: int | None, last: int | None) -> int:
        self.first_step = whole_steps("step", self.step, total)
        self.interval: int | None = None  # of `refresh_every`, in steps
        check_reached("step", self.step, self.first_step, last)
        if self.refresh_every is not None:
            self.interval = whole_steps("refresh_every", self.refresh_every, total)
        return self.first_step

    def predict(self, network: Network, noisy: NoisySample, y: Tensor, strong: DiTOutput) -> Tensor:
        with as_kept(self.network):
            return self.network(noisy.x_t, noisy.t, y).velocity

    def after_step(self, network: Network, step: Step, fresh: Fresh) -> None:
        age = step.number - self.first_step
        due = age >= 0 and not self.taken  # later than its step if a resumed run has another plan
        if due or (self.interval and age > 0 and age % self.interval == 0):
            source = step.average if self.weights == "ema" else network
            assert source is not None
            self.network.load_state_dict(source.state_dict())
            self.taken = True
