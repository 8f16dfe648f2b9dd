"""Weak sources that draw, and the mathematics of those that look at other times, labels, tokens."""

import itertools
from functools import partialmethod

import pytest
import torch
from conftest import perturbed, sources
from test_weak import bound, questions, small, velocity
from torch import nn

from w2s_train.autoencoder import PixelSpace
from w2s_train.generation import Setting, generate
from w2s_train.guidance import Autoguidance, ClassifierFree, Guidance, Segmented, Unguided
from w2s_train.interpolant import LinearInterpolant
from w2s_train.log import Log
from w2s_train.models import DiT
from w2s_train.objective import WeakToStrongObjective
from w2s_train.sampler import Euler, EulerMaruyama, Heun, Sampler
from w2s_train.segment import Extrapolation
from w2s_train.timesteps import Uniform
from w2s_train.weak import Step, WeakSource
from w2s_train.weak.randomness import Drawn, Randomness, Seeded

LINEAR = LinearInterpolant()
CPU = torch.device("cpu")


class Given(Randomness):
    """Draws that a test chooses."""

    def __init__(self, numbers: torch.Tensor | None = None, choice: int = 0) -> None:
        self.given, self.chosen = numbers, choice

    def numbers(self, n: int) -> torch.Tensor:
        assert self.given is not None and self.given.shape[1] == n
        return self.given

    def choice(self, n: int) -> int:
        assert self.chosen < n
        return self.chosen


@torch.no_grad()
def ask(source: WeakSource, network: DiT, *random: Randomness, y: torch.Tensor | None = None):
    """What a bound source predicts, and the strong pass it was given."""
    noisy, own = questions()
    y = own if y is None else y
    strong = network(noisy.x_t, noisy.t, y, keep_hidden=source.keep_hidden)
    return source.predict_at(network, noisy, y, strong, *random), strong


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_draws_of_a_seed_are_its_own():
    """Anew at each call, whoever stands beside it, and not those of its noise."""
    both, alone = Seeded([7, 3], CPU), Seeded([3], CPU)
    for n in (2, 5):
        numbers = both.numbers(n)
        assert torch.equal(numbers[1:], alone.numbers(n))
        assert not torch.equal(numbers[0], numbers[1])
        assert 0 <= numbers.min() and numbers.max() < 1
    assert not torch.equal(both.numbers(4), both.numbers(4))
    noise = torch.rand(3, generator=torch.Generator().manual_seed(3))
    assert not torch.equal(Seeded([3], CPU).numbers(3)[0], noise)


def test_choices_at_sampling_follow_the_time():
    """Alike for every batch; over a grid every choice comes up."""
    one, other = Seeded([1, 2], CPU), Seeded([9], CPU)
    grid = torch.linspace(1, 0, 101, dtype=torch.float64).tolist()
    chosen = [one.at(t).choice(4) for t in grid]
    assert chosen == [other.at(t).choice(4) for t in grid]
    assert {*chosen} == {0, 1, 2, 3}


def test_draws_in_training_are_those_of_the_seeded_generators():
    def draw() -> tuple[torch.Tensor, list[int]]:
        torch.manual_seed(5)
        drawn = Drawn(6, CPU)
        return drawn.numbers(3), [drawn.choice(4) for _ in range(40)]

    (numbers, choices), (again, more) = draw(), draw()
    assert torch.equal(numbers, again) and choices == more
    assert {*choices} == {0, 1, 2, 3}


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_random_blocks_are_a_fixed_list_of_sets(network: DiT, share: float):
    """Each is the whole pass without its blocks, bitwise; all are drawn."""
    source = sources.RandomBlocks(share, sets=3)
    bound(source, network)
    assert len({*source.skipped}) == 3
    assert {len(blocks) for blocks in source.skipped} == {max(round(4 * share), 1)}
    noisy, y = questions()
    for i, blocks in enumerate(source.skipped):
        with torch.no_grad():
            whole = network(noisy.x_t, noisy.t, y, skip_blocks=blocks).velocity
        assert torch.equal(ask(source, network, Given(choice=i))[0], whole)
    again, other = sources.RandomBlocks(share, sets=3), sources.RandomBlocks(share, 3, seed=1)
    for each in (again, other):
        each.bind(network)
    assert again.skipped == source.skipped != other.skipped
    every = sources.RandomBlocks(share, sets=100)
    every.bind(network)
    assert len(every.skipped) == {0.1: 4, 0.5: 6}[share]  # as many as there are


