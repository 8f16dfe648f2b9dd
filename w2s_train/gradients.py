"""What is done with gradients between the backward pass and the optimizer."""

from collections.abc import Sequence

from torch import Tensor, nn


def norm_of(parameters: Sequence[nn.Parameter]) -> Tensor:
    """The norm () of all gradients together."""
    return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


def clip(
    parameters: Sequence[nn.Parameter], norm: Tensor, limit: float | None, algorithm: str | None
) -> None:
    """Clip gradients as Lightning's ``gradient_clip_val`` and ``gradient_clip_algorithm`` say."""
    if limit and algorithm in (None, "norm"):
        nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    elif limit:
        nn.utils.clip_grad_value_(parameters, limit)


def drop(parameters: Sequence[nn.Parameter]) -> None:
    """Leave none: an optimizer passes over parameters without a gradient, states included."""
    for parameter in parameters:
        parameter.grad = None
