"""The closed forms of the synthetic study."""

import json
import math

import pytest
import torch

from w2s_train.evaluation.leaves import TIMES, sample_scores, velocity_errors
from w2s_train.interpolant import CosineInterpolant, LinearInterpolant
from w2s_train.leaves import Leaves

REGIMES = [(4, 3), (24, 1), (1, 1)]
INTERPOLANTS = [LinearInterpolant(), CosineInterpolant()]


@pytest.mark.parametrize(("num_classes", "depth"), REGIMES)
def test_moments(num_classes: int, depth: int):
    """Zero mean, unit mean variance, and all classes alike."""
    leaves, generator = Leaves(num_classes, depth), torch.Generator().manual_seed(0)
    y = torch.arange(40_000) % num_classes
    x = leaves.sample(y, generator)
    torch.testing.assert_close(x.mean(0), torch.zeros(2).double(), atol=0.03, rtol=0)
    assert x.var(0).mean() == pytest.approx(1.0, abs=0.03)
    assert len(leaves.weights) == num_classes * 4 * (2**depth - 1)


@pytest.mark.parametrize("t", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("y", [2, 4])
def test_the_density_integrates_to_its_class(t: float, y: int):
    """1/4 for a class of four, 1 for the null class."""
    leaves, side = Leaves(4, 1), torch.linspace(-3.5, 3.5, 400, dtype=torch.float64)
    total = 0.0
    for points in torch.cartesian_prod(side, side).split(10_000):
        now, label = torch.full((len(points),), t), torch.full((len(points),), y)
        total += float(leaves.log_density(points, now, label).exp().sum())
    wanted = 0.25 if y < 4 else 1.0
    assert total * (side[1] - side[0]) ** 2 == pytest.approx(wanted, abs=2e-3)


@pytest.mark.parametrize("interpolant", INTERPOLANTS, ids=["linear", "cosine"])
@pytest.mark.parametrize("null", [False, True])
def test_the_optimal_velocity_follows_from_the_score(interpolant, null: bool):
    """E[e | x_t] = -sigma grad log p_t, by automatic differentiation; then x, and v."""
    leaves, generator = Leaves(4, 2), torch.Generator().manual_seed(1)
    y = torch.full((50,), 4) if null else torch.arange(50) % 4
    t = torch.linspace(0.05, 0.95, 50, dtype=torch.float64)
    x = leaves.sample(torch.arange(50) % 4, generator)
    noise = torch.randn(50, 2, generator=generator, dtype=torch.float64)
    x_t = interpolant.corrupt(x, noise, t).x_t.requires_grad_()
    log = leaves.log_density(x_t, t, y, interpolant)
    (score,) = torch.autograd.grad(log.sum(), x_t)
    alpha, sigma, alpha_dot, sigma_dot = (c.unsqueeze(1) for c in interpolant.coefficients(t))
    e = -sigma * score
    by_score = alpha_dot * (x_t - sigma * e) / alpha + sigma_dot * e
    ours = leaves.optimal_velocity(x_t.detach(), t, y, interpolant)
    torch.testing.assert_close(ours, by_score.detach())


def test_scores_of_true_points():
    """1 % outliers, nearly full coverage, no distance; and no error for the optimal field."""
    leaves, y = Leaves(4, 3), torch.arange(8000) % 4
    x = leaves.sample(y, torch.Generator().manual_seed(5))
    scores = sample_scores(leaves, x, y)
    assert scores["outliers"] == pytest.approx(0.01, abs=0.005)
    assert scores["coverage"] > 0.95
    assert scores["energy_distance"] < 1e-3
    swapped = sample_scores(leaves, x.roll(1, 0), y)
    assert swapped["outliers"] > 0.95
    one_branch = x.clone()
    one_branch[:] = leaves.means[leaves.labels == 0][0]
    assert sample_scores(leaves, one_branch, torch.zeros_like(y))["coverage"] < 0.2

    def optimal(x_t, t, start):
        times = torch.full((len(x_t),), t, dtype=torch.float64)
        v = leaves.optimal_velocity(x_t.flatten(1), times, y[:500], LinearInterpolant())
        return v.view(-1, 2, 1, 1)

    errors = velocity_errors(leaves, optimal, y[:500], LinearInterpolant())
    assert len(errors) == len(TIMES)
    assert max(errors) < 1e-12
    off = velocity_errors(leaves, lambda *a: optimal(*a) + 0.3, y[:500], LinearInterpolant())
    assert off == pytest.approx([0.3 * 2**0.5] * len(TIMES))


@pytest.mark.parametrize(("num_classes", "depth"), [(0, 1), (3, 0)])
def test_bad_leaves(num_classes: int, depth: int):
    with pytest.raises(ValueError, match="must be at least 1"):
        Leaves(num_classes, depth)


def test_unconditional_points():
    """The null class stands for the whole mixture, in samples and in scores."""
    leaves, null = Leaves(4, 2), torch.full((6000,), 4)
    x = leaves.sample(null, torch.Generator().manual_seed(7))
    scores = sample_scores(leaves, x, null)
    assert scores["outliers"] == pytest.approx(0.01, abs=0.006)
    assert scores["coverage"] > 0.95
    assert abs(scores["energy_distance"]) < 2e-3
    one_class = leaves.sample(torch.zeros(6000, dtype=torch.long), torch.Generator().manual_seed(7))
    assert sample_scores(leaves, one_class, null)["coverage"] < 0.3


def test_true_points_have_no_energy_distance():
    """Unbiased: the mean over draws is zero, also for few points."""
    leaves, y = Leaves(24, 1), torch.arange(240) % 24
    draws = [
        sample_scores(leaves, leaves.sample(y, torch.Generator().manual_seed(i)), y, seed=1000 + i)
        for i in range(40)
    ]
    assert (
        abs(sum(d["energy_distance"] for d in draws) / 40) < 0.01
    )  # with the zero diagonals it would be 0.1
    assert min(d["energy_distance"] for d in draws) < 0


def test_leaves_score_alike_on_any_number_of_processes_and_unconditionally(command):
    """Batches of another size, and labels that stand for nothing."""
    few = ["--model.generation_block=32", "--data.num_generated=96", "--trainer.max_steps=3"]
    folder = command("fit", *few, config="leaves/few")
    command(
        "validate", *few, "--data.generation_batch_size=7", "--ckpt_path=last", config="leaves/few"
    )
    scores = json.loads((folder / "scores.json").read_text())
    assert [s["value"] for s in scores[:4]] == [s["value"] for s in scores[4:]]
    free = command("fit", *few, "--model.label_dropout=1.0", config="leaves/few", folder="free")
    assert all(math.isfinite(s["value"]) for s in json.loads((free / "scores.json").read_text()))
