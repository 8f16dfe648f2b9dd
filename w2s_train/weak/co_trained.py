"""A small network trained alongside: "separate", and "AG" in the SGG paper."""

from typing import Any

import torch
from torch import Tensor, nn

from w2s_train.errors import require
from w2s_train.interpolant import NoisySample
from w2s_train.models import DiTOutput, Network, offered
from w2s_train.models.average import check_partner
from w2s_train.models.learner import Learner
from w2s_train.weak.base import Fresh, Step, WeakSource

NAME = "the co-trained network"


class CoTrained(WeakSource):
    """A smaller network with an optimizer of its own, stepped after every k-th strong step.

    It regresses plain velocities on the batch of the strong step, with the labels that the strong
    pass saw and fresh timesteps and noise; with gradient accumulation, on the last part of it. (In
    the reference the two networks drop labels independently, so that a pair may see different
    ones.) Its parameters stand outside the run's optimizer, and gradients are averaged over
    processes here.

    Args:
        network: The weak network; None for the strong one with half the width (rounded down to
            what the heads divide) and half the heads: S for B, as published.
        lr: Learning rate of its AdamW, whose other settings are the published ones; None for the
            run's own, schedule included.
        every: Strong steps per step of this network, at least 1.

    Raises:
        UserError: An interval below 1, a rate that is negative or not finite; in `bind`, another
            input, other classes or a larger network than the one being trained.
    """

    from_training = True

    def __init__(
        self, network: Network | None = None, lr: float | None = None, every: int = 4
    ) -> None:
        super().__init__()
        if lr is not None:
            require("lr", lr, "[0, inf)")
        self.network: Any = network
        self.lr, self.every = lr, require("every", every, "[1, inf)")
        self.learned: list[nn.Parameter] = []  # of the network, from `bind`
        self.learner = Learner([], NAME)

    def bind(self, network: Network) -> None:
        if self.network is None:
            names = ("hidden_size", "num_heads", "arguments")
            part = "CoTrained that is given no network"
            width, heads, arguments = offered(network, part, *names)
            heads = max(heads // 2, 1)
            width = max(width // 2 // (4 * heads), 1) * 4 * heads
            halved = dict(hidden_size=width, num_heads=heads)
            plain = {key: value for key, value in arguments.items() if key != "scales"}
            self.network = type(network)(**(plain | halved))
        check_partner(self.network, network, "network=(given)")
        # Whole networks that learn outside the trainer: nobody else may wait for their gradients.
        self.learned = self.learned or [p for p in self.network.parameters() if p.requires_grad]
        self.network.requires_grad_(False)
        self.learner = Learner(self.learned, NAME)

    def predict(self, network: Network, noisy: NoisySample, y: Tensor, strong: DiTOutput) -> Tensor:
        return self.network(noisy.x_t, noisy.t, y).velocity

    def after_step(self, network: Network, step: Step, fresh: Fresh) -> None:
        if step.number % self.every:
            return
        noisy, y = fresh()
        with self.learner.recording():
            velocity = self.network(noisy.x_t, noisy.t, y).velocity.float()
            loss = (velocity - noisy.v).square().mean()
            gradients = torch.autograd.grad(loss, self.learned)
        lr = step.lr if self.lr is None else self.lr
        self.learner.step(gradients, lr, step.number, step.good)

    def get_extra_state(self) -> dict[str, Any]:
        """The optimizer's state, saved with the weights."""
        return self.learner.state()

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Keep it until the first step, when the weights are on their device."""
        self.learner.restore(state)
