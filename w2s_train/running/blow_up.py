"""The alarm for weak-to-strong targets that run away, which the loss does not show."""

from lightning.pytorch.utilities import rank_zero_warn

from w2s_train.errors import DIVERGED, Stopped

LARGEST_SCALE = 10.0  # effective guidance scale beyond which an alarm does not wait for more
ALARM, ABORT = 1.2, 2.4  # times the effective scale: RMS of the strong prediction over that of v


class BlowUp:
    """Compares the strong prediction with what the scale explains, whenever both are logged.

    At scale 1 the network chases its own prediction, and the loss is blind to it. So the RMS of the
    strong prediction is compared with that of the data's velocity v, which the unguided prediction
    E[v | x_t] never exceeds: a warning above 1.2 times the effective guidance scale 1 / (1 - scale)
    of a segment, the end of the run at twice that. Where scales are drawn it is compared with what
    each row's own scale explains.

    A network that says data begins with data of zero, which are large velocities where there is
    little noise: of one, only what has grown to twice its lowest value counts.
    """

    def __init__(self) -> None:
        self.seen: dict[str, float] = {}
        self.lowest: dict[str, float] = {}  # strong_rms by segment

    def look(self, metrics: dict[str, float], step: int, falls: bool = False) -> None:
        """Look at a log entry of training, once; ``falls`` where the network says data."""
        if metrics is self.seen:
            return
        self.seen = metrics
        for key, guides in metrics.items():
            segment, _, name = key.rpartition("/")
            velocity = metrics.get(f"{segment}/velocity_rms")
            if name == "effective_scale" and velocity is not None:
                strong = metrics[f"{segment}/strong_rms"]
                self.lowest[segment] = min(strong, self.lowest.get(segment, strong))
                if falls and strong < 2 * self.lowest[segment]:
                    continue
                if explained := metrics.get(f"{segment}/explained_rms"):
                    guides = explained / velocity
                self._compare(strong, velocity, guides, f"step {step}: {segment}/strong_rms")

    @staticmethod
    def _compare(strong: float, velocity: float, guides: float, name: str) -> None:
        allowed = min(guides, LARGEST_SCALE)
        message = (
            f"{name} is {strong:.4g}, which is {strong / velocity:.3g} times that of the data's "
            f"velocity; guidance by {allowed:.3g} explains {allowed:.3g} times"
        )
        if strong > ABORT * allowed * velocity:
            raise Stopped(f"{message}; a smaller scale or max_difference may help", DIVERGED)
        if strong > ALARM * allowed * velocity:
            rank_zero_warn(message)