def test_a_shifted_time_is_another_time(network: DiT):
    noisy, y = questions()  # t from 0.1 to 0.9
    found, strong = ask(sources.ShiftedTime(0.0), network)
    assert torch.equal(found, strong.velocity)
    with torch.no_grad():
        later = network(noisy.x_t, (noisy.t + 0.3).clamp(max=1), y).velocity
        at_data = network(noisy.x_t, torch.zeros(6), y).velocity
    assert torch.equal(ask(sources.ShiftedTime(0.3), network)[0], later)
    assert torch.equal(ask(sources.ShiftedTime(-0.95), network)[0], at_data)


def test_a_perturbed_time_is_normal(network: DiT):
    """By std n, where the cumulative distribution of n is what was drawn; within [0, 1]."""
    noisy, y = questions()
    u = torch.tensor([0.0, 0.5, 0.8413447, 0.1586553, 0.5, 1 - 2**-24]).unsqueeze(1)
    with torch.no_grad():
        told = torch.stack(
            [torch.tensor(0.0), *(noisy.t[1:5] + 0.02 * torch.tensor([0, 1, -1, 0]))]
        )
        told = torch.cat([told, torch.ones(1)])
        expected = network(noisy.x_t, told, y).velocity
    wide = sources.PerturbedTime(0.02)
    close(ask(wide, network, Given(u))[0][1:5], expected[1:5])
    close(ask(sources.PerturbedTime(9.0), network, Given(u))[0][[0, 5]], expected[[0, 5]])
    found, strong = ask(sources.PerturbedTime(0.0), network)
    assert torch.equal(found, strong.velocity)


def test_a_random_label_is_any_other_class(network: DiT):
    """Never the row's own, nor the null class; without a label, the null class."""
    source = sources.RandomLabel()
    source.bind(network)
    seen = list[torch.Tensor]()
    hook = network.register_forward_pre_hook(lambda _, args: seen.append(args[2]))
    y = torch.tensor([0, 1, 2, 3, 4, 5])
    for k in range(4):
        ask(source, network, Given(torch.full((6, 1), (k + 0.5) / 4)), y=y)
    ask(source, network, Given(torch.full((6, 1), 1 - 2**-24)), y=y)
    hook.remove()
    labels = torch.stack(seen[1::2])
    assert (labels[:, 5] == 5).all()
    for row in range(5):
        assert sorted(labels[:4, row].tolist()) == [k for k in range(5) if k != row]
    assert torch.equal(labels[4], labels[3])
    found, strong = ask(source, network, y=torch.full((6,), 5))
    assert torch.equal(found, strong.velocity)


def test_labels_are_dropped_or_not(network: DiT):
    """A random label needs labels, and no null class."""
    objective = WeakToStrongObjective(
        LINEAR, Uniform(), [Extrapolation(0.0, 1.0, 0.5, sources.RandomLabel())]
    )
    objective.bind(network, label_dropout=0.0)
    with pytest.raises(ValueError, match="label_dropout=1.0: must be below 1 for RandomLabel"):
        objective.bind(network, label_dropout=1.0)


