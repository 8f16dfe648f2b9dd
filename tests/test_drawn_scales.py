"""Scales that are drawn per row and told to the network."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from w2s_train import weak
from w2s_train.errors import UserError
from w2s_train.inbuilt import Drawn, IMeanFlow, OmegaPower, UniformScale
from w2s_train.inbuilt.rows import draw_scales, own_generator, scales_of
from w2s_train.interpolant import LinearInterpolant, NoisySample
from w2s_train.log import Log
from w2s_train.models import DiT, DiTOutput, WeightAverage, made_of, saved_network
from w2s_train.objective import WeakToStrongObjective
from w2s_train.schedule import Schedule
from w2s_train.segment import Extrapolation
from w2s_train.timesteps import Uniform
from w2s_train.weak import Step
from w2s_train.weak.randomness import Randomness

SIZES = dict(input_size=8, patch_size=2, in_channels=1, hidden_size=32, depth=3, num_heads=2)
ONE = UniformScale(0.6, 0.6, plain=0.0)  # degenerate: a number


def network(**more: Any) -> DiT:
    """A small one whose gates are open, so that conditions matter."""
    torch.manual_seed(0)
    made = DiT(**SIZES, num_classes=4, **more)
    for name, parameter in made.named_parameters():
        if parameter.requires_grad and "scale_embedder" not in name:
            nn.init.normal_(parameter, std=0.1)
    return made


def objective(*segments: Extrapolation) -> WeakToStrongObjective:
    return WeakToStrongObjective(LinearInterpolant(), Uniform(), [*segments])


def drawn(law: Drawn, source: weak.WeakSource, name: str, low: float = 0.0, high: float = 1.0):
    return Extrapolation(low, high, law, source, name=name)


def batch(n: int = 48) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    y = torch.arange(n) // 4 % 4
    y[1::4] = 4  # the null class, as `timesteps.spread` drops labels
    return torch.randn(n, 1, 8, 8, generator=generator), y


# ---- laws ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "law, cdf",
    [
        (UniformScale(0.1, 0.7), lambda w: (w - 0.1) / 0.6),
        (OmegaPower(4.0, 0.0), lambda w: (1 / (1 - w) - 1) / 3),
        (OmegaPower(4.0, 1.0), lambda w: math.log(1 / (1 - w)) / math.log(4)),
        (OmegaPower(4.0, 2.0), lambda w: w / 0.75),
        (OmegaPower(4.0, 1 + 1e-6), lambda w: math.log(1 / (1 - w)) / math.log(4)),
        (OmegaPower(8.0, 0.5), lambda w: ((1 - w) ** -0.5 - 1) / (8**0.5 - 1)),
        (IMeanFlow(), lambda w: math.log(1 / (1 - w)) / math.log(8)),
    ],
)
def test_quantiles_invert_the_distribution(law: Drawn, cdf):
    for u in (0.0, 0.1, 0.5, 0.9, 1.0):
        w = float(law.quantile(torch.tensor(u, dtype=torch.float64)))
        assert 0 <= w <= law.high + 1e-12
        assert cdf(w) == pytest.approx(u, abs=1e-6)
        assert float(law.quantile(torch.tensor(u))) == pytest.approx(w, abs=2e-6)  # in float32


def test_the_law_of_imeanflow():
    """Values of its code for these uniform numbers (golden/imf_or_ig.npz, imf/omega)."""
    u = torch.tensor([0.0, 0.0749518, 0.1, 0.16012788])
    for law, omega in (
        (IMeanFlow(), [1.0, 1.16866, 1.2311444, 1.3951145]),
        (IMeanFlow(cfg_beta=0.5), [1.0, 1.2928689, 1.3991169, 1.6712856]),
        (IMeanFlow(cfg_beta=2.0), [1.0, 1.0701858, 1.0958904, 1.162942]),
        (IMeanFlow(s_max=3.0), [1.0, 1.1094953, 1.1486983, 1.2485518]),
        (IMeanFlow(cfg_beta=0.0), [1.0, 1.5246626, 1.7, 2.1208951]),
    ):
        torch.testing.assert_close(law.omega(u), torch.tensor(omega), rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(law.quantile(u), 1 - 1 / law.omega(u))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: UniformScale(high=1.0), "high=1.0: must be in (0, 1)"),
        (lambda: UniformScale(low=0.8, high=0.7), "low=0.8: must be in [0, high=0.7]"),
        (lambda: UniformScale(plain=1.0), "plain=1.0: must be in [0, 1)"),
        (lambda: OmegaPower(1.0), "omega_max=1.0: must be in (1, 1000]"),
        (lambda: OmegaPower(power=-1.0), "power=-1.0: must be a finite number, at least 0"),
        (lambda: IMeanFlow(s_max=0.0), "s_max=0.0: must be in (0, 999]"),
        (lambda: IMeanFlow(cfg_beta=-0.5), "cfg_beta=-0.5: must be a finite number, at least 0"),
        (
            lambda: drawn(IMeanFlow(s_max=9.5), weak.NullClass(), "n"),
            "must be in [0, 0.9) for Null",
        ),
        (lambda: drawn(IMeanFlow(), weak.EMA(), "n"), "must be in [0, 0.8) for EMA"),
        (lambda: Extrapolation(0, 1, ONE, weak.NullClass()), "name=None: must be given"),
        (
            lambda: Extrapolation(0, 1, ONE, weak.NullClass(), omega=2.0, name="n"),
            "omega=2.0: must be 1 where the scale is drawn",
        ),
        (
            lambda: Extrapolation(0, 1, ONE, weak.NullClass(), from_average=True, name="n"),
            "from_average=True: must be false where",
        ),
        (
            lambda: objective(
                drawn(ONE, weak.NullClass(), "n"), Extrapolation(0, 0.5, 0.3, weak.LayerSkip())
            ),
            "must not overlap, unless both draw",
        ),
        (
            lambda: objective(
                drawn(ONE, weak.NullClass(), "n"), drawn(ONE, weak.IntermediateHead(), "n")
            ),
            "must have names of their own",
        ),
        (lambda: network(scales_from=4), "scales_from=4: must be in [0, 3]"),
        (
            lambda: objective(drawn(ONE, weak.NullClass(), "n")).bind(network(scales=["m"]), 0.1),
            "network.scales=['m']: must be ['n']",
        ),
    ],
)
def test_refused(make, message: str):
    with pytest.raises(UserError) as error:
        make()
    assert message in str(error.value) and "\n" not in str(error.value)


# ---- draws -----------------------------------------------------------------------------------


def test_rows_share_a_total():
    laws = [UniformScale(0, 0.75, plain=0.4), UniformScale(0, 0.6, plain=0.25)]
    n = 40_000
    allowed = torch.ones(n, 2, dtype=torch.bool)
    allowed[: n // 2, 1] = False
    scales = draw_scales(laws, allowed, torch.Generator().manual_seed(0)).double()
    assert (scales[: n // 2, 1] == 0).all()
    free, both = scales[n // 2 :], (scales > 0).all(1)
    assert (free > 0).double().mean(0).tolist() == pytest.approx([0.6, 0.75], abs=1e-3)
    alone = scales[(scales[:, 0] > 0) & ~both, 0]
    assert float(alone.mean()) == pytest.approx(0.375, abs=0.01) and float(alone.max()) < 0.75
    total = scales[both].sum(1)  # by the law that ends first, uniformly split
    assert float(total.max()) <= 0.6 + 1e-6
    assert float(total.mean()) == pytest.approx(0.3, abs=0.01)
    share = scales[both, 0] / total
    for q in (0.25, 0.5, 0.75):
        assert float((share < q).double().mean()) == pytest.approx(q, abs=0.02)


def test_others_draw_the_same():
    """Whether or not there are scales: they come from a generator of their own, anew each step."""
    torch.manual_seed(3)
    before = torch.get_rng_state()
    laws, allowed = [UniformScale()], torch.ones(64, 1, dtype=torch.bool)
    host = torch.device("cpu")
    first, again = (draw_scales(laws, allowed, own_generator(host)) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, again)
    torch.rand(3)  # as another part of a step has drawn
    other = draw_scales(laws, allowed, own_generator(host))
    torch.manual_seed(4)  # as another batch, process or run would be seeded
    third = draw_scales(laws, allowed, own_generator(host))
    assert not torch.equal(first, other) and not torch.equal(first, third)


# ---- the network -----------------------------------------------------------------------------


def test_it_begins_as_the_plain_network():
    plain, told = network(), network(scales=["a", "b"])
    assert told.load_state_dict(plain.state_dict(), strict=False).missing_keys == [
        f"scale_embedder.mlps.{k}.{i}.weight" for k in (0, 1) for i in (0, 2)
    ]
    x, y = batch(8)
    t, scales = torch.rand(8), torch.rand(8, 2)
    assert torch.equal(told(x, t, y, scales=scales).velocity, plain(x, t, y).velocity)


def test_scale_zero_is_the_network_without():
    """Whatever was learned, so frozen copies, null passes and plain sampling need not be told."""
    told = network(scales=["a", "b"], scales_from=1)
    for mlp in told.scale_embedder.mlps:
        nn.init.normal_(mlp[2].weight)
    x, y = batch(8)
    t, scales = torch.rand(8), torch.rand(8, 2)
    without = told(x, t, y, keep_hidden={0, 1})
    assert torch.equal(told(x, t, y, scales=0 * scales).velocity, without.velocity)
    given = told(x, t, y, keep_hidden={0, 1}, scales=scales)
    assert not torch.allclose(given.velocity, without.velocity, atol=1e-3)
    assert torch.equal(given.hidden[0], without.hidden[0])  # before `scales_from`
    assert torch.equal(given.cond, without.cond)
    assert not torch.allclose(given.hidden[1], without.hidden[1], atol=1e-3)
    only_b = told(x, t, y, scales=scales * torch.tensor([0.0, 1.0])).velocity
    assert not torch.allclose(only_b, given.velocity, atol=1e-3)
    rebuilt = DiT(**told.arguments)
    rebuilt.load_state_dict(told.state_dict())
    assert torch.equal(rebuilt(x, t, y, scales=scales).velocity, given.velocity)
    with pytest.raises(UserError, match=r"network.scales=\[\]: must name"):
        network()(x, t, y, scales=scales)


# ---- the objective ---------------------------------------------------------------------------


def fit(made: WeakToStrongObjective, net: DiT, steps: int, frozen: bool) -> list[Tensor]:
    """Losses and the last gradients of some steps of plain gradient descent."""
    made.bind(net, 0.25)
    if frozen and net.scale_embedder is not None:
        net.scale_embedder.requires_grad_(False)
    with torch.no_grad():
        for segment in made.segments:
            for parameter in segment.weak.parameters():
                nn.init.constant_(parameter, 0.05)
    average = WeightAverage(net, 0.9)
    found, (x, y) = [], batch()
    torch.manual_seed(5)
    for number in range(steps):
        loss = made(net, x, y, Step(number, average.module), Log()).mean()
        parameters = [
            (name, p)
            for name, p in [*net.named_parameters(), *made.named_parameters()]
            if p.requires_grad and "scale_embedder" not in name
        ]
        gradients = torch.autograd.grad(loss, [p for _, p in parameters])
        found = [*found[: number + 1], loss.detach(), *gradients]
        with torch.no_grad():
            for (_, p), gradient in zip(parameters, gradients, strict=True):
                p -= 0.02 * gradient
        for segment in made.segments:
            segment.weak.after_step(net, Step(number + 1, average.module), lambda: None)
    return found


def pairs(scale: Any) -> list[Extrapolation]:
    """Segments of every kind that a scale can drive, side by side."""
    kinds = [weak.IntermediateHead(), weak.NullClass(), weak.EMA(0.5), weak.LayerSkip([1])]
    return [
        Extrapolation(k / 4, (k + 1) / 4, scale, source, name=f"s{k}", schedule=Schedule(0, 10))
        for k, source in enumerate(kinds)
    ]


@pytest.mark.parametrize("steps", [1, pytest.param(50, marks=pytest.mark.slow)])
def test_degenerate_laws_are_the_fixed_objective(steps: int):
    """At the start, and after 50 steps with the embedding frozen at zero: losses and gradients."""
    fixed = fit(objective(*pairs(0.6)), network(), steps, frozen=True)
    told = fit(objective(*pairs(ONE)), network(), steps, frozen=True)
    assert len(fixed) == len(told) > steps
    for ours, theirs in zip(told, fixed, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


class Analytic(nn.Module):
    """The velocity of the analytic network of golden/README.md, with g = w."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(5, 1, 8, 8), requires_grad=False)
        self.null_class, self.scales = 4, list[str]()
        self.calls: list[tuple[int, Tensor | None]] = []

    def add_scales(self, names: list[str]) -> None:
        self.scales = names

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor, *, scales: Any = None, keep_hidden=()):
        self.calls.append((len(y), scales))
        g = 0 if scales is None else scales.sum(1).view(-1, 1, 1, 1)
        velocity = self.table[y] * (1 + 0.8 * g) + 0.6 * x_t + 0.3 * t.view(-1, 1, 1, 1)
        return DiTOutput(velocity, velocity[:, :0], {}, velocity.flatten(1)[:, :0])


