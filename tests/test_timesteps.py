"""Stratified draws follow the stated distribution, and a segment is one slice of them."""

import pytest
import torch

from w2s_train.interpolant import CosineInterpolant, LinearInterpolant
from w2s_train.time_shift import Shifted
from w2s_train.timesteps import EDMLogNormal, LogitNormal, TimestepDistribution, Uniform

CASES = [
    (Uniform(), LinearInterpolant()),
    (LogitNormal(0.5, 0.7), LinearInterpolant()),
    (EDMLogNormal(), LinearInterpolant()),
    (EDMLogNormal(-0.4, 1.0), CosineInterpolant()),
    (Shifted(Uniform(), dim=768 * 16 * 16), LinearInterpolant()),
    (Shifted(LogitNormal(), shift=0.5), CosineInterpolant()),
]
ALL = pytest.mark.parametrize("timesteps, interpolant", CASES)
CPU = torch.device("cpu")


@ALL
def test_cdf_inverts_quantile(timesteps: TimestepDistribution, interpolant):
    u = torch.linspace(0.001, 0.999, 41, dtype=torch.float64)
    t = timesteps.quantile(u, interpolant)
    cdf = torch.tensor([timesteps.cdf(value, interpolant) for value in t.tolist()])
    torch.testing.assert_close(cdf.double(), u, rtol=1e-6, atol=1e-6)
    assert (timesteps.cdf(0.0, interpolant), timesteps.cdf(1.0, interpolant)) == (0, 1)


@ALL
@pytest.mark.parametrize("n", [1, 7, 256])
def test_draws_are_stratified(timesteps: TimestepDistribution, interpolant, n: int):
    for _ in range(20):
        t = timesteps.draw(n, CPU, interpolant)
        assert ((t > 0) & (t < 1)).all()
        u = torch.tensor([timesteps.cdf(value, interpolant) for value in t.double().tolist()])
        rows = torch.arange(n)
        assert (u * n > rows - 1e-3).all()
        assert (u * n < rows + 1 + 1e-3).all()


def test_a_random_row_has_the_distribution():
    """Quantiles of many draws of 16 agree with those of the logit-normal distribution itself."""
    timesteps, linear = LogitNormal(-0.3, 0.8), LinearInterpolant()
    draws = torch.cat([timesteps.draw(16, CPU, linear) for _ in range(4000)])
    direct = torch.sigmoid(-0.3 + 0.8 * torch.randn(400_000))
    q = torch.tensor([0.01, 0.1, 0.5, 0.9, 0.99])
    torch.testing.assert_close(draws.quantile(q), direct.quantile(q), rtol=0.01, atol=0.003)


def test_stratified_means_vary_less():
    linear = LinearInterpolant()
    stratified = torch.stack([Uniform().draw(64, CPU, linear).mean() for _ in range(200)])
    independent = torch.rand(200, 64).mean(1)
    assert stratified.std() < independent.std() / 20


@ALL
@pytest.mark.parametrize("low, high", [(0.0, 0.2), (0.2, 0.8), (0.3, 1.0), (0.0, 1.0)])
def test_slices_hold_their_segment_and_little_else(timesteps, interpolant, low: float, high: float):
    n = 37
    rows = timesteps.rows(low, high, n, interpolant)
    for _ in range(50):
        t = timesteps.draw(n, CPU, interpolant)
        inside = (t >= low) & (t < high)
        assert not inside[: rows.start].any()
        assert not inside[rows.stop :].any()
        assert (~inside[rows]).sum() <= 2  # at most one row at each border


@pytest.mark.parametrize("std", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("cls", [LogitNormal, EDMLogNormal])
def test_bad_std(cls, std: float):
    with pytest.raises(ValueError, match="std="):
        cls(std=std)


def test_shifts():
    """The noise level is s times another one; four times the numbers double it."""
    u, linear = torch.linspace(0.1, 0.9, 9, dtype=torch.float64), LinearInterpolant()
    t = Shifted(Uniform(), dim=4 * 4096).quantile(u, linear)
    torch.testing.assert_close(t / (1 - t), 2 * u / (1 - u))
    assert Shifted(Uniform(), shift=3).quantile(u, linear)[4].item() == pytest.approx(0.75)
    assert torch.equal(
        Shifted(LogitNormal(), dim=4096).quantile(u, linear), LogitNormal().quantile(u, linear)
    )
    for bad in ({}, {"dim": 1, "shift": 1}, {"dim": 0}, {"shift": 0.0}):
        with pytest.raises(ValueError, match="^(dim|shift)="):
            Shifted(Uniform(), **bad)
