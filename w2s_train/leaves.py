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
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from w2s_train.errors import UserError
from w2s_train.interpolant import Interpolant, LinearInterpolant

PER_BRANCH, FORK, SHRINK = 4, math.radians(38), 0.62  # components; angle and shrinkage of a fork
START, LENGTH, WIDTH = 0.35, 1.0, 0.055  # of the first branch


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