def test_the_target_of_imeanflow():
    """It is v + (1 - 1/omega) (v_cond(omega) - v_null(1)); v without label and outside."""
    torch.manual_seed(0)
    net, made = Analytic(), objective(drawn(IMeanFlow(), weak.NullClass(), "c", 0.25, 0.75))
    made.bind(net, 0.25)
    x, y = batch()
    losses = made(net, x, y, Step(7), Log())
    (_, scales), (rows, null_scales) = net.calls
    assert null_scales is None  # the weak prediction is always at omega = 1
    assert scales is not None and scales.shape == (48, 1)
    torch.manual_seed(0)
    Analytic()
    noisy = made.draw(x)
    inside = (noisy.t >= 0.25) & (noisy.t < 0.75) & (y != 4)
    assert torch.equal(scales[:, 0] > 0, inside) and rows >= int(inside.sum())
    w = scales.view(-1, 1, 1, 1)
    strong = net(noisy.x_t, noisy.t, y, scales=scales).velocity
    null = net(noisy.x_t, noisy.t, torch.full_like(y, 4)).velocity
    omega = 1 / (1 - w)
    target = noisy.v + (1 - 1 / omega) * (strong - null)
    torch.testing.assert_close(losses, (strong - target).square().flatten(1).mean(1))


def test_overlapping_sources_add_up():
    """The target is v + sum_k w_k d_k; as many rows get the null pass at every step."""
    net = network()
    laws = UniformScale(0, 0.7, plain=0.5)
    made = objective(
        drawn(laws, weak.IntermediateHead(), "head"), drawn(laws, weak.NullClass(), "class")
    )
    made.bind(net, 0.25)
    x, y = batch()
    sizes = set()
    for number in range(6):
        seen: list[Any] = []
        handle = net.register_forward_hook(
            lambda m, args, kwargs, out, seen=seen: seen.append((args, kwargs, out)),
            with_kwargs=True,
        )
        torch.manual_seed(number)
        losses = made(net, x, y, Step(number), Log())
        handle.remove()
        (args, kwargs, strong), (null_args, null_kwargs, _) = seen
        assert "scales" not in null_kwargs
        sizes.add(len(null_args[2]))
        scales = kwargs["scales"]
        torch.manual_seed(number)
        noisy = made.draw(x)
        assert torch.equal(args[0], noisy.x_t)
        head = made.segments[0].weak.head if made.segments[0].name == "head" else None
        head = head or made.segments[1].weak.head
        d_head = strong.velocity - head(strong.hidden[0], strong.cond)
        d_null = strong.velocity - net(noisy.x_t, noisy.t, torch.full_like(y, 4)).velocity
        names = {name: k for k, name in enumerate(net.scales)}
        w_head, w_null = (scales[:, names[n]].view(-1, 1, 1, 1) for n in ("head", "class"))
        target = noisy.v + w_head * d_head + w_null * d_null
        expected = (strong.velocity - target.detach()).square().flatten(1).mean(1)
        expected += 0.2 * (head(strong.hidden[0], strong.cond) - noisy.v).square().flatten(1).mean(
            1
        )
        torch.testing.assert_close(losses, expected)
        assert (w_null.flatten()[y == 4] == 0).all()
    assert sizes == {24}  # at most half of the rows, whoever lost the label


