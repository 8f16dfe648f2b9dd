"""One contract for all weak sources."""

import pytest
import torch
from conftest import perturbed

from w2s_train.interpolant import LinearInterpolant
from w2s_train.models import DiT
from w2s_train.objective import WeakToStrongObjective
from w2s_train.segment import Extrapolation
from w2s_train.timesteps import Uniform
from w2s_train.weak import EMA, IntermediateHead, LayerSkip, NullClass, Step, WeakSource

SOURCES = {
    "null_class": lambda: NullClass(),
    "ema": lambda: EMA(decay=0.5),
    "intermediate_head": lambda: IntermediateHead(block=1),
    "layer_skip": lambda: LayerSkip(blocks=[1, 2]),
    "default_skip": lambda: LayerSkip(),
    "default_head": lambda: IntermediateHead(),
}


def bound(source: WeakSource, network: DiT) -> WeakToStrongObjective:
    segment = Extrapolation(0.0, 1.0, 0.5, source)
    objective = WeakToStrongObjective(LinearInterpolant(), Uniform(), [segment])
    objective.bind(network)
    return objective


def predict(source: WeakSource, network: DiT) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    x, noise = torch.randn(2, 6, 3, 8, 8, generator=generator)
    noisy = LinearInterpolant().corrupt(x, noise, torch.linspace(0.1, 0.9, 6))
    y = torch.arange(6) % 5
    strong = network(noisy.x_t, noisy.t, y, keep_hidden=source.keep_hidden)
    return source.predict(network, noisy, y, strong)


@pytest.mark.parametrize("name", SOURCES)
def test_contract(name: str, network: DiT):
    source = SOURCES[name]()
    objective = bound(source, network)
    trainable = [n for n, p in source.named_parameters() if p.requires_grad]
    assert bool(trainable) == source.trainable

    # One optimizer step reaches exactly what is trainable.
    before = {n: p.clone() for n, p in source.named_parameters()}
    parameters = [p for p in [*network.parameters(), *source.parameters()] if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    objective(network, torch.randn(8, 3, 8, 8), torch.arange(8) % 5).total.backward()
    assert all(p.grad is None for p in source.parameters() if not p.requires_grad)
    optimizer.step()
    changed = {n for n, p in source.named_parameters() if not torch.equal(p, before[n])}
    assert changed <= set(trainable)
    assert bool(changed) == source.trainable
    objective.after_step(network, Step(1, network))

    # State survives save and load, into an objective bound to an untrained network.
    other_network = DiT(8, 2, 3, 32, 4, 4, num_classes=5)
    other_source = SOURCES[name]()
    other = bound(other_source, other_network)
    other.load_state_dict(objective.state_dict())
    other_network.load_state_dict(network.state_dict())
    assert torch.equal(predict(other_source, other_network), predict(source, network))


def test_ema_lags(network: DiT):
    """After one step with decay 0.5 the average is half-way; its prediction is that network's."""
    source = EMA(decay=0.5)
    bound(source, network)
    start = [p.clone() for p in network.parameters()]
    perturbed(network, 0.3)
    source.after_step(network, Step(1))
    midway = DiT(8, 2, 3, 32, 4, 4, num_classes=5)
    for m, a, b in zip(midway.parameters(), start, network.parameters(), strict=True):
        m.data.copy_((a + b) / 2)
    torch.testing.assert_close(predict(source, network), predict(NullClassless(), midway))


class NullClassless(WeakSource):
    """The network itself."""

    def predict(self, network, noisy, y, strong):
        return strong.velocity


def test_head_defaults_to_the_first_third():
    """Block 4 of 12 as published, counted from 1."""
    source = IntermediateHead()
    source.bind(DiT(8, 2, 3, 32, depth=12, num_heads=4, num_classes=5))
    assert source.keep_hidden == (3,)


@pytest.mark.parametrize("block", [-1, 3, 7])
def test_head_needs_an_inner_block(block: int, network: DiT):
    with pytest.raises(ValueError, match=f"block={block}"):
        IntermediateHead(block).bind(network)


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_bad_decay(decay: float):
    with pytest.raises(ValueError, match="decay="):
        EMA(decay)


def test_skipped_blocks_are_those_named(network: DiT):
    """What is left is the network of the other blocks."""
    source = LayerSkip(blocks=[1, 2])
    source.bind(network)
    other = DiT(8, 2, 3, 32, 2, 4, num_classes=5)
    state = {k: v for k, v in network.state_dict().items() if not k.startswith("blocks.")}
    for here, there in ((0, 0), (3, 1)):
        block = network.blocks[here].state_dict()
        state |= {f"blocks.{there}.{k}": v for k, v in block.items()}
    other.load_state_dict(state)
    torch.testing.assert_close(predict(source, network), predict(NullClassless(), other))


@pytest.mark.parametrize("blocks", [[], [-1], [4], [0, 9]])
def test_skipping_needs_blocks_that_exist(blocks: list[int], network: DiT):
    with pytest.raises(ValueError, match="blocks="):
        LayerSkip(blocks).bind(network)
