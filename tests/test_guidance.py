"""Each kind of guidance against its formula, and what it evaluates."""

import math
from pathlib import Path

import pytest
import torch
from conftest import perturbed, sources
from test_weak import small, unasked, write_checkpoint

from w2s_train.guidance import (
    AngleDomain,
    Autoguidance,
    ClassifierFree,
    Guidance,
    GuidanceObjective,
    Learned,
    Segmented,
    StageWise,
    Unguided,
)
from w2s_train.guidance.learned import ScaleNetwork, energy_distance, log_snr
from w2s_train.interpolant import CosineInterpolant, LinearInterpolant
from w2s_train.log import Log
from w2s_train.models import DiT
from w2s_train.objective import Objective, WeakToStrongObjective
from w2s_train.sampler import Euler, EulerMaruyama, Heun
from w2s_train.segment import Extrapolation, Segment
from w2s_train.timesteps import Uniform
from w2s_train.weak import Step

LINEAR = LinearInterpolant()
TIMES = Euler(10).times()
Y = torch.arange(6) % 5
X_T = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def objective(*segments: Segment, interpolant=LINEAR) -> Objective:
    return WeakToStrongObjective(interpolant, Uniform(), list(segments))


def close(ours: torch.Tensor, theirs: torch.Tensor, rtol: float = 1e-4, atol: float = 1e-5) -> None:
    """Equal to the rounding of a float32 network."""
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)


@torch.no_grad()
def at(guidance: Guidance, network: DiT, t: float, trained: Objective | None = None):
    guidance.bind(network, trained or objective())
    return guidance.field(network, Y, TIMES)(X_T, t, t)


@torch.no_grad()
def plain(network: DiT, t: float, y: torch.Tensor = Y, **options) -> torch.Tensor:
    return network(X_T.float(), torch.full((6,), t), y, **options).velocity.double()


def evaluations(guidance: Guidance, network: DiT, t: float, trained=None) -> int:
    """Rows that the network sees, in batches of 6."""
    rows = []
    hook = network.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    at(guidance, network, t, trained)
    hook.remove()
    return sum(rows) // 6


NULL = torch.full_like(Y, 5)


def test_autoguidance_extrapolates_from_a_weak_source(network: DiT):
    strong, weak = plain(network, 0.5), plain(network, 0.5, skip_blocks=[2])
    ours = at(Autoguidance(1.7, sources.LayerSkip([2])), network, 0.5)
    close(ours, weak + 1.7 * (strong - weak))
    assert evaluations(Autoguidance(1.7, sources.LayerSkip([2])), network, 0.5) == 2
    assert evaluations(Autoguidance(1.0, sources.LayerSkip([2])), network, 0.5) == 1
    limited = Autoguidance(1.7, sources.LayerSkip([2]), low=0.2, high=0.4)
    assert torch.equal(at(limited, network, 0.5), strong)
    assert evaluations(limited, network, 0.5) == 1


def test_autoguidance_by_a_file(network: DiT, tmp_path: Path):
    early = perturbed(small(depth=2))
    path = write_checkpoint(tmp_path / "early.ckpt", early)
    ours = at(Autoguidance(2.0, sources.Checkpoint(path)), network, 0.3)
    close(ours, 2 * plain(network, 0.3) - plain(early, 0.3))


def test_autoguidance_by_what_the_run_was_trained_with(network: DiT):
    """A trained head below 0.3, the null class from 0.5 on, nothing in between."""
    head = sources.IntermediateHead(block=1)
    trained = objective(
        Extrapolation(0.0, 0.3, 0.2, head), Extrapolation(0.5, 1.0, 0.2, sources.NullClass())
    )
    trained.bind(network)
    perturbed(head)
    guidance = Autoguidance(1.5)
    with torch.no_grad():
        out = network(X_T.float(), torch.full((6,), 0.2), Y, keep_hidden=[1])
        mid = head.head(out.hidden[1], out.cond).double()
    expected = mid + 1.5 * (plain(network, 0.2) - mid)
    close(at(guidance, network, 0.2, trained), expected)
    null = plain(network, 0.7, NULL)
    expected = null + 1.5 * (plain(network, 0.7) - null)
    close(at(guidance, network, 0.7, trained), expected)
    assert torch.equal(at(guidance, network, 0.4, trained), plain(network, 0.4))
    assert [evaluations(guidance, network, t, trained) for t in (0.2, 0.4, 0.7)] == [1, 1, 2]
    assert guidance.needs_label


