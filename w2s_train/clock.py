"""How long a fit took, which part of it was evaluation, and how fast its steps are."""

import resource
import sys
import time
from typing import Any, NamedTuple

import torch

GIGABYTE = 1e9


class Mark(NamedTuple):
    """Where a fit stood when its pace was asked for."""

    step: int
    images: int
    seconds: float  # of training
    waited: float  # for data, since the loader was made


class FitClock:
    """Seconds of fitting over all restarts of a run; evaluation is counted in and on its own."""

    def __init__(self) -> None:
        self.before, self.evaluating = 0.0, 0.0  # seconds before this start; of evaluation, in all
        self.fit_began: float | None = None
        self.evaluation_began: float | None = None
        self.mark: Mark | None = None

    def start(self) -> None:
        """A fit begins, or goes on."""
        self.fit_began = time.monotonic()

    def start_evaluation(self) -> None:
        """An evaluation begins."""
        self.evaluation_began = time.monotonic()

    def end_evaluation(self) -> None:
        """It ends."""
        self.evaluating, self.evaluation_began = self.evaluation_seconds, None

    @property
    def wall_clock(self) -> float:
        """Seconds of fitting so far, evaluation included."""
        running = time.monotonic() - self.fit_began if self.fit_began is not None else 0.0
        return self.before + running

    @property
    def evaluation_seconds(self) -> float:
        """Seconds of evaluation during fitting so far; scoring a finished run is not counted."""
        if self.fit_began is None or self.evaluation_began is None:
            return self.evaluating
        return self.evaluating + time.monotonic() - self.evaluation_began

    @property
    def training_seconds(self) -> float:
        """Seconds of fitting so far without evaluation."""
        return self.wall_clock - self.evaluation_seconds

    @property
    def evaluation_share(self) -> float:
        """Part of the fit, in [0, 1], that went into evaluation."""
        return self.evaluation_seconds / self.wall_clock

    def pace(self, step: int, images: int, loader: Any) -> dict[str, float]:
        """What steps since the last call took, without evaluation; of the host's clock alone.

        Args:
            step: Optimizer steps so far.
            images: Trained on so far, over all processes.
            loader: Of the training batches; says for how many seconds it was ``waited`` for.

        Returns:
            Seconds of a step, those of them in which it waited for data, and images per second;
            empty at first.
        """
        last = self.mark
        now = Mark(step, images, self.training_seconds, getattr(loader, "waited", 0.0))
        self.mark = now
        if last is None or step <= last.step:
            return {}
        steps, seconds = step - last.step, now.seconds - last.seconds
        return {
            "time/step_seconds": seconds / steps,
            "time/data_seconds": (now.waited - last.waited) / steps,
            "time/images_per_second": (images - last.images) / seconds,
        }

    def state_dict(self) -> dict[str, float]:
        """For a checkpoint."""
        return {"seconds": self.wall_clock, "evaluation_seconds": self.evaluation_seconds}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """From a checkpoint; the first ones did not tell evaluation apart."""
        self.before = state["seconds"]
        self.evaluating = state.get("evaluation_seconds", 0.0)


def memory(device: torch.device) -> dict[str, float]:
    """The most that this process has held so far, in GB (1e9 bytes): of the host, of a GPU."""
    unit = 1 if sys.platform == "darwin" else 1024  # of getrusage
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    found = {"memory/host_gigabytes": held / GIGABYTE}
    if device.type == "cuda":
        found["memory/device_gigabytes"] = torch.cuda.max_memory_allocated(device) / GIGABYTE
    return found