def test_before_a_source_is_ready_rows_are_told_nothing():
    net = network()
    source = weak.Snapshot(step=3)
    made = objective(drawn(UniformScale(0.5, 0.6, plain=0.0), source, "early"))
    made.bind(net, 0.1)
    made.plan(10)
    seen: list[Tensor] = []
    net.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(kwargs.get("scales")), with_kwargs=True
    )
    x, y = batch()
    made(net, x, y, Step(0), Log())
    assert len(seen) == 1 and (seen[0] == 0).all()
    source.after_step(net, Step(3), lambda: None)
    made(net, x, y, Step(4), Log())
    assert (seen[1] >= 0.5).all()


def test_a_source_that_is_not_ready_takes_no_share():
    """Nor does its limit hold: the law of the others is as it is without it."""
    net = network()
    late = Extrapolation(0, 1, UniformScale(high=0.3, plain=0), weak.Snapshot(step=6), name="late")
    made = objective(drawn(UniformScale(0.5, 0.5, plain=0.0), weak.LayerSkip(), "skip"), late)
    made.bind(net, 0.1)
    made.plan(10)
    t, labelled = torch.rand(64).sort().values, torch.ones(64, dtype=torch.bool)
    before = scales_of(made.drawn, t, labelled, Step(0))
    assert (before["skip"] == 0.5).all() and (before["late"] == 0).all()
    late.weak.after_step(net, Step(6), lambda: None)
    after = scales_of(made.drawn, t, labelled, Step(6))
    assert float((after["skip"] + after["late"]).max()) <= 0.3 and (after["late"] > 0).any()


