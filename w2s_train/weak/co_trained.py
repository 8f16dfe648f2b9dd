"""A small network trained alongside: "separate", and "AG" in the SGG paper."""

import copy
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from w2s_train.errors import require
from w2s_train.interpolant import NoisySample
from w2s_train.models import DiTOutput, Network, offered
from w2s_train.models.average import check_partner
from w2s_train.optim import Readback, keep_fused, step_only_if
from w2s_train.weak.base import Fresh, Step, WeakSource


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
        self.optimizer: torch.optim.Optimizer | None = None
        self.restored: dict[str, Any] = {}
        self.judged: list[tuple[int, Readback]] = []  # steps, and whether their gradient is finite

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

    def predict(self, network: Network, noisy: NoisySample, y: Tensor, strong: DiTOutput) -> Tensor:
        return self.network(noisy.x_t, noisy.t, y).velocity

    def after_step(self, network: Network, step: Step, fresh: Fresh) -> None:
        if step.number % self.every:
            return
        noisy, y = fresh()
        self._report()
        if self.optimizer is None:
            self.optimizer = torch.optim.AdamW(self.learned, weight_decay=0.0, fused=True)
            if self.restored:
                keep_fused(self.optimizer, self.restored)  # it may be of a run without
                self.optimizer.load_state_dict(self.restored)
        self.optimizer.param_groups[0]["lr"] = step.lr if self.lr is None else self.lr
        for parameter in self.learned:
            parameter.requires_grad_(True)
        with torch.enable_grad():
            velocity = self.network(noisy.x_t, noisy.t, y).velocity.float()
            loss = (velocity - noisy.v).square().mean()
            gradients = _average(torch.autograd.grad(loss, self.learned))
        for parameter, gradient in zip(self.learned, gradients, strict=True):
            parameter.requires_grad_(False)
            parameter.grad = gradient
        finite = torch.stack([gradient.isfinite().all() for gradient in gradients]).all()
        self.judged.append((step.number, Readback(finite)))
        self._report()
        step_only_if(finite & step.good, self.optimizer)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _report(self) -> None:
        """Warn of steps that were skipped, once the host can know without waiting."""
        while self.judged and self.judged[0][1].there:
            number, finite = self.judged.pop(0)
            if finite.take() == [0]:
                warnings.warn(
                    f"step {number}: the gradient of the co-trained network is not finite; its "
                    "step is skipped",
                    stacklevel=3,
                )

    def get_extra_state(self) -> dict[str, Any]:
        """The optimizer's state, saved with the weights."""
        return self.optimizer.state_dict() if self.optimizer is not None else self.restored

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Keep it until the first step, when the weights are on their device."""
        self.restored, self.optimizer = copy.deepcopy(state), None


def _average(gradients: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The mean over all processes."""
    if not torch.distributed.is_initialized():
        return gradients
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    torch.distributed.all_reduce(flat)
    parts = (flat / torch.distributed.get_world_size()).split([g.numel() for g in gradients])
    return tuple(part.view_as(g) for part, g in zip(parts, gradients, strict=True))
