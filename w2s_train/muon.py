"""Muon for the matrices within a network, AdamW for everything else, as one optimizer.

    M <- momentum M + (1 - momentum) G;   W <- W - lr size O(momentum M + (1 - momentum) G)

O makes all singular values of its argument about 1 (Jordan et al., 2024); size = 0.2 sqrt(longer
side) gives the step the root mean square of one of AdamW, whose rates then fit (Liu et al., 2025).
`torch.optim.Muon` computes the same, a matrix at a time, and cannot pass over a step without the
host; here matrices of one shape move together, and a step that is bad moves nothing.
"""

from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatch
from typing import Any, cast

import torch
from torch import Tensor

from w2s_train.errors import UserError, require

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the iteration; Jordan et al., 2024
ELSEWHERE = """
    *embed* *context.tokens *sequence.weight *pooled.weight
    *final_layer* *norm_out* *proj_out* *.head.* objective.*
""".split()


class MuonWithAdamW(torch.optim.Optimizer):
    """Matrices (two dimensions) by Muon with Nesterov's momentum; the rest by fused AdamW.

    RAEv2 and the LightningDiT of Internal Guidance use these rates and momenta; the latter decays
    matrices by 0.01. Both give Muon every matrix, ``adamw=[]``; first and last layers are left to
    AdamW here, as its author advises.

    Args:
        params: Pairs of a name and a parameter.
        lr: Learning rate of both.
        matrix_scale: Times ``lr`` that matrices learn at.
        momentum: Of matrices, in [0, 1).
        weight_decay: Of matrices; the rest has none.
        newton_schulz: Steps of the iteration that orthogonalizes.
        betas: Of AdamW.
        adamw: Patterns (of `fnmatch`) of names that AdamW moves even if they are matrices.

    Raises:
        UserError: A number out of its range, a matrix without a name, or a pattern, other than
            those that are given anyhow, that no name fits.
    """

    takes_names = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 2e-4,
        matrix_scale: float = 1.0,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        newton_schulz: int = 5,
        betas: tuple[float, float] = (0.9, 0.95),
        adamw: Sequence[str] = ELSEWHERE,
    ) -> None:
        rates = dict(lr=lr, matrix_scale=matrix_scale, weight_decay=weight_decay)
        for name, value in rates.items():
            require(name, value, "[0, inf)")
        require("momentum", momentum, "[0, 1)")
        require("newton_schulz", newton_schulz, "[1, 100)")
        named = [each if isinstance(each, tuple) else ("", each) for each in params]
        names = [name for name, _ in named if name]
        for pattern in adamw:
            if names and pattern not in ELSEWHERE and not any(fnmatch(n, pattern) for n in names):
                raise UserError(f"adamw={pattern}: must fit the name of a parameter; none is so")
        self.matrices, rest = list[Tensor](), list[Tensor]()
        for name, parameter in named:
            if parameter.ndim == 2 and not name:
                raise UserError("params=(without names): must be pairs of a name and a parameter")
            other = parameter.ndim != 2 or any(fnmatch(name, pattern) for pattern in adamw)
            (rest if other else self.matrices).append(parameter)
        # "fused" says that it learns on the device whether a step is good: see `step_only_if`.
        settings = rates | dict(newton_schulz=newton_schulz, betas=betas, fused=True)
        settings["momentum"] = momentum
        super().__init__([parameter for _, parameter in named], settings)
        self.adamw = torch.optim.AdamW([{"params": rest}], lr, betas, weight_decay=0.0, fused=True)
        self.found_inf: Tensor | None = None  # () float32, 1 for a step that is to be passed over

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step, after ``closure``, whose result is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        (group,) = self.param_groups
        self.adamw.state = self.state
        self.adamw.found_inf = self.found_inf  # type: ignore[attr-defined]
        self.adamw.param_groups[0].update(lr=group["lr"], betas=group["betas"])
        self.adamw.step()
        alike = dict[Any, list[Tensor]]()
        for weight in self.matrices:
            if weight.grad is not None:
                alike.setdefault((weight.shape, weight.dtype, weight.device), []).append(weight)
        for weights in alike.values():
            self._move(weights, group)
        return loss

    def _move(self, weights: list[Tensor], group: dict[str, Any]) -> None:
        """Matrices of one shape; nothing changes, to the last bit, where the step is bad."""
        first, bad = weights[0], self.found_inf
        good = torch.ones((), device=first.device) if bad is None else 1 - bad.to(first.device)
        gradients = [torch.where(good > 0, cast(Tensor, weight.grad), 0.0) for weight in weights]
        for weight in weights:
            if "momentum_buffer" not in self.state[weight]:
                self.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
        averages = [self.state[weight]["momentum_buffer"] for weight in weights]
        moves = ((1 - group["momentum"]) * good).to(first.dtype)
        torch._foreach_lerp_(averages, gradients, weights=[moves] * len(weights))
        ahead = torch.stack(torch._foreach_lerp(gradients, averages, group["momentum"]))
        lr = group["lr"] * group["matrix_scale"] * good
        size = 0.2 * max(first.shape) ** 0.5
        steps = orthogonal(ahead, group["newton_schulz"]).float() * (-lr * size)
        torch._foreach_mul_(weights, (1 - lr * group["weight_decay"]).to(first.dtype))
        torch._foreach_add_(weights, list(steps.to(first.dtype).unbind()))


def orthogonal(matrices: Tensor, steps: int) -> Tensor:
    """U V^T of matrices U S V^T, nearly: singular values end up between 0.7 and 1.2.

    Args:
        matrices: (N, A, B).
        steps: Of a quintic Newton-Schulz iteration: in bfloat16 but for the CPU, where few are fast
            in it.

    Returns:
        (N, A, B), in what it was computed in.
    """
    a, b, c = COEFFICIENTS
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.float() if matrices.device.type == "cpu" else matrices.bfloat16()
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
