"""Weak sources that only look on: what would they show? See `guideability.ratio`.

The weights, their averages and everything else that is logged are, bit for bit, those of the run
without: what a source draws comes from generators that are put back, what it has to learn it learns
on tokens without gradients, with an optimizer of its own, and networks that it asks are not in
training mode meanwhile.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from w2s_train.errors import require
from w2s_train.guideability.ratio import Difference, note
from w2s_train.interpolant import NoisySample
from w2s_train.log import Log
from w2s_train.models import DiTOutput, Network, as_output
from w2s_train.models.learner import Learner
from w2s_train.objective import WeakToStrongObjective
from w2s_train.segment import Rows, Segment, Strong, mean_square
from w2s_train.timesteps import at_least
from w2s_train.weak.base import Fresh, Step, WeakSource


class LookOn(Segment):
    """A range of timesteps where a weak source is evaluated, and has no influence.

    It may overlap all others. With scales that are drawn, it looks on at scale 0.

    Args:
        low: Start of the range, inclusive.
        high: End of the range, exclusive.
        weak: The weak source. What the loss would train learns at every step, at the learning rate
            of the run, by AdamW.
        share: Of the optimizer steps, in (0, 1], at which it looks on: evenly spaced ones.
        name: In logs, and as a key; None is its range.
        watch_only: True: says in a config that this segment does not act.

    Raises:
        UserError: A number out of its range.
    """

    watch_only = True

    def __init__(
        self,
        low: float,
        high: float,
        weak: WeakSource,
        share: float = 0.1,
        name: str | None = None,
        watch_only: Literal[True] = True,
    ) -> None:
        super().__init__(low, high, Apart(weak), name=name)
        self.share = require("share", share, "(0, 1]")

    def looks(self, step: Step) -> bool:
        """Whether this is one of its steps; known to all processes alike."""
        n = step.number
        return self.weak.ready and at_least(n + 1, self.share) > at_least(n, self.share)

    def factor(self, step: Step) -> float:
        return float(self.looks(step) or bool(self.weak.learned))

    def describe(self) -> str:
        source = self.weak.describe()
        return f"{self.title}: {source} only looks on, at {self.share:g} of the steps"

    def act(self, strong: Strong, rows: Rows, target: Tensor, log: Log) -> Tensor:
        """Learn, and look on at the rows of a training step."""
        source: Any = self.weak
        source.learn(strong)
        if self.looks(strong.step):
            if strong.scales:
                asked = ask(strong.network, strong.noisy.take(rows), strong.y[rows], [self])
                strong, rows = strong._replace(**asked), slice(None)
            note([self.look(strong, rows)], strong.noisy.t, log)
        return torch.zeros_like(target[:, 0, 0, 0])

    @torch.no_grad()
    def look(self, strong: Strong, rows: Rows) -> Difference:
        """What there is to see at some rows."""
        noisy, y, out = self.weak_inputs(strong, rows)
        with own_draws(strong.network), still(strong.network):
            weak = self.weak.predict(strong.network, noisy, y, out).float()
        difference, residual = out.velocity - weak, noisy.v.float() - out.velocity
        return Difference(self.name, rows, difference, residual, self.contains(noisy.t), None)


class Apart(WeakSource):
    """A source whose draws and lessons are its own affair.

    Args:
        source: Any.
    """

    def __init__(self, source: WeakSource) -> None:
        super().__init__()
        self.source = source
        self.needs_label, self.needs_null = source.needs_label, source.needs_null
        self.learner, self.lessons = Learner([], ""), list[Sequence[Tensor]]()

    @property
    def ready(self) -> bool:
        return self.source.ready

    @property
    def learned(self) -> list[nn.Parameter]:
        """What learns in here, if the loss would train it."""
        return self.learner.parameters

    def bind(self, network: Network) -> None:
        with own_draws(network):
            self.source.bind(network)
        self.keep_hidden = self.source.keep_hidden
        learned = [p for p in self.source.parameters() if p.requires_grad]
        self.learner = Learner(learned, f"{self.source.describe()}, which looks on,")

    def plan(self, total: int | None, last: int | None) -> int:
        return self.source.plan(total, last)

    def describe(self) -> str:
        return self.source.describe()

    def predict(self, network: Network, noisy: NoisySample, y: Tensor, strong: DiTOutput) -> Tensor:
        return self.source.predict_at(network, noisy, y, strong)

    def learn(self, strong: Strong) -> None:
        """Take the gradient of |weak - v|^2 at all rows of a training batch."""
        if not self.learned or not torch.is_grad_enabled():
            return
        with torch.no_grad():  # these cannot lead into the network
            noisy, everything = strong.noisy, slice(None)
            out = strong.out.take(everything, self.keep_hidden)
            kind = self.learned[0].dtype
            hidden = {block: tokens.to(kind) for block, tokens in out.hidden.items()}
            out = out._replace(hidden=hidden, cond=out.cond.to(kind))
        device = noisy.t.device.type  # in half precision small gradients would be lost
        whole = torch.autocast(device, enabled=False)
        with own_draws(strong.network), still(strong.network), whole, self.learner.recording():
            weak = self.source.predict_at(strong.network, noisy, strong.y, out).float()
            loss = mean_square(weak - noisy.v.float()).mean()
            self.lessons.append(torch.autograd.grad(loss, self.learned))

    def after_step(self, network: Network, step: Step, fresh: Fresh) -> None:
        with own_draws(network):
            self.source.after_step(network, step, fresh)
        if self.lessons:
            means = [torch.stack(parts).mean(0) for parts in zip(*self.lessons, strict=True)]
            self.lessons = []
            self.learner.step(means, step.lr, step.number, step.good)

    def get_extra_state(self) -> dict[str, Any]:
        """The optimizer's state, saved with the weights."""
        return self.learner.state()

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Keep it until the first step, when the weights are on their device."""
        self.learner.restore(state)


@torch.no_grad()
def look_on(
    objective: WeakToStrongObjective, network: Network, x: Tensor, y: Tensor, step: Step, log: Log
) -> None:
    """Let sources whose step this is look on at data that are not trained on, in a pass of its own.

    Args:
        objective: Whose `lookers` they are.
        network: The network being trained.
        x: Data (B, C, H, W).
        y: Labels (B,) int64, dropped ones already replaced by the null class.
        step: Where training stands.
        log: Takes the sums.
    """
    everyone: Sequence[Any] = objective.lookers
    lookers = [each for each in everyone if each.looks(step)]
    asked = ask(network, objective.draw(x), y, lookers)
    strong = Strong(network=network, step=step, scales={}, found=[], **asked)
    labelled = y != network.null_class
    for each in lookers:
        rows = objective.rows(each, labelled, {})
        if len(y[rows]):
            note([each.look(strong, rows)], strong.noisy.t, log)


@torch.no_grad()
def ask(
    network: Network, noisy: NoisySample, y: Tensor, lookers: Sequence[Segment]
) -> dict[str, Any]:
    """The strong pass at scale 0, as the fields of a `Strong`."""
    keep = {block for each in lookers for block in each.weak.keep_hidden}
    options: dict[str, Any] = {"keep_hidden": keep} if keep else {}
    with still(network):
        out = as_output(network(noisy.x_t, noisy.t, y, **options), noisy.x_t)
    return dict(noisy=noisy, y=y, out=out)


@contextlib.contextmanager
def still(network: Any) -> Iterator[None]:
    """The network out of training mode, so that a pass leaves no trace in it."""
    training = [part for part in network.modules() if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True


def own_draws(network: Network) -> contextlib.AbstractContextManager[Any]:
    """What is drawn within moves no generator that others draw from."""
    device = next(network.parameters()).device
    on_host = device.type == "cpu"
    return torch.random.fork_rng(
        [] if on_host else [device], device_type="cuda" if on_host else device.type
    )
