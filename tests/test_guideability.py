"""The guideability of a weak prediction: at fixed points in closed form, and its standard error."""

import math
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from conftest import sources
from given import evaluate
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from w2s_train import objective as objective_file
from w2s_train.guideability.ratio import Difference, finish, note
from w2s_train.inbuilt import UniformScale
from w2s_train.interpolant import LinearInterpolant, NoisySample
from w2s_train.log import Log
from w2s_train.models import DiT
from w2s_train.objective import WeakToStrongObjective
from w2s_train.segment import Extrapolation
from w2s_train.timesteps import Uniform
from w2s_train.weak import Step, WeakSource

LINEAR = LinearInterpolant()
SHAPE = (3, 4, 4)


def numbers(*logs: Log) -> dict[str, float]:
    """What several processes log together."""
    first, *others = logs
    taken: list[Tensor] = []
    for log in others:
        log.read(lambda x, op: (taken.append(x), x)[1])
    return finish(first.read(lambda x, op: sum(taken, start=x)))


class Function(WeakSource):
    """A weak prediction that is a known function of v."""

    def __init__(self, shift: float) -> None:
        super().__init__()
        self.shift = shift

    def of(self, v: Tensor) -> Tensor:
        return 0.2 * v + torch.sin(v + self.shift)

    def predict(self, network, noisy: NoisySample, y, strong) -> Tensor:
        return self.of(noisy.v)


class AtFixedPoint(nn.Module):
    """A network that stands at the fixed point of the objective, whichever scales it is told."""

    null_class = 5

    def __init__(self, noisy: NoisySample, *segments: Extrapolation) -> None:
        super().__init__()
        self.v, self.segments = noisy.v, segments
        self.weak = [segment.weak.of(noisy.v) for segment in segments]

    def add_scales(self, names: list[str]) -> None:
        """Nothing is learned."""

    def forward(self, x_t, t, y, *, scales: Tensor | None = None):
        if scales is not None:  # s (1 - W) = v - sum of w times weak
            w = scales.T.view(len(scales.T), -1, 1, 1, 1)
            velocity = self.v - sum(w[k] * weak for k, weak in enumerate(self.weak))
            return SimpleNamespace(velocity=velocity / (1 - w.sum(0)))
        (segment,), (weak,) = self.segments, self.weak
        omega, kappa = segment.omega, segment.scale
        velocity = omega * self.v + (1 - omega - kappa) * weak
        return SimpleNamespace(velocity=velocity / (1 - kappa))