def test_the_order_of_inputs_is_the_config_s():
    """Whichever range comes first."""
    made = objective(
        drawn(ONE, weak.NullClass(), "b", low=0.5), drawn(ONE, weak.IntermediateHead(), "a")
    )
    net = network()
    made.bind(net, 0.1)
    assert net.scales == ["b", "a"]


def test_a_schedule_is_told():
    net = network()
    made = objective(Extrapolation(0, 1, ONE, weak.NullClass(), schedule=Schedule(0, 10), name="c"))
    made.bind(net, 0.1)
    made.plan(20)
    seen: list[Tensor] = []
    net.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(kwargs["scales"]) if "scales" in kwargs else None,
        with_kwargs=True,
    )
    x, _ = batch()
    made(net, x, torch.zeros(48, dtype=torch.int64), Step(5), Log())
    torch.testing.assert_close(seen[0], torch.full((48, 1), 0.3))


def test_the_logged_scales():
    """Effective scales 1 + w_k / (1 - W); what explains the strong prediction is v / (1 - W)."""
    net = network()
    both = UniformScale(0.5, 0.5, plain=0.0)
    made = objective(drawn(both, weak.IntermediateHead(), "a"), drawn(both, weak.LayerSkip(), "b"))
    made.bind(net, 0.0)
    log, (x, y) = Log(), batch()
    made(net, x, y, Step(0), log)
    log.commit()
    numbers = log.read(lambda value, op: value)
    total = numbers["a/effective_scale"] + numbers["b/effective_scale"]
    assert total == pytest.approx(2 + 0.5 / 0.5, rel=1e-5)
    for name in "ab":
        assert numbers[f"{name}/explained_rms"] == pytest.approx(
            2 * numbers[f"{name}/velocity_rms"], rel=1e-5
        )


