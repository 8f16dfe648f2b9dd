"""What the intermediate head and the null class see of the scales: the forms that were compared.

`DiT` itself is form (c): blocks before ``scales_from``, and heads on their tokens, see no scales.
With ``scales_from: 0`` it is form (b): the head's tokens carry them, its condition does not.
"""

from typing import Any

from torch import Tensor

from w2s_train.models import DiT, DiTOutput


class HeadTold(DiT):
    """Form (a), with ``scales_from: 0``: tokens and condition of the head carry the scales."""

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor, **options: Any) -> DiTOutput:
        """As `DiT.forward`."""
        out = super().forward(x_t, t, y, **options)
        return out._replace(cond=self.told(out.cond, options.get("scales")))


class OwnScale(DiT):
    """The null class is evaluated at the row's own scales instead of 0."""

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor, **options: Any) -> DiTOutput:
        """As `DiT.forward`; a pass without scales takes those of its rows in the pass before."""
        if options.get("scales") is not None:
            self.last = (x_t, options["scales"])
        elif self.training and (y == self.null_class).all() and hasattr(self, "last"):
            seen, scales = self.last
            same = (x_t.flatten(1)[:, None] == seen.flatten(1)).all(2)
            options["scales"] = scales[same.byte().argmax(1)]
        return super().forward(x_t, t, y, **options)
