"""The Fréchet distance between two Gaussians, sums that make one, and files that hold one.

    d = |mu_1 - mu_2|^2 + tr(S_1 + S_2 - 2 (S_1^{1/2} S_2 S_1^{1/2})^{1/2})

(Dowson & Landau, 1982; Heusel et al., 2017, for its use on features). All in float64. The product
under the root is symmetric, so its eigenvalues are real and no general matrix square root, which
differs between SciPy versions, is needed.
"""

import json
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from w2s_train.errors import UserError
from w2s_train.files import atomic_write
from w2s_train.secrets import redacted


@dataclass(frozen=True)
class Moments:
    """Mean (F,) and covariance (F, F; ddof 1) of ``n`` feature vectors, float64."""

    mu: Tensor
    sigma: Tensor
    n: int

    @classmethod
    def from_sums(cls, total: Tensor, outer: Tensor, n: int) -> "Moments":
        """From the sum of x (F,), the sum of x x^T (F, F) and the number of vectors, n >= 2."""
        mu = total / n
        return cls(mu, (outer - n * torch.outer(mu, mu)) / (n - 1), n)


class FeatureSums:
    """How many feature vectors there were, their sum (F,) and that of x x^T (F, F); float64.

    Args:
        num_features: F.
        device: Where features come from.
    """

    def __init__(self, num_features: int, device: torch.device | str = "cpu") -> None:
        self.total = torch.zeros(num_features, dtype=torch.float64, device=device)
        self.outer = torch.zeros(num_features, num_features, dtype=torch.float64, device=device)
        self.count = 0

    def update(self, features: Tensor) -> None:
        """Take in features (B, F)."""
        features = features.double()
        self.total += features.sum(0)
        self.outer += features.T @ features
        self.count += len(features)

    def state(self) -> dict[str, Any]:
        """The three sums, on the host: the arguments of `add`."""
        return {"total": self.total.cpu(), "outer": self.outer.cpu(), "count": self.count}

    def add(self, total: Tensor, outer: Tensor, count: int | Tensor) -> None:
        """Take in the sums of features that were seen elsewhere."""
        self.total += total.to(self.total)
        self.outer += outer.to(self.outer)
        self.count += int(count)

    def moments(self) -> Moments:
        """Of everything so far, at least two vectors; on the host."""
        return Moments.from_sums(self.total.cpu(), self.outer.cpu(), self.count)


def frechet_distance(a: Moments, b: Moments) -> float:
    """The distance, at least 0 up to rounding; symmetric in ``a`` and ``b``."""
    values, vectors = torch.linalg.eigh(a.sigma)
    # A covariance of few samples has eigenvalues that are zero, and by rounding below zero.
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    product = root @ b.sigma @ root
    traces = torch.linalg.eigvalsh((product + product.T) / 2).clamp_min(0).sqrt().sum()
    squared = (a.mu - b.mu).square().sum()
    return float(squared + a.sigma.trace() + b.sigma.trace() - 2 * traces)


@dataclass(frozen=True)
class Reference:
    """Statistics of a data set, and what they were made from."""

    moments: Moments
    fingerprint: dict[str, str | int]  # at least "dataset", "split", "n" and "extractor"
    features: Tensor = field(default_factory=lambda: torch.zeros(0, 0))  # of some images, (M, F)

    def save(self, path: Path) -> None:
        """Write an ``.npz`` with mu, sigma, n, features and fingerprint; whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            np.savez(
                file,
                mu=self.moments.mu.numpy(),
                sigma=self.moments.sigma.numpy(),
                n=self.moments.n,
                features=self.features.float().numpy(),
                fingerprint=json.dumps(redacted(self.fingerprint)),
            )

    @classmethod
    def load(cls, path: Path) -> "Reference":
        """Read what `save` wrote.

        Raises:
            UserError: No such file, a broken one, or one without a fingerprint.
        """
        if not path.is_file():
            raise UserError(f"reference={path}: must be an existing file")
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
        except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile) as error:
            raise UserError(
                f"reference={path}: cannot be read ({type(error).__name__}); must be a file of "
                "lightning reference"
            ) from error
        if missing := {"mu", "sigma", "n", "fingerprint"} - set(arrays):
            raise UserError(f"reference={path}: lacks {', '.join(sorted(missing))}")
        fingerprint = json.loads(str(arrays["fingerprint"]))
        if missing := {"dataset", "split", "n", "extractor"} - set(fingerprint):
            raise UserError(f"reference={path}: its fingerprint lacks {', '.join(sorted(missing))}")
        mu, sigma = torch.from_numpy(arrays["mu"]), torch.from_numpy(arrays["sigma"])
        if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
            raise UserError(
                f"reference={path}: mu and sigma have shapes {tuple(mu.shape)} and "
                f"{tuple(sigma.shape)}, must be (F,) and (F, F)"
            )
        moments = Moments(mu.double(), sigma.double(), int(arrays["n"]))
        some = arrays.get("features", np.zeros((0, len(mu))))
        return cls(moments, fingerprint, torch.from_numpy(some).float())