@pytest.mark.parametrize("blocks", [(0, 3), (1, 2), (2, 3), (1, 1)])
def test_shuffled_tokens(network: DiT, blocks: tuple[int, int]):
    """In order they are the strong pass; shuffled, sums over tokens stay and places change."""
    source = sources.ShuffledTokens(*blocks)
    source.bind(network)
    in_order = torch.arange(16).expand(6, 16) / 16
    found, strong = ask(source, network, Given(in_order))
    close(found, strong.velocity)
    seen = {}
    hook = network.register_forward_pre_hook(
        lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    backwards, strong = ask(source, network, Given(in_order.flip(1)))
    hook.remove()
    block, tokens = seen["resume"]
    before, after = (strong.hidden[b] for b in (blocks[0] - 1, blocks[1]))
    assert block == blocks[1]
    close(tokens, before + (after - before).flip(1))
    assert not torch.allclose(backwards, strong.velocity, atol=1e-3)


@pytest.mark.parametrize("share, left", [(0.75, 4), (0.4, 9), (0.05, 9), (0.99, 1)])
@pytest.mark.parametrize("blocks", [(0, 3), (1, 2), (2, 3), (0, 0)])
def test_dropped_tokens(network: DiT, blocks: tuple[int, int], share: float, left: int):
    """Those left attend to each other alone, and the others pass by; some always do."""
    few = sources.DroppedTokens(share, *blocks)
    few.bind(network)
    numbers = torch.rand(6, 16)
    found, strong = ask(few, network, Given(numbers))
    noisy, y = questions()
    with torch.no_grad():
        tokens = strong.hidden[blocks[0] - 1].clone()
        for row in range(6):
            kept = numbers[row].argsort()[:left]
            h = tokens[row : row + 1, kept]
            for block in network.blocks[blocks[0] : blocks[1] + 1]:
                h = block(h, strong.cond[row : row + 1])
            tokens[row, kept] = h[0]
        expected = network(noisy.x_t, noisy.t, y, resume=(blocks[1], tokens)).velocity
    close(found, expected)
    assert not torch.allclose(found, strong.velocity, atol=1e-3)


def test_the_null_prediction_of_a_checkpoint(network: DiT):
    """Of other classes; the labels of the network say nothing to it."""
    theirs = perturbed(small(num_classes=9))
    source = sources.Checkpoint(network=theirs, unlabelled=True)
    source.bind(network)
    noisy, _ = questions()
    with torch.no_grad():
        expected = theirs(noisy.x_t, noisy.t, torch.full((6,), 9)).velocity
    assert torch.equal(ask(source, network)[0], expected)
    assert source.describe() == "Checkpoint(network=(given), given, unlabelled)"
    with pytest.raises(ValueError, match="has num_classes 9, must have 5"):
        sources.Checkpoint(network=theirs).bind(network)
    with pytest.raises(ValueError, match="has shape"):
        sources.Checkpoint(network=small(input_size=16), unlabelled=True).bind(network)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sources.RandomBlocks(0.0), "share=0.0: must be in"),
        (lambda: sources.RandomBlocks(1.0), "share=1.0: must be in"),
        (lambda: sources.RandomBlocks(sets=0), "sets=0"),
        (lambda: sources.RandomBlocks(seed=-1), "seed=-1"),
        (lambda: sources.RandomBlocks(0.9), "share=0.9: must leave some of the network's 4 blocks"),
        (lambda: sources.ShiftedTime(1.0), "shift=1.0: must be in"),
        (lambda: sources.ShiftedTime(float("nan")), "shift=nan"),
        (lambda: sources.PerturbedTime(-0.1), "std=-0.1: must be a finite number"),
        (lambda: sources.ShuffledTokens(first=3, last=2), "first=3, last=2: must be 0 <= first"),
        (lambda: sources.ShuffledTokens(last=4), "first=1, last=4: must be 0 <= first"),
        (lambda: sources.DroppedTokens(1.0), "share=1.0: must be in"),
        (lambda: sources.DroppedTokens(0.0), r"share=0.0: must be in \(0, 1\)"),
        (lambda: sources.DroppedTokens(first=-1), "first=-1, last=2: must be 0 <= first"),
    ],
)
def test_bad_settings(network: DiT, make, message: str):
    with pytest.raises(ValueError, match=message) as raised:
        make().bind(network)
    assert "\n" not in str(raised.value)


def test_a_class_alone_has_no_other():
    with pytest.raises(ValueError, match="num_classes=1: must be at least 2 for RandomLabel"):
        sources.RandomLabel().bind(small(num_classes=1))


MAKE = {
    "blocks": lambda: sources.RandomBlocks(0.5),
    "time": lambda: sources.PerturbedTime(0.5),
    "label": lambda: sources.RandomLabel(),
    "shuffled": lambda: sources.ShuffledTokens(),
    "dropped": lambda: sources.DroppedTokens(),
}


