"""Weights that learn outside the run's optimizer, so that they change nothing that is in it."""

import contextlib
import copy
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from w2s_train.optim import Readback, keep_fused, step_only_if


class Learner:
    """An AdamW of its own, with the published settings; what it moves needs gradients in here only.

    Gradients are averaged over processes here, since nobody else waits for them.

    Args:
        parameters: What learns.
        name: Of what they are, for a warning.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], name: str) -> None:
        self.parameters, self.name = [*parameters], name
        for parameter in self.parameters:
            parameter.requires_grad_(False)
        self.optimizer: torch.optim.Optimizer | None = None
        self.restored: dict[str, Any] = {}
        self.judged: list[tuple[int, Readback]] = []  # steps, and whether their gradient is finite

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """For the pass that is learned from."""
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        with torch.enable_grad():
            yield
        for parameter in self.parameters:
            parameter.requires_grad_(False)

    def step(
        self, gradients: Sequence[Tensor], lr: float, number: int, good: bool | Tensor
    ) -> None:
        """Take a step, unless it is not good or a gradient is not finite on some process.

        Args:
            gradients: Of the parameters, on this process.
            lr: Learning rate.
            number: Optimizer steps of the run, for a warning.
            good: Whether the run takes its own; () bool where the host does not know yet.
        """
        self._report()
        if self.optimizer is None:
            self.optimizer = torch.optim.AdamW(self.parameters, weight_decay=0.0, fused=True)
            if self.restored:
                keep_fused(self.optimizer, self.restored)  # it may be of a run without
                self.optimizer.load_state_dict(self.restored)
        self.optimizer.param_groups[0]["lr"] = lr
        gradients = _average(gradients)
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        finite = torch.stack([gradient.isfinite().all() for gradient in gradients]).all()
        self.judged.append((number, Readback(finite)))
        self._report()
        step_only_if(finite & good, self.optimizer)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _report(self) -> None:
        """Warn of steps that were skipped, once the host can know without waiting."""
        while self.judged and self.judged[0][1].there:
            number, finite = self.judged.pop(0)
            if finite.take() == [0]:
                warnings.warn(
                    f"step {number}: the gradient of {self.name} is not finite; its step is "
                    "skipped",
                    stacklevel=4,
                )

    def state(self) -> dict[str, Any]:
        """The optimizer's, to be saved with the weights."""
        return self.optimizer.state_dict() if self.optimizer is not None else self.restored

    def restore(self, state: dict[str, Any]) -> None:
        """Keep it until the first step, when the weights are on their device."""
        self.restored, self.optimizer = copy.deepcopy(state), None


def _average(gradients: Sequence[Tensor]) -> Sequence[Tensor]:
    """The mean over all processes."""
    if not torch.distributed.is_initialized():
        return gradients
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    torch.distributed.all_reduce(flat)
    parts = (flat / torch.distributed.get_world_size()).split([g.numel() for g in gradients])
    return [part.view_as(g) for part, g in zip(parts, gradients, strict=True)]