def test_segments_evaluate_only_what_they_need(network: DiT):
    low = Autoguidance(1.5, sources.LayerSkip([1]))
    guidance = Segmented(0.4, low_noise=low, high_noise=ClassifierFree(2.0))
    assert torch.equal(at(guidance, network, 0.3), at(low, network, 0.3))
    assert torch.equal(at(guidance, network, 0.4), at(ClassifierFree(2.0), network, 0.4))
    seen = []
    hook = network.register_forward_pre_hook(lambda _, args: seen.append((args[2] == 5).any()))
    at(guidance, network, 0.3)
    hook.remove()
    assert not any(seen)  # no null pass below the border
    half = Segmented(0.4, low_noise=Unguided(), high_noise=ClassifierFree(2.0))
    assert [evaluations(half, network, t) for t in (0.3, 0.5)] == [1, 2]


@pytest.mark.parametrize("sampler", [Euler(10), Heun(7), EulerMaruyama(LINEAR, 12)])
def test_stage_wise_scales_have_the_stated_mean(sampler):
    """A triangle with its peak in the middle; sum of s dt = the scale."""
    times = sampler.times()
    scales = StageWise(2.5).scales(times)
    lengths = [t - s for t, s in zip(times, times[1:], strict=False)]
    assert sum(s * d for s, d in zip(scales, lengths, strict=True)) == pytest.approx(2.5)
    peak = len(scales) // 2
    assert scales[: peak + 1] == sorted(scales[: peak + 1])
    assert scales[peak:] == sorted(scales[peak:], reverse=True)
    ratio = scales[0] / scales[peak]
    assert ratio < 0.6
    assert StageWise(1.0).scales(times) == pytest.approx([1.0] * len(lengths))


def test_stage_wise_applies_the_scale_of_its_step(network: DiT):
    guidance = StageWise(2.0)
    scales = guidance.scales(TIMES)
    for i in (0, 4, 9):
        cfg = at(ClassifierFree(scales[i]), network, TIMES[i])
        close(at(guidance, network, TIMES[i]), cfg)


@pytest.mark.parametrize("interpolant", [LinearInterpolant(), CosineInterpolant()])
def test_velocity_of_data_inverts_data_of_velocity(interpolant):
    v, t = torch.randn_like(X_T), torch.linspace(0.1, 1.0, 6, dtype=torch.float64)
    x = interpolant.velocity_to_data(v, X_T, t)
    close(interpolant.data_to_velocity(x, X_T, t), v)


def test_angle_domain_turns_by_gamma_theta():
    """cos(gamma theta) x_c + sin(gamma theta) / sin(theta) e, with e across x_u."""
    theta = 0.2
    x_u = torch.tensor([[1.0, 0.0, 0.0]]).view(1, 3, 1, 1)
    x_c = torch.tensor([[math.cos(theta), math.sin(theta), 0.0]]).view(1, 3, 1, 1)
    guided = AngleDomain(2.5).rotate(x_c, x_u).flatten()
    turned = (1.5 + 1e-3) * theta
    by_hand = math.cos(turned) * x_c.flatten().double()
    by_hand[1] += math.sin(turned)  # e = (0, sin theta, 0), over sin theta
    close(guided, by_hand)
    # At most 60 degrees, whatever the scale; and parallel predictions stay what they are.
    wild, capped = AngleDomain(1000.0), math.pi / 3
    expected = math.cos(capped) * x_c.flatten().double()
    expected[1] += math.sin(capped)
    close(wild.rotate(x_c, x_u).flatten(), expected)
    close(wild.rotate(3 * x_u, x_u), 3 * x_u.double())