def test_the_average_has_the_inputs():
    """Copies for sampling are made after the scales were added, and follow them."""
    net = network()
    made = objective(drawn(ONE, weak.EMA(0.5), "old"))
    made.bind(net, 0.1)
    average = WeightAverage(net, 0.0)
    with torch.no_grad():
        for parameter in net.scale_embedder.parameters():
            nn.init.normal_(parameter)
    average.update(net)
    x, y = batch(8)
    t, scales = torch.rand(8), torch.rand(8, 1)
    ours, theirs = (n(x, t, y, scales=scales).velocity for n in (average.module, net))
    torch.testing.assert_close(ours, theirs)
    assert made.segments[0].weak.average.module.scales == ["old"]
    assert copy.deepcopy(net).arguments["scales"] == ["old"]


class Same(Randomness):
    """The same numbers whenever it is asked."""

    def numbers(self, n: int) -> Tensor:
        return torch.rand(8, n, generator=torch.Generator().manual_seed(0))

    def choice(self, n: int) -> int:
        return n - 1


@pytest.mark.parametrize(
    "source",
    [
        weak.LayerSkip([2]),
        weak.RandomBlocks(),
        weak.DroppedTokens(),
        weak.ShuffledTokens(),
        weak.NullClass(),
        weak.ShiftedTime(),
        weak.EMA(0.5),
    ],
    ids=lambda source: type(source).__name__,
)
@pytest.mark.parametrize("first", [0, 1, 3])
def test_weak_predictions_are_without_scales(source: weak.WeakSource, first: int):
    """Also where the tokens that a pass would go on from carry them."""
    net = network(scales_from=first)
    objective(drawn(ONE, source, "source")).bind(net, 0.1)
    nn.init.normal_(net.scale_embedder.mlps[0][2].weight)
    x, y = batch(8)
    noisy = NoisySample(x, torch.rand(8), x)
    told, plain = (
        net(x, noisy.t, y, keep_hidden=source.keep_hidden, scales=scales)
        for scales in (torch.rand(8, 1), None)
    )
    found = [source.predict_at(net, noisy, y, strong, Same()) for strong in (told, plain)]
    torch.testing.assert_close(*found)
    assert not torch.allclose(told.velocity, plain.velocity, atol=1e-3)