def question(n: int = 40, seed: int = 0) -> tuple[NoisySample, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, noise = torch.randn(2, n, *SHAPE, generator=generator)
    t = (torch.arange(n) + 0.5) / n
    return LINEAR.corrupt(x, noise, t), torch.arange(n) % 5


def logged(*segments: Extrapolation) -> dict[str, float]:
    """Of a network at the fixed point."""
    objective = WeakToStrongObjective(LINEAR, Uniform(), list(segments))
    noisy, y = question()
    network = AtFixedPoint(noisy, *segments)
    objective.bind(network)
    log = evaluate(objective, network, noisy, y).log
    log.commit()
    return numbers(log)


@pytest.mark.parametrize(
    "kappa, omega, guides", [(0.3, 1.0, 1 / 0.7), (0.6, 1.0, 2.5), (0.0, 1.5, 1.5), (0.2, 1.6, 2.0)]
)
def test_one_source_at_its_fixed_point(kappa: float, omega: float, guides: float):
    """Gamma is -w; in the general form (1 - kappa) / omega - 1; in every tenth of the range."""
    found = logged(Extrapolation(0.3, 1.0, kappa, Function(0.0), omega=omega, name="one"))
    gamma = -kappa if omega == 1 else (1 - kappa) / omega - 1
    for part in ("", "tenth_0.3-0.4/", "tenth_0.9-1/"):
        assert found[f"one/{part}guideability"] == pytest.approx(gamma, abs=1e-5)
        assert found[f"one/{part}guideability_error"] == pytest.approx(0, abs=1e-3)
        assert found[f"one/{part}scale_reached"] == pytest.approx(guides, rel=1e-4)
        assert found[f"one/{part}progress"] == pytest.approx(1, abs=1e-5)
    assert not [key for key in found if "tenth_0.2" in key or key.startswith("|")]


@pytest.mark.parametrize("option", [dict(max_difference=0.1), dict(omega=1.0)])
def test_progress_where_there_is_a_fixed_point(option: dict):
    """A clipped difference has none in closed form, and a gamma nevertheless."""
    found = logged(Extrapolation(0.0, 1.0, 0.4, Function(0.0), name="one", **option))
    assert ("one/progress" in found) == ("omega" in option)
    assert "one/guideability" in found


def test_drawn_scales_have_a_progress_of_one():
    """Gamma itself is a mixture of the scales that were drawn."""
    one = Extrapolation(0.0, 1.0, UniformScale(0.1, 0.8, plain=0.2), Function(0.0), name="one")
    found = logged(one)
    assert found["one/progress"] == pytest.approx(1, abs=1e-4)
    assert -0.8 < found["one/guideability"] < -0.1
    both = [
        Extrapolation(0.0, 0.7, UniformScale(0.1, 0.8, plain=0.2), Function(0.0), name="one"),
        Extrapolation(0.4, 1.0, UniformScale(0.3, 0.6, plain=0.3), Function(0.7), name="two"),
    ]
    found = logged(*both)
    for name, alone in (("one", "tenth_0.1-0.2/"), ("two", "tenth_0.9-1/")):
        for part in ("", alone, "tenth_0.5-0.6/"):
            assert found[f"{name}/{part}progress"] == pytest.approx(1, abs=1e-3), (name, part)


def differences(
    weak: list[Tensor], w: list[float], v: Tensor, noise: float = 0.0
) -> list[Difference]:
    """At the fixed point of sources that all act, with v known up to ``noise``."""
    pairs = list(zip(w, weak, strict=True))
    strong = (v - sum(each * of for each, of in pairs)) / (1 - sum(w))
    residual, rows = v + noise * torch.randn_like(v) - strong, slice(0, len(v))
    inside = torch.ones(len(v), dtype=torch.bool)
    return [
        Difference(f"s{k}", rows, strong - of, residual, inside, torch.full((len(v),), each), True)
        for k, (each, of) in enumerate(pairs)
    ]


def of(found: list[Difference], t: Tensor) -> Log:
    log = Log()
    note(found, t, log)
    log.commit()
    return log


def test_two_correlated_sources_need_the_joint_regression():
    v, common, own = torch.randn(3, 30, *SHAPE)
    weak, t = [0.5 * v + common, 0.5 * v + 0.8 * common + 0.3 * own], torch.linspace(0, 1, 30)
    found = numbers(of(differences(weak, [0.2, 0.5], v), t))
    for name, w in (("s0", 0.2), ("s1", 0.5)):
        assert found[f"{name}/guideability_joint"] == pytest.approx(-w, abs=1e-4)
        assert found[f"{name}/guideability"] < -w - 0.1  # takes the blame for the other one, too
        assert found[f"{name}/progress"] == pytest.approx(1, abs=1e-4)


def test_the_guidance_reached_by_each_of_three_sources():
    """1 + w_k / (1 - W), though their differences are alike."""
    v, common, one, other = torch.randn(4, 60, *SHAPE)
    weak = [0.5 * v + common, 0.4 * v + common + 0.5 * one, 0.6 * v + common + 0.4 * other]
    w, t = [0.15, 0.30, 0.22], torch.linspace(0, 1, 60)
    found = numbers(of(differences(weak, w, v), t))
    for k, scale in enumerate(w):
        assert found[f"s{k}/guideability_joint"] == pytest.approx(-scale, abs=1e-4)
        assert found[f"s{k}/scale_reached"] == pytest.approx(1 + scale / (1 - sum(w)), rel=1e-3)


@pytest.mark.parametrize("noise", [0.0, 1e-3])
def test_sources_that_are_alike_have_no_joint_numbers(noise):
    v, weak = torch.randn(2, 30, *SHAPE)
    weak = [weak, weak + noise * torch.randn_like(weak)]
    found = numbers(of(differences(weak, [0.2, 0.3], v), torch.linspace(0, 1, 30)))
    assert not [key for key in found if key.endswith(("joint", "progress", "scale_reached"))]
    assert found["s0/guideability"] == pytest.approx(-0.5, abs=1e-3)


def test_no_value_without_a_difference():
    v = torch.randn(30, *SHAPE)
    found = numbers(of(differences([v], [0.0], v, noise=1.0), torch.linspace(0, 1, 30)))
    assert found == {}


@pytest.mark.slow
def test_the_joint_standard_errors_are_the_spread_over_draws():
    """Rows differ in size by far; three sources, one of which agrees with the strong one."""
    v, common, one, other = torch.randn(4, 100, *SHAPE) * torch.linspace(0.2, 3, 100).view(
        -1, 1, 1, 1
    )
    w, t = [0.15, 0.3, 0.0], torch.linspace(0, 1, 100)
    weak = [0.5 * v + common, 0.4 * v + common + 0.5 * one]
    strong = (v - sum(each * of for each, of in zip(w, weak, strict=False))) / (1 - sum(w))
    drawn = [numbers(of(differences([*weak, strong], w, v, noise=2.0), t)) for _ in range(100)]
    for name, scale in zip(("s0", "s1"), w, strict=False):
        gammas, errors = (
            torch.tensor([each[f"{name}/guideability_joint{which}"] for each in drawn])
            for which in ("", "_error")
        )
        spread = gammas.std().item()
        assert gammas.mean().item() == pytest.approx(-scale, abs=4 * spread / math.sqrt(100))
        assert errors.mean().item() == pytest.approx(spread, rel=0.25)
    assert "s2/guideability_joint" not in drawn[0]


def test_the_standard_error_is_the_spread_over_draws():
    """Rows differ in size by far, as they do over time."""
    v, weak = torch.randn(2, 100, *SHAPE) * torch.linspace(0.2, 3, 100).view(-1, 1, 1, 1)
    t = torch.linspace(0, 1, 100)
    drawn = [numbers(of(differences([weak], [0.4], v, noise=2.0), t)) for _ in range(300)]
    gammas, errors = (
        torch.tensor([each[f"s0/guideability{which}"] for each in drawn])
        for which in ("", "_error")
    )
    spread = gammas.std().item()
    assert gammas.mean().item() == pytest.approx(-0.4, abs=4 * spread / math.sqrt(300))
    assert errors.mean().item() == pytest.approx(spread, rel=0.15)


def test_processes_count_as_one_with_all_rows():
    v, one, two = torch.randn(3, 40, *SHAPE)
    found, t = differences([one, two], [0.2, 0.5], v, noise=1.0), torch.linspace(0, 1, 40)

    def part(rows: slice) -> Log:
        n = len(t[rows])
        each = [Difference(d.name, slice(0, n), *(x[rows] for x in d[2:6]), d.drawn) for d in found]
        return of(each, t[rows])

    parts = numbers(part(slice(0, 25)), part(slice(25, 40)))
    whole = numbers(of(found, t))
    for key, value in whole.items():  # in an error what is large cancels
        rel = 2e-3 if key.endswith("joint_error") else 1e-4
        assert parts.pop(key) == pytest.approx(value, rel=rel, abs=1e-6)
    assert not parts
    assert len(whole) > 20


class Reductions(TorchDispatchMode):
    """Counts those over the channels and pixels of so many numbers."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.count = size, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> object:
        out = func(*args, **(kwargs or {}))
        inner = func.overloadpacket in (torch.ops.aten.mean, torch.ops.aten.sum)
        self.count += inner and args[0].numel() == self.size and out.ndim == 1
        return out


def test_it_costs_two_reductions_and_no_pass(network: DiT):
    """Counted, for a source that is trained with."""
    segment = Extrapolation(0.0, 1.0, 0.3, sources.LayerSkip([1]))
    objective = WeakToStrongObjective(LINEAR, Uniform(), [segment])
    objective.bind(network)
    x, y = torch.randn(8, 3, 8, 8), torch.arange(8) % 5
    passes: list[int] = []
    network.register_forward_hook(lambda *_: passes.append(1))
    counted = []
    for noting in (True, False):
        with patch.object(objective_file, "note", note if noting else lambda *_: None):
            passes.clear()
            with Reductions(x.numel()) as reductions:
                objective(network, x, y, Step(), Log())
            counted.append((reductions.count, len(passes)))
    (with_it, calls), (without, calls_without) = counted
    assert (with_it - without, calls - calls_without) == (2, 0)
    assert calls == 2


class Table(nn.Module):
    """velocity = a(t) x_t, of which a is learned in twenty pieces: enough for Gaussian data."""

    null_class = 5

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.zeros(20))

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor):
        a = self.a[(t * 20).long().clamp(0, 19)]
        return SimpleNamespace(velocity=a.view(-1, 1, 1, 1) * x_t)


class Half(WeakSource):
    """Always the same."""

    def predict(self, network, noisy: NoisySample, y, strong) -> Tensor:
        return -0.5 * noisy.x_t


@pytest.mark.slow
def test_training_comes_to_the_fixed_point():
    """Of data whose E[v] is linear in x_t: gamma ends at -w, and begins far from there."""
    torch.manual_seed(0)
    objective = WeakToStrongObjective(
        LINEAR, Uniform(), [Extrapolation(0.0, 1.0, 0.4, Half(), name="half")]
    )
    network, ends = Table(), []
    optimizer = torch.optim.Adam(network.parameters(), lr=0.1)
    log, y = Log(), torch.zeros(256, dtype=torch.int64)
    for step in range(500):
        if step == 400:
            optimizer.param_groups[0]["lr"] = 0.01
        if step in (10, 450):
            ends.append(numbers(log))
        x = 0.6 * torch.randn(256, *SHAPE)
        objective(network, x, y, Step(step), log).mean().backward()
        log.commit()
        optimizer.step()
        optimizer.zero_grad()
    ends.append(numbers(log))
    assert ends[0]["half/progress"] < 0.3
    error = ends[2]["half/guideability_error"]
    assert error < 0.01
    assert ends[2]["half/guideability"] == pytest.approx(-0.4, abs=4 * error)
    for k in range(10):
        part = f"half/tenth_{k / 10:g}-{(k + 1) / 10:g}/guideability"
        assert ends[2][part] == pytest.approx(-0.4, abs=5 * ends[2][f"{part}_error"] + 0.02), k