@pytest.mark.parametrize("interpolant", [LinearInterpolant(), CosineInterpolant()])
def test_angle_domain_at_scale_one_is_unguided(network: DiT, interpolant):
    ours = at(AngleDomain(1.0), network, 0.6, objective(interpolant=interpolant))
    close(ours, plain(network, 0.6), rtol=0.02, atol=0.02)


def test_energy_distance():
    """Zero in the mean for equal laws, 2 |d| for point masses d apart."""
    one, other = torch.randn(2, 4000, 4, 9)
    assert abs(energy_distance(one, other).mean()) < 0.01
    zeros = torch.zeros(1, 3, 4)
    shifted = zeros + torch.tensor([3.0, 0, 0, 0])
    close(energy_distance(zeros, shifted), torch.tensor([2 * 3 / 2.0]))


def test_log_snr():
    levels = log_snr(torch.tensor([0.0, 0.5, 0.25, 1.0]), LINEAR)
    close(levels, torch.tensor([20.0, 0.0, 2 * math.log(3), -20.0]))


def test_the_learned_scale_starts_unguided(network: DiT):
    trained = GuidanceObjective(LINEAR)
    trained.bind(network)
    close(at(Learned(), network, 0.5, trained), plain(network, 0.5))
    with torch.no_grad():
        trained.scales.mlp[-1].bias.fill_(-1.0)  # ReLU: no label at all
    ours = at(Learned(), network, 0.5, trained)
    close(ours, plain(network, 0.5, NULL))


@pytest.mark.slow
def test_the_learned_scale_finds_the_true_field():
    """The network's label does half of what it should: the best scale is 2.

    Classes are points at +-1, so that with a label the optimal velocity is (x_t - x) / t.
    """

    class Half(DiT):
        def forward(self, x_t, t, y, **options):
            out = super().forward(x_t, t, y, **options)
            x = torch.where(y == 2, 0.0, torch.where(y == 1, 0.5, -0.5)).view(-1, 1, 1, 1)
            return out._replace(velocity=(x_t - x) / t.view(-1, 1, 1, 1).clamp(min=0.05))

    network = Half(1, 1, 1, 8, 1, 1, num_classes=2)
    trained = GuidanceObjective(LINEAR, particles=8, longest_step=0.5, hidden_size=16)
    trained.bind(network)
    optimizer = torch.optim.Adam(trained.parameters(), lr=2e-2)
    y = torch.arange(256) % 2
    x = (2.0 * y - 1).view(-1, 1, 1, 1)
    for _ in range(60):
        optimizer.zero_grad()
        trained(network, x, y, Step(), Log()).mean().backward()
        optimizer.step()
    with torch.no_grad():
        t = torch.linspace(0.5, 0.9, 20)
        scales = trained.scales(t - 0.3, t, torch.arange(20) % 2, LINEAR)
    assert all(p.grad is None for p in network.parameters())
    assert scales.mean() == pytest.approx(2.0, abs=0.15)


def test_learned_scales_from_a_file(network: DiT, tmp_path: Path):
    scales = ScaleNetwork(num_classes=5, hidden_size=24)
    perturbed(scales, 0.5)
    state = {f"objective.scales.{k}": v for k, v in scales.state_dict().items()}
    path = tmp_path / "learned.ckpt"
    torch.save({"state_dict": state, "network": {}}, path)
    guidance = Learned(str(path))
    ours = at(guidance, network, 0.5)
    s = scales(torch.full((6,), 0.4), torch.full((6,), 0.5), Y, LINEAR).view(-1, 1, 1, 1).double()
    null = plain(network, 0.5, NULL)
    close(ours, null + s * (plain(network, 0.5) - null))
    with pytest.raises(ValueError, match="has 5 classes, must have 7"):
        Learned(str(path)).bind(small(num_classes=7), objective())
    torch.save({"state_dict": {}, "network": {}}, path)
    with pytest.raises(ValueError, match="must come from a fit with GuidanceObjective"):
        Learned(str(path))