def test_a_co_trained_network_needs_no_scales():
    """It is a smaller one of the same class, which is told nothing."""
    net, source = network(), weak.CoTrained(every=1, lr=1e-3)
    made = objective(drawn(ONE, source, "small"))
    made.bind(net, 0.1)
    x, y = batch()
    made(net, x, y, Step(0), Log())
    before = [p.clone() for p in source.learned]
    made.after_step(net, Step(1))
    assert any(not torch.equal(a, b) for a, b in zip(before, source.learned, strict=True))


def test_inputs_for_scales_do_not_count_as_size():
    """A run that had them may guide a plain one of its size."""
    told = network()
    objective(drawn(ONE, weak.NullClass(), "class")).bind(told, 0.1)
    objective(Extrapolation(0.0, 1.0, 0.3, weak.Checkpoint(network=told))).bind(network(), 0.1)
    with pytest.raises(UserError, match="parameters, must have at most the network's"):
        plain = DiT(**SIZES | {"depth": 2}, num_classes=4)
        objective(Extrapolation(0.0, 1.0, 0.3, weak.Checkpoint(network=told))).bind(plain, 0.1)


def test_saved_scales_go_to_those_of_the_same_name(tmp_path: Path):
    """A network that is given must have them in the order of the file."""
    one, other = network(), network()
    for net, names in ((one, ["a", "b"]), (other, ["b", "a"])):
        objective(*(drawn(ONE, weak.NullClass(), name) for name in names)).bind(net, 0.1)
    state = {f"ema.module.{name}": value for name, value in one.state_dict().items()}
    torch.save({"state_dict": state, "network": made_of(one)}, path := tmp_path / "x.ckpt")
    assert saved_network(str(path), network=one).scales == ["a", "b"]
    with pytest.raises(UserError, match=r"network.scales=\['b', 'a'\]: must be \['a', 'b'\]"):
        saved_network(str(path), network=other)
