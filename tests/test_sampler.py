"""Solvers have their order on an exact Gaussian; guidance composes."""

import math

import pytest
import torch

from w2s_train.guidance import ClassifierFree, Unguided
from w2s_train.interpolant import CosineInterpolant, LinearInterpolant
from w2s_train.models import DiT
from w2s_train.sampler import Euler, EulerMaruyama, Heun
from w2s_train.time_shift import ShiftedSampler

STD = 0.5  # of the data


def gaussian_velocity(interpolant):
    """E[v | x_t] for data N(0, STD^2); the flow takes noise e to STD e exactly."""

    def velocity(x_t, t, start):
        time = torch.tensor(t, dtype=torch.float64)
        alpha, sigma, alpha_dot, sigma_dot = interpolant.coefficients(time)
        variance = alpha**2 * STD**2 + sigma**2
        return (alpha * alpha_dot * STD**2 + sigma * sigma_dot) / variance * x_t

    return velocity


def no_draw():
    raise AssertionError("an ODE needs no noise")


@pytest.mark.parametrize("interpolant", [LinearInterpolant(), CosineInterpolant()])
@pytest.mark.parametrize("cls, order", [(Euler, 1), (Heun, 2)])
def test_order_of_convergence(cls, order: int, interpolant):
    noise = torch.randn(64, 1, 2, 2, dtype=torch.float64)
    field = gaussian_velocity(interpolant)
    error = {n: (cls(steps=n)(field, noise, no_draw) - STD * noise).abs().max() for n in (128, 256)}
    assert math.log2(error[128] / error[256]) == pytest.approx(order, abs=0.2)


@pytest.mark.parametrize("interpolant", [LinearInterpolant(), CosineInterpolant()])
def test_sde_has_the_marginal(interpolant):
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(40_000, 1, 1, 1, generator=generator)
    draw = lambda: torch.randn(noise.shape, generator=generator)  # noqa: E731
    out = EulerMaruyama(interpolant, steps=250)(gaussian_velocity(interpolant), noise, draw)
    assert out.dtype == torch.float64
    assert out.std().item() == pytest.approx(STD, rel=0.02)
    assert abs(out.mean().item()) < 0.01
    # Noise on the way makes it forget where it started; the ODE keeps a covariance of STD.
    assert abs((out * noise).mean().item()) < 0.6 * STD


def test_sde_grid():
    times = EulerMaruyama(LinearInterpolant()).times()
    assert len(times) == 251
    assert times[-2:] == [pytest.approx(0.04), 0.0]


def test_shifted_grid():
    """Noise levels are s times those of the solver, and its step keeps its order."""
    times, shifted = Heun(8).times(), ShiftedSampler(Heun(8), shift=3).times()
    levels = [(t / (1 - t), s / (1 - s)) for t, s in zip(times[1:], shifted[1:], strict=True)]
    assert [other for _, other in levels] == pytest.approx([3 * one for one, _ in levels])
    assert (shifted[0], shifted[-1]) == (1, 0)
    noise, field = torch.randn(8, 1, 2, 2).double(), gaussian_velocity(LinearInterpolant())

    def error(steps: int) -> float:
        made = ShiftedSampler(Heun(steps), dim=9 * 4096)(field, noise, no_draw)
        return (made - STD * noise).abs().max().item()

    assert math.log2(error(64) / error(128)) == pytest.approx(2, abs=0.2)
    assert ShiftedSampler(Heun(8), dim=9 * 4096).describe() == "Shifted(3, Heun)"
    plain = EulerMaruyama(LinearInterpolant(), 50, last_step=0.1)
    times, wrapped = plain.times(), ShiftedSampler(plain, shift=3)
    assert wrapped.times()[-2:] == pytest.approx([0.1, 0.0]) and wrapped.times()[0] == 1
    assert all(late > t for late, t in zip(wrapped.times()[1:-2], times[1:-2], strict=True))
    assert ShiftedSampler(plain, shift=1).times() == pytest.approx(times)


def count_rows(network: DiT) -> list[int]:
    rows: list[int] = []
    network.register_forward_hook(lambda module, args, out: rows.append(len(args[0])))
    return rows


def test_evaluations(network: DiT):
    """Scale 1 and steps outside the interval cost one pass; inside, both passes share a batch."""
    y, noise = torch.arange(3), torch.randn(3, 3, 8, 8)
    rows = count_rows(network)
    Euler(steps=4)(Unguided().field(network, y, []), noise, no_draw)
    Euler(steps=4)(ClassifierFree(1.0).field(network, y, []), noise, no_draw)
    assert rows == [3] * 8
    rows.clear()
    Euler(steps=4)(ClassifierFree(2.0, low=0.5, high=0.75).field(network, y, []), noise, no_draw)
    assert rows == [3, 6, 6, 3]  # steps start at 1, 0.75, 0.5, 0.25
    rows.clear()
    Heun(steps=4)(ClassifierFree(2.0, low=0.75, high=0.75).field(network, y, []), noise, no_draw)
    assert rows == [3, 3, 6, 6, 3, 3, 3]  # both evaluations of a step alike; the last is Euler


def test_guidance_is_the_formula(network: DiT):
    y, x_t = torch.arange(3), torch.randn(3, 3, 8, 8, dtype=torch.float64)
    t = torch.full((3,), 0.6)
    v_class = network(x_t.float(), t, y).velocity.double()
    v_null = network(x_t.float(), t, torch.full_like(y, 5)).velocity.double()
    ours = ClassifierFree(3.0).field(network, y, [])(x_t, 0.6, 0.6)
    torch.testing.assert_close(ours, v_null + 3 * (v_class - v_null), rtol=1e-4, atol=1e-5)
    for scale, same in ((1.0, v_class), (0.0, v_null)):
        ours = ClassifierFree(scale).field(network, y, [])(x_t, 0.6, 0.6)
        torch.testing.assert_close(ours, same, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "build, key",
    [
        (lambda: Euler(steps=0), "steps"),
        (lambda: EulerMaruyama(LinearInterpolant(), steps=1), "steps"),
        (lambda: EulerMaruyama(LinearInterpolant(), last_step=1.0), "last_step"),
        (lambda: ClassifierFree(float("nan")), "scale"),
        (lambda: ClassifierFree(-1.0), "scale"),
        (lambda: ClassifierFree(2.0, low=0.8, high=0.2), "low"),
    ],
)
def test_bad_arguments(build, key: str):
    with pytest.raises(ValueError, match=f"{key}="):
        build()