def test_combinations_that_cannot_be():
    network = small()
    with pytest.raises(ValueError, match="weak=Snapshot: its state comes from training"):
        Autoguidance(1.5, sources.Snapshot())
    with pytest.raises(ValueError, match="weak=None: must be given"):
        Autoguidance(1.5).bind(network, objective())
    with pytest.raises(ValueError, match="path=None: must be a checkpoint"):
        Learned().bind(network, objective())
    nested = Segmented(0.5, low_noise=Learned(), high_noise=Unguided())
    with pytest.raises(ValueError, match="path=None"):
        nested.bind(network, objective())
    assert nested.needs_label
    assert not Segmented(0.5, Unguided(), Unguided()).needs_label


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: Autoguidance(-1.0, sources.LayerSkip()), "scale"),
        (lambda: Autoguidance(1.5, sources.LayerSkip(), low=0.8, high=0.2), "low"),
        (lambda: Segmented(1.0, Unguided(), Unguided()), "border"),
        (lambda: StageWise(0.5), "scale"),
        (lambda: AngleDomain(float("nan")), "scale"),
        (lambda: AngleDomain(0.5), "scale"),
        (lambda: GuidanceObjective(LINEAR, particles=1), "particles"),
        (lambda: GuidanceObjective(LINEAR, longest_step=0.0), "longest_step"),
    ],
)
def test_bad_guidance(make, name: str):
    with pytest.raises(ValueError, match=f"{name}="):
        make()


def test_guidance_runs_in_the_precision_of_its_network(network: DiT):
    """Under autocast the weak pass sees what the strong one sees: a twin is no guidance."""
    seen = []
    guidance = Autoguidance(3.0, sources.Checkpoint(network=network))
    hook = network.register_forward_pre_hook(lambda _, args: seen.append((args[0].dtype, args[1])))
    guidance.weak.network.register_forward_pre_hook(
        lambda _, args: seen.append((args[0].dtype, args[1]))
    )
    with torch.autocast("cpu", torch.bfloat16):
        ours = at(guidance, network, 0.98)
        hook.remove()
        plain = at(Unguided(), network, 0.98)
    assert [dtype for dtype, _ in seen] == [torch.float32] * 2
    assert torch.equal(seen[0][1], seen[1][1])
    assert torch.equal(ours, plain)


def test_a_source_that_is_not_there_yet_does_not_guide(network: DiT):
    trained = objective(Extrapolation(0.0, 1.0, 0.3, sources.Snapshot(step=3)))
    trained.bind(network)
    trained.plan(10)
    guidance = Autoguidance(2.0)
    assert torch.equal(at(guidance, network, 0.5, trained), plain(network, 0.5))
    assert "not there yet" in guidance.describe()
    early = perturbed(small())
    trained.segments[0].weak.after_step(early, Step(3), unasked)
    expected = 2 * plain(network, 0.5) - plain(early, 0.5)
    close(at(guidance, network, 0.5, trained), expected)
    assert guidance.describe() == "autoguidance(2, Snapshot(3, raw), [0, 1])"


def test_protocols_tell_guidances_apart(network: DiT, tmp_path: Path):
    path = write_checkpoint(tmp_path / "early.ckpt", small())
    kinds = [
        Autoguidance(1.5, sources.Checkpoint(path)),
        Autoguidance(1.5, sources.Checkpoint(path, "raw")),
        Autoguidance(1.5, sources.LayerSkip([1])),
        Autoguidance(1.5, sources.LayerSkip([2])),
    ]
    for guidance in kinds:
        guidance.bind(network, objective())
    assert len({guidance.describe() for guidance in kinds}) == len(kinds)
    assert path in kinds[0].describe()
