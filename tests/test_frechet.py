"""The Fréchet distance against the libraries that compute it, and where they stop."""

import inspect

import numpy as np
import pytest
import scipy.linalg
import torch
from cleanfid.fid import frechet_distance as clean_fid_distance
from conftest import moments
from torchmetrics.image.fid import _compute_fid

from w2s_train.features.frechet import Moments, frechet_distance


def features_of_two_sets(n: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    mixing = torch.randn(size, size, dtype=torch.float64)
    x, y = torch.randn(2, n, size, dtype=torch.float64) @ mixing
    return x.relu(), (y + 0.3).relu()


def test_distance_equals_torchmetrics():
    x, y = features_of_two_sets(400, 48)
    a, b = moments(x), moments(y)
    ours = frechet_distance(a, b)
    torchmetrics = _compute_fid(a.mu, a.sigma, b.mu, b.sigma).item()
    assert ours == pytest.approx(torchmetrics, rel=1e-6)


@pytest.mark.skipif(
    "disp" not in inspect.signature(scipy.linalg.sqrtm).parameters,
    reason="clean-fid calls sqrtm(disp=False), which this SciPy no longer has",
)
def test_distance_equals_clean_fids():
    x, y = features_of_two_sets(400, 48)
    a, b = moments(x), moments(y)
    ours = frechet_distance(a, b)
    with pytest.warns(DeprecationWarning):
        arrays = [np.asarray(part) for part in (a.mu, a.sigma, b.mu, b.sigma)]
        theirs = clean_fid_distance(*arrays)
    assert ours == pytest.approx(theirs, rel=1e-6)


def test_singular_covariances():
    """Rank 5 of 32, commuting: sum (sqrt a - sqrt b)^2."""
    q, _ = torch.linalg.qr(torch.randn(32, 32, dtype=torch.float64))
    spectra = torch.zeros(2, 32, dtype=torch.float64)
    spectra[:, :5] = torch.rand(2, 5, dtype=torch.float64)
    a, b = ((q * spectrum) @ q.T for spectrum in spectra)
    zero = torch.zeros(32, dtype=torch.float64)
    ours = frechet_distance(Moments(zero, a, 9), Moments(zero, b, 9))
    expected = (spectra[0].sqrt() - spectra[1].sqrt()).square().sum().item()
    assert ours == pytest.approx(expected, rel=5e-6)
    # No spread at all: what is left is the distance of the means and the other trace.
    still = frechet_distance(Moments(zero + 1, 0 * a, 9), Moments(zero, b, 9))
    assert still == pytest.approx(32 + b.trace().item(), rel=1e-12)
