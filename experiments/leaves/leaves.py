"""Leaves: a recursive mixture of Gaussians in two dimensions whose optimal velocity is known.

Each class is a branch that leaves the centre in a direction of its own and forks ``depth - 1``
times, every fork shorter and thinner. Two regimes matter for guidance: few classes that fork deeply
(4, 3) and many plain ones (24, 1). The idea of such a study is that of Karras et al. (2024,
"Guiding a Diffusion Model with a Bad Version of Itself"); the geometry is our own.

For x ~ sum_k p_k N(m_k, C_k) and x_t = alpha x + sigma e, component k of x_t is Gaussian with mean
alpha m_k and covariance S_k = alpha^2 C_k + sigma^2 I, and given x_t and k

    E[x | x_t, k] = m_k + alpha C_k S_k^-1 (x_t - alpha m_k),
    E[e | x_t, k] = sigma S_k^-1 (x_t - alpha m_k).

The optimal velocity is alpha' E[x | x_t] + sigma' E[e | x_t], averaged over k with its posterior.

`LeavesScores` scores points as a callback of a run; a config names it as ``leaves.LeavesScores``,
which the command imports with ``PYTHONPATH=experiments/leaves`` and ``--allow_imports leaves``.
"""

import math
from dataclasses import dataclass
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
from w2s_train.guidance.learned import energy_distance
from w2s_train.interpolant import Interpolant, LinearInterpolant
from w2s_train.scores import append_scores

PER_BRANCH, FORK, SHRINK = 4, math.radians(38), 0.62  # components; angle and shrinkage of a fork
START, LENGTH, WIDTH = 0.35, 1.0, 0.055  # of the first branch
TIMES = tuple(round(0.05 + 0.1 * i, 2) for i in range(10))  # where velocities are compared
OUTSIDE = 0.01  # a sample is an outlier if its density is below that of all but 1 % of the data


@dataclass(frozen=True)
class Branch:
    """A straight piece: start, direction, length and width."""

    start: tuple[float, float]
    angle: float
    length: float
    width: float


def grow(branch: Branch, depth: int) -> list[Branch]:
    """A branch with everything that grows from its end."""
    if depth == 1:
        return [branch]
    direction = (math.cos(branch.angle), math.sin(branch.angle))
    end = tuple(s + branch.length * d for s, d in zip(branch.start, direction, strict=True))
    grown = [branch]
    for turn in (-FORK, FORK):
        child = Branch(end, branch.angle + turn, SHRINK * branch.length, SHRINK * branch.width)  # type: ignore[arg-type]
        grown += grow(child, depth - 1)
    return grown


