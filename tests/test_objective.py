"""The gradient is that of the written equation, and frozen sources see their segment only."""

import copy
import warnings

import pytest
import torch
from conftest import perturbed, sources
from given import evaluate

from w2s_train.interpolant import LinearInterpolant, NoisySample
from w2s_train.log import Log
from w2s_train.models import DiT
from w2s_train.objective import WeakToStrongObjective
from w2s_train.schedule import Schedule
from w2s_train.segment import Consistency, Extrapolation, Segment
from w2s_train.timesteps import LogitNormal, Uniform
from w2s_train.weak import Step, WeakSource

LINEAR = LinearInterpolant()


def objective(*segments: Segment, timesteps=None) -> WeakToStrongObjective:
    return WeakToStrongObjective(LINEAR, timesteps or Uniform(), list(segments))


def batch(n: int = 12):
    x, noise = torch.randn(2, n, 3, 8, 8)
    t = torch.rand(n)
    y = torch.arange(n) % 6  # some of them the null class, 5
    return LINEAR.corrupt(x, noise, t), y


def gradients(network: DiT, loss: torch.Tensor) -> list[torch.Tensor]:
    parameters = [p for p in network.parameters() if p.requires_grad]
    return [g.clone() for g in torch.autograd.grad(loss, parameters)]


