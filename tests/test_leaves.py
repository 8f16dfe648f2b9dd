"""The closed forms of the study in the plane, and its configs, which are loaded as a user's are."""

import contextlib
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, quick
from recipes import OVERLAYS

from w2s_train.interpolant import CosineInterpolant, LinearInterpolant

sys.path.insert(0, str(ROOT / "experiments" / "leaves"))
import make
from leaves import TIMES, Leaves, sample_scores, velocity_errors

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


@pytest.mark.parametrize("t", quick([0.0, 0.3, 0.9]))
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


@pytest.mark.slow
@pytest.mark.long
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


@pytest.mark.slow
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


@pytest.mark.slow
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


SMALL = ["--model.generation_block=32", "--data.num_generated=96", "--trainer.max_steps=3"]


@pytest.fixture(scope="session")
def points() -> None:
    """Make the points, as the study does."""
    with contextlib.chdir(ROOT):
        make.prepare()


@pytest.fixture
def fit(points: None, command):
    """Run the command on a config of the study, which it may import from."""

    def run(name: str, *options: str, config: str = "few", **more: str) -> Path:
        path = f"../experiments/leaves/{config}"
        return command(name, "--allow_imports=leaves", *SMALL, *options, config=path, **more)

    return run


def scores(folder: Path) -> list[dict]:
    return json.loads((folder / "scores.json").read_text())


@pytest.mark.slow
@pytest.mark.long
def test_leaves_score_alike_on_any_number_of_processes_and_unconditionally(fit):
    """Batches of another size, and labels that stand for nothing."""
    folder = fit("fit")
    fit("validate", "--data.generation_batch_size=7", "--ckpt_path=last")
    assert [s["value"] for s in scores(folder)[:4]] == [s["value"] for s in scores(folder)[4:]]
    assert [s["metric"] for s in scores(folder)[:4]] == [
        "outliers",
        "coverage",
        "energy_distance",
        "velocity_error",
    ]
    free = fit("fit", "--model.label_dropout=1.0", folder="free")
    assert all(math.isfinite(s["value"]) for s in scores(free))


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_leaves_run_with_every_overlay(fit, overlay: str):
    """The tiny network has blocks for every source; scores of every kind are finite."""
    found = scores(fit("fit", "-c", f"configs/weak/{overlay}.yaml", config="many"))
    assert all(math.isfinite(s["value"]) for s in found)
    assert 0 <= min(s["value"] for s in found if s["metric"] == "coverage") <= 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "options, message",
    [
        (["--data.num_generated=7"], "num_generated=7: must be at least two points a class, 8"),
        (
            [
                "--trainer.callbacks={class_path: leaves.LeavesScores, "
                "init_args: {num_classes: 5, depth: 1}}"
            ],
            "num_classes=5: must equal the network's, 4",
        ),
        (["--model.autoencoder=null"], "in_channels=2: must be 2 for points, with the autoencoder"),
    ],
)
def test_what_cannot_be_scored(fit, tmp_path: Path, options: list[str], message: str):
    """Refused before any work."""
    with pytest.raises(SystemExit, match=f"^error: {message}"):
        fit("fit", *options)
    assert not (tmp_path / "run").exists()
