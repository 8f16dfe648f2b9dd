"""Velocities are derivatives, ends are data and noise, conversions invert."""

import pytest
import torch

from w2s_train.interpolant import CosineInterpolant, Interpolant, LinearInterpolant

BOTH = pytest.mark.parametrize("interpolant", [LinearInterpolant(), CosineInterpolant()])


def pair():
    return torch.randn(2, 5, 3, 4, 4, dtype=torch.float64)


@BOTH
def test_velocity_is_the_derivative(interpolant: Interpolant):
    x, noise = pair()
    t = torch.rand(5, dtype=torch.float64)
    path = lambda t: interpolant.corrupt(x, noise, t).x_t  # noqa: E731
    x_t, derivative = torch.func.jvp(path, (t,), (torch.ones_like(t),))
    noisy = interpolant.corrupt(x, noise, t)
    torch.testing.assert_close(noisy.v, derivative)
    torch.testing.assert_close(noisy.x_t, x_t)


@BOTH
def test_ends(interpolant: Interpolant):
    x, noise = pair()
    zero = torch.zeros(5, dtype=torch.float64)
    torch.testing.assert_close(interpolant.corrupt(x, noise, zero).x_t, x)
    torch.testing.assert_close(interpolant.corrupt(x, noise, zero + 1).x_t, noise)


@BOTH
def test_conversions_invert(interpolant: Interpolant):
    x, noise = pair()
    t = torch.linspace(0.05, 1, 5, dtype=torch.float64)
    noisy = interpolant.corrupt(x, noise, t)
    torch.testing.assert_close(interpolant.velocity_to_data(noisy.v, noisy.x_t, t), x)
    torch.testing.assert_close(interpolant.velocity_to_noise(noisy.v, noisy.x_t, t), noise)


@BOTH
def test_score_of_a_gaussian(interpolant: Interpolant):
    """For data N(0, 4): score = -x_t / var, and E[v | x_t] is linear in x_t."""
    t = torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    x_t = torch.randn(5, 1, 2, 2, dtype=torch.float64)
    alpha, sigma, alpha_dot, sigma_dot = (c.view(5, 1, 1, 1) for c in interpolant.coefficients(t))
    variance = 4 * alpha**2 + sigma**2
    v = (4 * alpha * alpha_dot + sigma * sigma_dot) / variance * x_t
    torch.testing.assert_close(interpolant.velocity_to_score(v, x_t, t), -x_t / variance)


@BOTH
def test_time_of_noise_level(interpolant: Interpolant):
    t = torch.linspace(0.01, 0.99, 9, dtype=torch.float64)
    alpha, sigma, *_ = interpolant.coefficients(t)
    torch.testing.assert_close(interpolant.time_of_noise_level(sigma / alpha), t)