def close(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_no_segments_is_flow_matching(network: DiT):
    noisy, y = batch()
    by_hand = (network(noisy.x_t, noisy.t, y).velocity - noisy.v).square().mean()
    losses = evaluate(objective(), network, noisy, y)
    torch.testing.assert_close(losses.total, by_hand)
    close(gradients(network, losses.total), gradients(network, by_hand))


def test_scale_zero_is_flow_matching(network: DiT):
    noisy, y = batch()
    plain = evaluate(objective(), network, noisy, y)
    zero = evaluate(objective(Extrapolation(0.0, 1.0, 0.0, sources.NullClass())), network, noisy, y)
    close(gradients(network, zero.total), gradients(network, plain.total))


def test_extrapolation_is_the_equation(network: DiT):
    """Target = v + w sg(strong - weak), the null class above 0.3, a trained head below."""
    noisy, y = batch()
    head = sources.IntermediateHead(block=1)
    head.bind(network)
    head.head.linear.weight.data += 0.1 * torch.randn_like(head.head.linear.weight)
    ours = objective(
        Extrapolation(0.3, 1.0, 0.6, sources.NullClass()),
        Extrapolation(0.0, 0.3, 0.2, head, weak_loss_weight=0.5),
    )
    out = network(noisy.x_t, noisy.t, y, keep_hidden=(1,))
    mid = head.head(out.hidden[1], out.cond)
    null = network(noisy.x_t, noisy.t, torch.full_like(y, 5)).velocity
    high = (noisy.t >= 0.3).view(-1, 1, 1, 1)
    shift = torch.where(high, 0.6 * (out.velocity - null), 0.2 * (out.velocity - mid)).detach()
    by_hand = (out.velocity - noisy.v - shift).square().mean()
    by_hand = by_hand + 0.5 * (mid - noisy.v).square().mean()
    losses = evaluate(ours, network, noisy, y)
    torch.testing.assert_close(losses.total, by_hand)
    parameters = [p for p in [*network.parameters(), *head.parameters()] if p.requires_grad]
    theirs = torch.autograd.grad(by_hand, parameters)
    close(torch.autograd.grad(losses.total, parameters), theirs)


def test_consistency_pulls_both_sides(network: DiT):
    """Strong + weight |strong - mid|^2 with gradients to both, inside the segment only."""
    noisy, y = batch()
    head = sources.IntermediateHead(block=1)
    head.bind(network)
    head.head.linear.weight.data += 0.1 * torch.randn_like(head.head.linear.weight)
    ours = objective(Consistency(0.0, 0.4, head, weight=0.2))
    out = network(noisy.x_t, noisy.t, y, keep_hidden=(1,))
    mid = head.head(out.hidden[1], out.cond)
    inside = (noisy.t < 0.4).float()
    pull = (out.velocity - mid).square().mean((1, 2, 3)) * inside
    by_hand = (out.velocity - noisy.v).square().mean() + 0.2 * pull.mean()
    losses = evaluate(ours, network, noisy, y)
    parameters = [p for p in [*network.parameters(), *head.parameters()] if p.requires_grad]
    theirs = torch.autograd.grad(by_hand, parameters)
    close(torch.autograd.grad(losses.total, parameters), theirs)


@pytest.mark.parametrize("timesteps", [Uniform(), LogitNormal()])
@pytest.mark.parametrize("n", [1, 5, 16])
def test_slices_equal_lookup(network: DiT, timesteps, n: int):
    """Static slices of stratified rows give what looking rows up gives, to rounding."""
    ours = objective(
        Extrapolation(0.0, 0.23, 0.3, sources.EMA()),
        Extrapolation(0.23, 0.81, 0.6, sources.NullClass()),
        timesteps=timesteps,
    )
    ours.bind(network)
    x, noise = torch.randn(2, n, 3, 8, 8)
    y = torch.arange(n) % 6
    noisy = LINEAR.corrupt(x, noise, timesteps.draw(n, x.device, LINEAR))
    sliced = evaluate(ours, network, noisy, y, ordered=True)
    found = evaluate(ours, network, noisy, y)
    torch.testing.assert_close(sliced.per_sample, found.per_sample)
    close(gradients(network, sliced.total), gradients(network, found.total))


class Counting(WeakSource):
    """Predicts zero, and remembers what it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[torch.Tensor] = []
        self.graded: list[bool] = []

    def predict(self, network, noisy, y, strong):
        assert len(noisy.t) == len(y) == len(strong.velocity) == len(noisy.x_t)
        self.calls.append(noisy.t)
        self.graded.append(torch.is_grad_enabled())
        return torch.zeros_like(noisy.v)


def test_a_frozen_source_runs_on_its_rows_only(network: DiT):
    source = Counting()
    ours = objective(Extrapolation(0.25, 0.75, 0.5, source))
    for _ in range(5):
        ours(network, torch.randn(64, 3, 8, 8), torch.zeros(64).long(), Step(), Log())
    assert [len(t) for t in source.calls] == [32] * 5  # half of the batch, the same every time
    assert not any(source.graded)
    assert all(((t >= 0.25) & (t < 0.75)).all() for t in source.calls)


def test_segments_without_rows_are_not_evaluated(network: DiT):
    source = Counting()
    noisy, y = batch()
    noisy = NoisySample(noisy.x_t, 0.1 + 0.1 * noisy.t, noisy.v)
    evaluate(objective(Extrapolation(0.5, 1.0, 0.5, source)), network, noisy, y)
    assert source.calls == []


def test_dropped_labels_get_no_guidance(network: DiT):
    noisy, y = batch()
    y = torch.full_like(y, network.null_class)
    segment = Extrapolation(0.0, 1.0, 0.6, sources.NullClass())
    guided = evaluate(objective(segment), network, noisy, y)
    plain = evaluate(objective(), network, noisy, y)
    torch.testing.assert_close(guided.per_sample, plain.per_sample)


def test_fixed_point_is_guidance_by_one_over_one_minus_scale():
    """Regressing a free vector on the moving target ends at weak + (v - weak) / (1 - scale)."""
    v, weak, scale = torch.tensor(2.0), torch.tensor(0.5), 0.6
    strong = torch.zeros((), requires_grad=True)
    optimizer = torch.optim.SGD([strong], lr=0.3)
    for _ in range(300):
        optimizer.zero_grad()
        (strong - (v + scale * (strong - weak).detach())).square().backward()
        optimizer.step()
    torch.testing.assert_close(strong.detach(), weak + (v - weak) / (1 - scale))


def test_autocast_keeps_the_gradient(network: DiT):
    """A weak pass without gradients must not cut the strong one's through cached bf16 weights."""
    noisy, y = batch()
    ours = objective(Extrapolation(0.0, 1.0, 0.5, sources.NullClass()))
    exact = gradients(network, evaluate(ours, network, noisy, y).total)
    with torch.autocast("cpu", torch.bfloat16):
        losses = evaluate(ours, network, noisy, y)
    assert losses.per_sample.dtype == torch.float32
    rounded = gradients(network, losses.total)
    norm = lambda gs: torch.cat([g.flatten() for g in gs]).norm()  # noqa: E731
    error = norm([a - b for a, b in zip(exact, rounded, strict=True)])
    assert error < 0.05 * norm(exact)


@pytest.mark.parametrize(
    "arguments, key",
    [
        ((-0.1, 0.5, 0.3), "low"),
        ((0.5, 0.2, 0.3), "high"),
        ((0.5, 0.5, 0.3), "high"),
        ((0.2, 1.1, 0.3), "high"),
        ((float("nan"), 1.0, 0.3), "low"),
        ((0.0, float("nan"), 0.3), "high"),
        ((0.0, 1.0, 1.0), "scale"),
        ((0.0, 1.0, -0.1), "scale"),
        ((0.0, 1.0, float("nan")), "scale"),
    ],
)
def test_bad_segments(arguments: tuple, key: str):
    with pytest.raises(ValueError, match=f"{key}="):
        Extrapolation(*arguments, sources.NullClass())


def test_overlapping_segments():
    with pytest.raises(ValueError, match=r"\[0.0, 0.5\) and \[0.4, 1.0\): must not overlap"):
        objective(
            Extrapolation(0.4, 1.0, 0.3, sources.NullClass()),
            Extrapolation(0.0, 0.5, 0.3, sources.NullClass()),
        )
    touching = (
        Extrapolation(0.0, 0.5, 0.3, sources.NullClass()),
        Consistency(0.5, 1.0, sources.NullClass()),
    )
    objective(*touching)


def test_statistics(network: DiT):
    """RMS and maximum are those of the rows inside; the quarters average to the whole."""
    noisy, y = batch(16)
    ours, log = objective(Extrapolation(0.2, 1.0, 0.5, sources.NullClass())), Log()
    for good in (True, False, torch.tensor(False)):
        log.step = evaluate(ours, network, noisy, y).log.step
        log.commit(good)
    found = log.read(lambda x, op: x)
    strong = network(noisy.x_t, noisy.t, y).velocity
    inside = noisy.t >= 0.2
    rms, largest = strong[inside].square().mean().sqrt(), strong[inside].abs().max()
    assert found["t_0.2-1/strong_rms"] == pytest.approx(rms.item(), rel=1e-5)
    assert found["t_0.2-1/strong_max"] == pytest.approx(largest.item(), rel=1e-5)
    quarter = (noisy.t * 4).long()
    parts = [f"quarter_{q / 4:g}-{(q + 1) / 4:g}/strong_loss" for q in range(4)]
    total = sum(found.get(part, 0) * (quarter == q).sum() for q, part in enumerate(parts)) / 16
    assert found["strong_loss"] == pytest.approx(float(total), rel=1e-5)


def test_the_general_target(network: DiT):
    """Omega v + kappa sg(strong) + (1 - omega - kappa) sg(weak), its gradient and its scale."""
    noisy, y = batch()
    segment = Extrapolation(0.0, 1.0, 0.4, sources.NullClass(), omega=1.3)
    out = network(noisy.x_t, noisy.t, y).velocity
    null = network(noisy.x_t, noisy.t, torch.full_like(y, 5)).velocity.detach()
    target = 1.3 * noisy.v + 0.4 * out.detach() + (1 - 1.3 - 0.4) * null
    by_hand = (out - target).square().mean()
    losses = evaluate(objective(segment), network, noisy, y)
    torch.testing.assert_close(losses.total, by_hand)
    close(gradients(network, losses.total), gradients(network, by_hand))
    assert segment.effective_scale() == pytest.approx(1.3 / 0.6)


@pytest.mark.parametrize(("omega", "kappa"), [(1.0, 0.5), (1.4, 0.3), (0.8, 0.0), (2.0, 0.0)])
def test_the_fixed_point_is_guidance(omega: float, kappa: float):
    """Iterating s <- target(s) ends at w + omega / (1 - kappa) (v - w)."""
    v, w = torch.tensor(2.0), torch.tensor(0.5)
    s = torch.tensor(0.0)
    for _ in range(200):
        s = omega * v + kappa * s + (1 - omega - kappa) * w
    segment = Extrapolation(0.0, 1.0, kappa, sources.NullClass(), omega=omega)
    torch.testing.assert_close(s, w + segment.effective_scale() * (v - w))


def test_the_difference_is_clipped_per_row(network: DiT):
    """Rows whose difference has a larger RMS are scaled down to it, the others left alone."""
    noisy, y = batch()
    out = network(noisy.x_t, noisy.t, y).velocity
    null = network(noisy.x_t, noisy.t, torch.full_like(y, 5)).velocity
    difference = (out - null).detach()
    rms = difference.square().mean((1, 2, 3)).sqrt()
    limit = rms[y < 5].median().item()
    assert (rms > limit).any()
    assert ((rms < limit) & (rms > 0)).any()
    shrink = (limit / rms).clamp(max=1).nan_to_num(1).view(-1, 1, 1, 1)
    by_hand = (out - noisy.v - 0.5 * shrink * difference).square().mean()
    clipped = objective(Extrapolation(0.0, 1.0, 0.5, sources.NullClass(), max_difference=limit))
    torch.testing.assert_close(evaluate(clipped, network, noisy, y).total, by_hand)


def test_strong_and_weak_from_the_average(network: DiT):
    """The released Model Guidance: the difference is that of the running average."""
    noisy, y = batch()
    average = perturbed(copy.deepcopy(network), 0.2).requires_grad_(False)
    segment = Extrapolation(0.0, 0.75, 0.45, sources.NullClass(), from_average=True)
    losses = evaluate(objective(segment), network, noisy, y, Step(0, average))
    null = torch.full_like(y, 5)
    difference = (
        average(noisy.x_t, noisy.t, y).velocity - average(noisy.x_t, noisy.t, null).velocity
    )
    shift = 0.45 * difference * (noisy.t < 0.75).view(-1, 1, 1, 1)
    by_hand = (network(noisy.x_t, noisy.t, y).velocity - noisy.v - shift).square().mean()
    torch.testing.assert_close(losses.total, by_hand)
    close(gradients(network, losses.total), gradients(network, by_hand))
    with pytest.raises(ValueError, match="from_average=True: IntermediateHead is trained"):
        Extrapolation(0.0, 1.0, 0.3, sources.IntermediateHead(), from_average=True)


def test_no_weak_pass_before_the_start(network: DiT):
    """A segment costs nothing until its schedule starts; then it grows."""
    source = Counting()
    late = objective(Extrapolation(0.0, 1.0, 0.5, source, schedule=Schedule(3, ramp_steps=2)))
    noisy, y = batch()
    plain = evaluate(objective(), network, noisy, y).total
    full = evaluate(objective(Extrapolation(0.0, 1.0, 0.5, Counting())), network, noisy, y).total
    totals = [evaluate(late, network, noisy, y, Step(n)).total for n in (0, 3, 4, 5)]
    assert len(source.calls) == 2  # at step 3 the ramp is still at zero
    assert totals[0] == totals[1] == plain
    assert totals[3] == full
    assert totals[2] not in (plain, full)


def test_a_head_learns_before_its_segment_starts(network: DiT):
    head = sources.IntermediateHead(block=1)
    late = objective(Extrapolation(0.0, 1.0, 0.5, head, schedule=Schedule(10)))
    late.bind(network)
    noisy, y = batch()
    evaluate(late, network, noisy, y).total.backward()
    assert head.head.linear.weight.grad.abs().sum() > 0


def test_consistency_follows_its_schedule(network: DiT):
    head = sources.IntermediateHead(block=1)
    head.bind(network)
    head.head.linear.weight.data += 0.1
    noisy, y = batch()
    off = objective(Consistency(0.0, 0.4, head, schedule=Schedule(5)))
    plain = evaluate(objective(), network, noisy, y).total
    torch.testing.assert_close(evaluate(off, network, noisy, y).total, plain)
    assert evaluate(off, network, noisy, y, Step(5)).total > plain


@pytest.mark.parametrize(
    ("weak", "scale"),
    [("NullClass", 0.9), ("NullClass", 1.2), ("EMA", 0.8), ("EMA", 0.85)],
)
def test_unstable_scales_are_refused(weak: str, scale: float):
    make = getattr(sources, weak)
    with pytest.raises(ValueError, match=f"scale={scale}: must be in .*allow_unstable"):
        Extrapolation(0.0, 1.0, scale, make())
    with pytest.warns(UserWarning, match=f"scale={scale}: guides by"):
        allowed = Extrapolation(0.0, 1.0, scale, make(), allow_unstable=True)
    assert allowed.scale == scale


def test_warnings_begin_above_the_published_scale():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Extrapolation(0.0, 1.0, 0.6, sources.NullClass())
    with pytest.warns(UserWarning, match="scale=0.7: guides by 3.33"):
        Extrapolation(0.0, 1.0, 0.7, sources.NullClass())


@pytest.mark.parametrize(
    "options", [{"omega": -1.0}, {"omega": float("inf")}, {"max_difference": 0.0}]
)
def test_bad_extrapolations(options: dict):
    (name,) = options
    with pytest.raises(ValueError, match=f"{name}="):
        Extrapolation(0.0, 1.0, 0.3, sources.NullClass(), **options)


def test_a_segment_without_rows_logs_nothing():
    log = Log()
    for name in ("a_max", "a_rms", "a"):
        log.add((name,), torch.zeros(1, 0))
    log.commit()
    assert log.read(lambda x, op: x) == {}
