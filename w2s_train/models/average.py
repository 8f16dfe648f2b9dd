"""Copies of a network: frozen ones, and an exponential moving average of its weights; partners.

    average <- decay * average + (1 - decay) * weights,      once per optimizer step

`torch.optim.swa_utils.AveragedModel` computes the same, but reads its step counter back to the host
at every update, which stalls a GPU, and keeps half-precision weights in half precision, where an
average with decay 0.9999 never moves.
"""

import contextlib
import copy
import types
from typing import Any, Literal

import torch
from torch import Tensor, nn

from w2s_train.errors import UserError, require
from w2s_train.models.network import Network, check_network

Dtype = Literal["float32", "bfloat16"]  # of the matrices of frozen copies


def frozen_copy(network: Network, dtype: Dtype = "float32") -> Network:
    """A copy that no optimizer reaches; to be called within `as_kept`.

    In "bfloat16" the weights that autocast casts at every step are kept so; under bf16-mixed the
    copy then predicts the same, bit for bit. Embeddings and norms, which it leaves alone, stay.
    """
    frozen: Any = copy.deepcopy(network)
    freeze(frozen.float())
    for module in frozen.modules():
        if dtype == "bfloat16" and isinstance(module, nn.Linear | nn.Conv2d):
            module.bfloat16()
    return frozen


def freeze(network: Any) -> None:
    """No optimizer reaches it, and no training mode, whatever module it is a part of."""
    network.requires_grad_(False).eval()
    network.train = types.MethodType(_stays, network)


def _stays(frozen: nn.Module, mode: bool = True) -> nn.Module:
    return frozen


def as_kept(frozen: Network) -> contextlib.AbstractContextManager[Any]:
    """The precision that a frozen copy computes in: one in bfloat16 as in bf16-mixed."""
    weights = weights_of(frozen)
    half = any(weight.dtype == torch.bfloat16 for weight in weights)
    device = weights[0].device.type
    return torch.autocast(device, torch.bfloat16) if half else contextlib.nullcontext()


def weights_of(network: Any) -> list[nn.Parameter]:
    """All parameters; looked for once, since there are hundreds of modules."""
    if "_weights" not in vars(network):
        vars(network)["_weights"] = list(network.parameters())
    return vars(network)["_weights"]


def kept_buffers(network: Any) -> list[Tensor]:
    """What is saved beside the parameters, such as the statistics of a batch normalization."""
    if "_owners" not in vars(network):  # a buffer that moves to a device is another tensor
        kept = network.state_dict(keep_vars=True).keys()
        names = [name.rpartition(".") for name, _ in network.named_buffers() if name in kept]
        owners = [(network.get_submodule(path), name) for path, _, name in names]
        vars(network)["_owners"] = owners
    return [owner.get_buffer(name) for owner, name in vars(network)["_owners"]]


class WeightAverage(nn.Module):
    """A frozen float32 copy of ``network`` that follows it.

    Args:
        network: What to average. Buffers that are saved are not averaged, but copied.
        decay: In [0, 1); 0 is a plain copy. The average looks back about 1 / (1 - decay) updates.

    Raises:
        UserError: A decay outside [0, 1).
    """

    def __init__(self, network: Network, decay: float) -> None:
        super().__init__()
        self.decay = require("decay", decay, "[0, 1)")
        self.module = frozen_copy(network)
        self.std: float | None = None  # of an average that was made after training (posthoc)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        std = state_dict.pop(f"{prefix}std", None)
        self.std = None if std is None else float(std)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    @torch.no_grad()
    def update(self, network: Network, good: bool | Tensor = True) -> None:
        """Move the average towards the weights of ``network``.

        Args:
            network: Of the same architecture.
            good: Whether to; a tensor () bool where the host does not know yet.
        """
        averages: list[Tensor] = [*weights_of(self.module)]
        new = [p.detach().float() for p in weights_of(network)]
        if isinstance(good, Tensor):
            torch._foreach_lerp_(averages, new, weights=[(1 - self.decay) * good] * len(new))
        elif good:
            torch._foreach_lerp_(averages, new, 1 - self.decay)
        for mine, theirs in zip(kept_buffers(self.module), kept_buffers(network), strict=True):
            mine.copy_(theirs)


def check_partner(weak: Network, network: Network, where: str, labels: bool = True) -> None:
    """Refuse a weak network that does not see the data of ``network``, or is larger.

    Args:
        weak: The weak network.
        network: The network being trained.
        where: ``name=value`` of the config, for the message.
        labels: Whether both see the same labels.

    Raises:
        UserError: Another input, other classes, or more parameters; those of scales do not count.
    """
    check_network(weak)
    for name in ("shape", *(("num_classes", "null_class") if labels else ())):
        theirs, ours = getattr(weak, name, None), getattr(network, name, None)
        if theirs != ours and None not in (theirs, ours):
            raise UserError(f"{where}: has {name} {theirs}, must have {ours} as the network")
    theirs, ours = map(_size, (weak, network))
    if theirs > 1.02 * ours:  # a little more is another last layer or normalization
        raise UserError(
            f"{where}: has {theirs:,} parameters, must have at most the network's {ours:,}"
        )


def _size(network: Any) -> int:
    named = network.named_parameters()
    return sum(p.numel() for name, p in named if "scale_embedder" not in name.split("."))