class Leaves:
    """The mixture, scaled to unit variance per dimension; all tensors float64.

    Args:
        num_classes: Number of classes, all equally likely.
        depth: Levels of branches, at least 1.

    Raises:
        UserError: A number below 1.
    """

    def __init__(self, num_classes: int, depth: int) -> None:
        for name, value in dict(num_classes=num_classes, depth=depth).items():
            if value < 1:
                raise UserError(f"{name}={value}: must be at least 1")
        self.num_classes, self.depth = num_classes, depth
        means, covariances, weights, labels = [], [], [], []
        for label in range(num_classes):
            angle = 2 * math.pi * label / num_classes
            start = (START * math.cos(angle), START * math.sin(angle))
            for branch in grow(Branch(start, angle, LENGTH, WIDTH), depth):
                direction = torch.tensor([math.cos(branch.angle), math.sin(branch.angle)])
                across = torch.stack([-direction[1], direction[0]])
                piece = branch.length / PER_BRANCH
                covariance = (piece / 2) ** 2 * torch.outer(direction, direction)
                covariance = covariance + branch.width**2 * torch.outer(across, across)
                for i in range(PER_BRANCH):
                    means.append(torch.tensor(branch.start) + (i + 0.5) * piece * direction)
                    covariances.append(covariance)
                    weights.append(branch.length)
                    labels.append(label)
        self.means, self.covariances = (
            torch.stack(means).double(),
            torch.stack(covariances).double(),
        )
        self.weights, self.labels = torch.tensor(weights).double(), torch.tensor(labels)
        self.weights /= self.weights.sum()
        self._normalize()

    def _normalize(self) -> None:
        """Zero mean by symmetry or shift, and unit mean variance."""
        self.means -= self.weights @ self.means
        second = self.covariances + self.means.unsqueeze(2) * self.means.unsqueeze(1)
        variance = torch.einsum("k,kii->", self.weights, second) / 2
        self.means /= variance.sqrt()
        self.covariances /= variance

    def prior(self, y: Tensor) -> Tensor:
        """Share of every component in the classes (N,): (N, K)."""
        mine = (self.labels == y.unsqueeze(1)) | (y.unsqueeze(1) == self.num_classes)
        return mine * self.weights / (mine * self.weights).sum(1, keepdim=True)

    def sample(self, y: Tensor, generator: torch.Generator) -> Tensor:
        """Points (N, 2) of given classes (N,); of all of them for the null class."""
        k = torch.multinomial(self.prior(y), 1, generator=generator).squeeze(1)
        noise = torch.randn(len(y), 2, 1, generator=generator, dtype=torch.float64)
        return self.means[k] + (torch.linalg.cholesky(self.covariances)[k] @ noise).squeeze(2)

    def _components(
        self, x_t: Tensor, t: Tensor, y: Tensor, interpolant: Interpolant
    ) -> tuple[Tensor, Tensor]:
        """Log p_k N(x_t) (N, K), -inf for other classes, and S_k^-1 (x_t - alpha m_k) (N, K, 2)."""
        alpha, sigma, *_ = interpolant.coefficients(t.double())
        s = alpha.square().view(-1, 1, 1, 1) * self.covariances
        s = s + sigma.square().view(-1, 1, 1, 1) * torch.eye(2, dtype=torch.float64)
        offset = x_t.double().unsqueeze(1) - alpha.view(-1, 1, 1) * self.means
        solved = torch.linalg.solve(s, offset.unsqueeze(3)).squeeze(3)
        log = -0.5 * (offset * solved).sum(2) - 0.5 * torch.linalg.det(s).log()
        log = log + self.weights.log() - math.log(2 * math.pi)
        other = (self.labels != y.unsqueeze(1)) & (y.unsqueeze(1) != self.num_classes)
        return log.masked_fill(other, -torch.inf), solved

    def log_density(
        self, x_t: Tensor, t: Tensor, y: Tensor, interpolant: Interpolant | None = None
    ) -> Tensor:
        """The log density p(x_t, y) at points (N, 2), times (N,) and labels (N,): (N,) float64.

        The null class, ``num_classes``, stands for p(x_t).
        """
        log, _ = self._components(x_t, t, y, interpolant or LinearInterpolant())
        return log.logsumexp(1)

    def posterior(self, x: Tensor, y: Tensor) -> Tensor:
        """Of every component, given data (N, 2) and labels (N,): (N, K)."""
        log, _ = self._components(x, torch.zeros(len(x)), y, LinearInterpolant())
        return log.softmax(1)

    def optimal_velocity(
        self, x_t: Tensor, t: Tensor, y: Tensor, interpolant: Interpolant
    ) -> Tensor:
        """E[v | x_t, y] at points (N, 2), times (N,) and labels (N,): (N, 2) float64."""
        log, solved = self._components(x_t, t, y, interpolant)
        alpha, sigma, alpha_dot, sigma_dot = (
            c.view(-1, 1, 1) for c in interpolant.coefficients(t.double())
        )
        x = self.means + alpha * (self.covariances @ solved.unsqueeze(3)).squeeze(3)
        return (log.softmax(1).unsqueeze(2) * (alpha_dot * x + sigma_dot * sigma * solved)).sum(1)


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
    pairs = [(x[y == c][None], true[y == c][None]) for c in y.unique()]
    distances = [2**0.5 * energy_distance(*pair) for pair in pairs]  # in the plane, not per axis
    return {
        "outliers": float(outliers),
        "coverage": float(torch.minimum(shares, expected).sum()),
        "energy_distance": float(torch.cat(distances).mean()),
    }


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

    def check(self, module: Any, data: Any, *, made_later: bool) -> None:
        """Refuse a network for other data, and too few points.

        Raises:
            UserError: Other classes, no points of two coordinates, or fewer than two a class.
        """
        network, classes, n = module.network, self.leaves.num_classes, data.num_generated
        if n < 2 * classes:
            raise UserError(
                f"num_generated={n}: must be at least two points a class, {2 * classes}"
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
        return f"leaves({self.leaves.num_classes}, {self.leaves.depth})"

    def begin(self, trainer: Trainer, module: Any) -> None:
        self.batches: list[list[Any]] = [[] for _ in self.plans]
        self.null = self.leaves.num_classes if module.unconditional else None

    def take(self, group: int, images: Tensor, batch: dict[str, Tensor]) -> None:
        """Keep the points (B, 2, 1, 1) of one batch, and their places in the plan."""
        y = batch["label"].cpu()
        if self.null is not None:
            y = torch.full_like(y, self.null)
        self.batches[group].append([images.flatten(1).cpu(), y, batch["index"].cpu()])

    def state(self) -> Any:
        return self.batches

    def merge(self, state: Any) -> None:
        for mine, other in zip(self.batches, state, strict=True):
            mine += other

    def score(self, trainer: Trainer, module: Any) -> None:
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
