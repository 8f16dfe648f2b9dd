"""Copies of a network: frozen ones, and an exponential moving average of its weights; partners.

    average <- decay * average + (1 - decay) * weights,      once per optimizer step

`torch.optim.swa_utils.AveragedModel` computes the same, but reads its step counter back to the host
at every update, which stalls a GPU, and keeps half-precision weights in half precision, where an
average with decay 0.9999 never moves.
"""

import contextlib
import copy
from typing import Any, Literal

import torch
from torch import Tensor, nn

from w2s_train.errors import UserError, require
from w2s_train.models.dit import DiT

Dtype = Literal["float32", "bfloat16"]  # of the matrices of frozen copies


def frozen_copy(network: DiT, dtype: Dtype = "float32") -> DiT:
    """A copy that no optimizer reaches; to be called within `as_kept`.

    In "bfloat16" the weights that autocast casts at every step are kept so; under bf16-mixed the
    copy then predicts the same, bit for bit. Embeddings and norms, which it leaves alone, stay.
    """
    frozen = copy.deepcopy(network).float().requires_grad_(False).eval()
    for module in frozen.modules():
        if dtype == "bfloat16" and isinstance(module, nn.Linear | nn.Conv2d):
            module.bfloat16()
    return frozen


def as_kept(frozen: DiT) -> contextlib.AbstractContextManager[Any]:
    """The precision that a frozen copy computes in: one in bfloat16 as in bf16-mixed."""
    weight = frozen.final_layer.linear.weight
    half = weight.dtype == torch.bfloat16
    return torch.autocast(weight.device.type, torch.bfloat16) if half else contextlib.nullcontext()


class WeightAverage(nn.Module):
    """A frozen float32 copy of ``network`` that follows it.

    Args:
        network: What to average. Its buffers are constants.
        decay: In [0, 1); 0 is a plain copy. The average looks back about 1 / (1 - decay) updates.

    Raises:
        UserError: A decay outside [0, 1).
    """

    def __init__(self, network: DiT, decay: float) -> None:
        super().__init__()
        self.decay = require("decay", decay, "[0, 1)")
        self.module = frozen_copy(network)

    @torch.no_grad()
    def update(self, network: DiT, good: bool | Tensor = True) -> None:
        """Move the average towards the weights of ``network``.

        Args:
            network: Of the same architecture.
            good: Whether to; a tensor () bool where the host does not know yet.
        """
        averages: list[Tensor] = [*self.module.weights]
        new = [p.detach().float() for p in network.weights]
        if isinstance(good, Tensor):
            torch._foreach_lerp_(averages, new, weights=[(1 - self.decay) * good] * len(new))
        elif good:
            torch._foreach_lerp_(averages, new, 1 - self.decay)

    def train(self, mode: bool = True) -> "WeightAverage":
        """An average is never in training mode."""
        return super().train(False)


def check_partner(weak: DiT, network: DiT, where: str) -> None:
    """Refuse a weak network that does not see the data of ``network``, or is larger.

    Args:
        weak: The weak network.
        network: The network being trained.
        where: ``name=value`` of the config, for the message.

    Raises:
        UserError: Another input, other classes, or more parameters.
    """
    for name in ("input_size", "in_channels", "num_classes"):
        theirs, ours = getattr(weak, name), getattr(network, name)
        if theirs != ours:
            raise UserError(f"{where}: has {name} {theirs}, must have {ours} as the network")
    theirs, ours = (sum(p.numel() for p in n.parameters()) for n in (weak, network))
    if theirs > 1.02 * ours:  # a little more is another last layer or normalization
        raise UserError(
            f"{where}: has {theirs:,} parameters, must have at most the network's {ours:,}"
        )
