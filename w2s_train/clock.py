"""How long a fit took, and which part of it was evaluation."""

import time


class FitClock:
    """Seconds of fitting over all restarts of a run; evaluation is counted in and on its own."""

    def __init__(self) -> None:
        self.before, self.evaluating = 0.0, 0.0  # seconds before this start; of evaluation, in all
        self.fit_began: float | None = None
        self.evaluation_began: float | None = None

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

    def state_dict(self) -> dict[str, float]:
        """For a checkpoint."""
        return {"seconds": self.wall_clock, "evaluation_seconds": self.evaluation_seconds}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """From a checkpoint; the first ones did not tell evaluation apart."""
        self.before = state["seconds"]
        self.evaluating = state.get("evaluation_seconds", 0.0)
