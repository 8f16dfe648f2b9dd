"""What the intermediate head and the null class see of the scales: the forms that were compared.

With ``scales_from: 0`` a `DiT` is form (b): the head's tokens carry the scales, its condition does
not. From the block behind the head's on it is form (c): the head sees nothing of them.
"""

from typing import Any

from torch import Tensor

from w2s_train.models import DiT, DiTOutput


class Form(DiT):
    """A `DiT` whose pass is varied in one place."""

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        y: Tensor,
        *,
        skip_blocks: Any = (),
        keep_hidden: Any = (),
        resume: Any = None,
        scales: Tensor | None = None,
        places: Tensor | None = None,
    ) -> DiTOutput:
        """As `DiT.forward`."""
        options: Any = dict(skip_blocks=skip_blocks, keep_hidden=keep_hidden, resume=resume)
        options |= dict(places=places)
        scales = self.heard(x_t, y, scales)
        return self.told_out(super().forward(x_t, t, y, scales=scales, **options), scales)

    def heard(self, x_t: Tensor, y: Tensor, scales: Tensor | None) -> Tensor | None:
        """The scales that the pass is told."""
        return scales

    def told_out(self, out: DiTOutput, scales: Tensor | None) -> DiTOutput:
        """What it returns."""
        return out


class HeadTold(Form):
    """Form (a), with ``scales_from: 0``: tokens and condition of the head carry the scales."""

    def told_out(self, out: DiTOutput, scales: Tensor | None) -> DiTOutput:
        return out._replace(cond=self.told(out.cond, scales))


class OwnScale(Form):
    """The null class is evaluated at its rows' own scales, those of the pass before, not at 0."""

    last: tuple[Tensor, Tensor]

    def heard(self, x_t: Tensor, y: Tensor, scales: Tensor | None) -> Tensor | None:
        if scales is not None:
            self.last = (x_t, scales)
        elif self.training and bool((y == self.null_class).all()):
            seen, told = self.last
            same = (x_t.flatten(1)[:, None] == seen.flatten(1)).all(2)
            return told[same.byte().argmax(1)]
        return scales