def images(network: DiT, guidance: Guidance, seeds: list[int], block: int, sampler: Sampler):
    setting = Setting("ema", 0.9, network, guidance)
    labels, shape = [seed % 5 for seed in seeds], torch.Size(network.shape)
    options = dict(shape=shape, block=block, device=CPU)
    return generate(setting, sampler, PixelSpace(), seeds, labels, **options).int()


@pytest.mark.parametrize("name", MAKE)
def test_an_image_depends_on_its_seed_alone(network: DiT, name: str):
    """Whatever its neighbours, in blocks of any size; the draws do guide."""
    plain = WeakToStrongObjective(LINEAR, Uniform())
    guidance = Autoguidance(9.0, MAKE[name]())
    guidance.bind(network, plain)
    assert guidance.needs_seeds
    sampler = Heun(3) if name == "label" else EulerMaruyama(LINEAR, 4)
    whole = images(network, guidance, [0, 1, 2, 3, 4], 5, sampler)
    for seeds, block in (([3, 1], 2), ([4, 3, 9, 1], 3)):
        found = images(network, guidance, seeds, block, sampler)
        for row, seed in enumerate(seeds):
            if seed < 5:  # of 255: batches of other sizes are rounded otherwise
                assert (found[row] - whole[seed]).abs().max() <= 1
    assert torch.equal(whole, images(network, guidance, [0, 1, 2, 3, 4], 5, sampler))
    unguided = images(network, Unguided(), [0, 1, 2, 3, 4], 5, sampler)
    assert (whole - unguided).abs().max() > 10


def test_guidance_without_draws_gets_no_seeds(network: DiT):
    """A class of a user's, with `field` as it always was, is called as it always was."""

    class Mine(Unguided):
        def field(self, network, y, times):
            return super().field(network, y, times)

    plain = WeakToStrongObjective(LINEAR, Uniform())
    own, usual = (images(network, each(), [1, 2], 2, Euler(2)) for each in (Mine, Unguided))
    assert torch.equal(own, usual)
    random = Autoguidance(2.0, sources.RandomBlocks())
    halves = Segmented(0.5, low_noise=random, high_noise=Mine())
    halves.bind(network, plain)
    assert halves.needs_seeds and not Segmented(0.5, Mine(), ClassifierFree(2.0)).needs_seeds
    assert images(network, halves, [1, 2], 2, Euler(4)).shape == (2, 3, 8, 8)
    with pytest.raises(ValueError, match="seeds=None: must be one per row for autoguidance"):
        random.field(network, torch.zeros(1, dtype=torch.long), [1.0, 0.0])


@pytest.mark.slow
def test_random_blocks_compile_once_a_set(monkeypatch: pytest.MonkeyPatch):
    """The strong pass, and one for each set of the list; nothing after that."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    torch._dynamo.config.recompile_limit = 64
    monkeypatch.setattr(DiT, "compile", partialmethod(nn.Module.compile, backend="aot_eager"))
    network, source = perturbed(small()), sources.RandomBlocks(0.5, sets=4)
    objective = bound(source, network)
    network.compile(dynamic=False)
    drawn, graphs = set[int](), list[int]()
    choice = Drawn.choice
    monkeypatch.setattr(Drawn, "choice", lambda self, n: [c := choice(self, n), drawn.add(c)][0])
    for _ in range(40):
        x, y = torch.randn(8, 3, 8, 8), torch.arange(8) % 5
        objective(network, x, y, Step(1), Log()).mean().backward()
        graphs.append(counters["stats"]["unique_graphs"])
        assert graphs[-1] == 1 + len(drawn)
    assert drawn == {0, 1, 2, 3}
    assert not counters["graph_break"]
    assert [b for a, b in itertools.pairwise(graphs) if b > a] == [3, 4, 5]


def test_velocity_of_the_strong_pass_is_left_alone(network: DiT):
    """No source changes the tokens that it was given."""
    for make in MAKE.values():
        source = make()
        source.bind(network)
        _, strong = ask(source, network)
        assert torch.equal(strong.velocity, velocity(network))
        noisy, y = questions()
        with torch.no_grad():
            again = network(noisy.x_t, noisy.t, y, keep_hidden=source.keep_hidden)
        assert all(torch.equal(again.hidden[b], strong.hidden[b]) for b in source.keep_hidden)
