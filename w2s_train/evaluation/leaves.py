"""Scores of the synthetic study: what only a known density can tell."""

from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from torch import Tensor

from w2s_train.autoencoder import Vectors
from w2s_train.errors import UserError
from w2s_train.evaluation.scorer import Scorer, gather
from w2s_train.generation import Setting
from w2s_train.guidance import VelocityField
from w2s_train.interpolant import Interpolant
from w2s_train.leaves import Leaves
from w2s_train.scores import append_scores

TIMES = tuple(round(0.05 + 0.1 * i, 2) for i in range(10))  # where velocities are compared
OUTSIDE = 0.01  # a sample is an outlier if its density is below that of all but 1 % of the data


def sample_scores(leaves: Leaves, x: Tensor, y: Tensor, seed: int = 0) -> dict[str, float]:
    """How generated points (N, 2) of classes (N,) compare with as many true ones.

    ``outliers``: share of points in regions of their class that hold 1 % of the data. ``coverage``:
    overlap of the shares that the mixture's components get with those they should get, 1 at best.
    ``energy_distance``: mean over classes of 2 E|X - Y| - E|X - X'| - E|Y - Y'|, unbiased, so that
    it may fall below 0. The null class stands for the whole mixture.
    """
    true = leaves.sample(y, torch.Generator().manual_seed(seed))
    now, x = torch.zeros(len(y)), x.double()
    threshold = leaves.log_density(true, now, y).quantile(OUTSIDE)
    outliers = (leaves.log_density(x, now, y) < threshold).double().mean()
    shares, expected = leaves.posterior(x, y).mean(0), leaves.prior(y).mean(0)
    distances = [energy_distance(x[y == c], true[y == c]) for c in y.unique()]
    return {
        "outliers": float(outliers),
        "coverage": float(torch.minimum(shares, expected).sum()),
        "energy_distance": float(torch.stack(distances).mean()),
    }


def energy_distance(x: Tensor, other: Tensor) -> Tensor:
    """Between two sets of points (N, D), at least two each; unbiased."""
    within = [torch.cdist(p, p).sum() / (len(p) * (len(p) - 1)) for p in (x, other)]
    return 2 * torch.cdist(x, other).mean() - within[0] - within[1]


def velocity_errors(
    leaves: Leaves, field: VelocityField, y: Tensor, interpolant: Interpolant, seed: int = 1
) -> list[float]:
    """RMS error of a field against the optimal velocity, at true noisy points, per time in `TIMES`.

    Args:
        leaves: The density.
        field: A velocity field for the labels ``y``.
        y: Labels (N,) int64.
        interpolant: The one of the field.
        seed: Of the points.
    """
    generator, errors = torch.Generator().manual_seed(seed), []
    x = leaves.sample(y, generator)
    for t in TIMES:
        times = torch.full((len(y),), t, dtype=torch.float64)
        noise = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        x_t = interpolant.corrupt(x, noise, times).x_t
        optimal = leaves.optimal_velocity(x_t, times, y, interpolant)
        ours = field(x_t.view(-1, 2, 1, 1), t, t).view(-1, 2)
        errors.append(float((ours - optimal).square().sum(1).mean().sqrt()))
    return errors


class LeavesScores(Scorer):
    """Scores the points of every validation and appends the scores to ``scores.json``.

    Args:
        num_classes: Of the mixture.
        depth: Of the mixture.
    """

    def __init__(self, num_classes: int, depth: int) -> None:
        self.leaves = Leaves(num_classes, depth)

    def check_model(self, module: Any, num_generated: int) -> None:
        """Refuse a network for other data, and too few points.

        Raises:
            UserError: Other classes, no points of two coordinates, or fewer than two a class.
        """
        network, classes = module.network, self.leaves.num_classes
        if num_generated < 2 * classes:
            raise UserError(
                f"num_generated={num_generated}: must be at least two points a class, {2 * classes}"
            )
        if network.num_classes != classes:
            raise UserError(
                f"num_classes={classes}: must equal the network's, {network.num_classes}"
            )
        if network.in_channels != 2 or not isinstance(module.autoencoder, Vectors):
            raise UserError(
                f"in_channels={network.in_channels}: must be 2 for points, with the autoencoder "
                "w2s_train.autoencoder.Vectors"
            )

    def describe(self) -> str:
        """The density."""
        return f"leaves({self.leaves.num_classes}, {self.leaves.depth})"

    def begin(self, trainer: Trainer, module: Any) -> None:
        """Start with no points."""
        self.batches: list[list[Any]] = [[] for _ in self.plans]
        self.null = self.leaves.num_classes if module.unconditional else None

    def take(self, group: int, images: Tensor, batch: dict[str, Tensor]) -> None:
        """Keep the points (B, 2, 1, 1) of one batch, and their places in the plan."""
        y = batch["label"].cpu()
        if self.null is not None:
            y = torch.full_like(y, self.null)
        self.batches[group].append([images.flatten(1).cpu(), y, batch["index"].cpu()])

    def state(self) -> Any:
        """Points of every group."""
        return self.batches

    def merge(self, state: Any) -> None:
        """Add those of another process."""
        for mine, other in zip(self.batches, state, strict=True):
            mine += other

    def score(self, trainer: Trainer, module: Any) -> None:
        """Compute, log and append the scores of every group."""
        entries = []
        for group, plan in enumerate(self.plans):
            shares = gather(self.batches[group], trainer)
            parts = zip(*(batch for share in shares for batch in share), strict=True)
            x, y, index = (torch.cat(part) for part in parts)
            order = index.argsort()  # whatever the number of processes
            scores = sample_scores(self.leaves, x[order], y[order])
            scores["velocity_error"] = self._velocity_error(module, module.settings[plan.setting])
            scores = {name: float(f"{value:.5g}") for name, value in scores.items()}
            about = {"reference": self.describe()}
            entries += self.record(group, scores, len(x), module, about)
        if trainer.is_global_zero:
            append_scores(Path(trainer.default_root_dir), entries)

    @torch.no_grad()
    def _velocity_error(self, module: Any, setting: Setting) -> float:
        """Mean over times of the error of what is sampled, on 2,000 points."""
        y = torch.arange(2000) % self.leaves.num_classes
        if self.null is not None:
            y = torch.full_like(y, self.null)
        times = module.sampler.times()
        field = setting.guidance.field(setting.network, y.to(module.device), times)

        def on_host(x_t: Tensor, t: float, start: float) -> Tensor:
            start = min(time for time in times if time >= t)  # of the step that t falls into
            return field(x_t.to(module.device), t, start).cpu()

        with module.trainer.precision_plugin.forward_context():
            errors = velocity_errors(self.leaves, on_host, y, module.objective.interpolant)
        return sum(errors) / len(errors)
