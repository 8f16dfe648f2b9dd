"""Rows are chosen with the right probability, in known numbers; some may be passed over."""

import pytest
import torch
from conftest import perturbed
from given import evaluate
from test_objective import LINEAR, close, gradients, objective

from w2s_train import timesteps as rows
from w2s_train import weak
from w2s_train.models import DiT
from w2s_train.segment import Consistency, Extrapolation

CPU = torch.device("cpu")


def every_offset(monkeypatch, draw, count: int) -> torch.Tensor:
    """What ``draw`` gives for each of the ``count`` random offsets."""
    drawn = []
    for offset in range(count):

        def randint(high: int, size: tuple, device: object, generator: None, offset: int = offset):
            assert (high, size) == (count, ())
            return torch.tensor(offset)

        monkeypatch.setattr(torch, "randint", randint)
        drawn.append(draw())
    return torch.stack(drawn)


@pytest.mark.parametrize("share, offsets", [(0.1, 10), (0.15, 20), (1.0, 1), (0.0, 1), (0.37, 100)])
def test_spread(monkeypatch, share: float, offsets: int):
    """Every row has its probability exactly, any k in succession the least number or one more."""
    chosen = every_offset(monkeypatch, lambda: rows.spread(64, share, CPU), offsets)
    assert torch.equal(chosen.float().mean(0), torch.full((64,), share))
    for k in (1, 7, 20, 51, 64):
        counts = chosen.int().unfold(1, k, 1).sum(2)
        assert counts.min() == rows.at_least(k, share) and counts.max() <= k * share + 1


def noisy_batch(n: int):
    x, noise = torch.randn(2, n, 3, 8, 8)
    return LINEAR.corrupt(x, noise, torch.sort(torch.rand(n)).values)


@pytest.mark.parametrize("kind", ["extrapolation", "consistency", "omega"])
def test_rows_without_label_are_passed_over(network: DiT, kind: str):
    """The null pass sees the other rows only, as many at every step, and nothing else changes."""
    source, seen = weak.NullClass(), list[int]()
    predict = source.predict

    def counted(network, noisy, y, strong):
        seen.append(len(y))
        return predict(network, noisy, y, strong)

    source.predict = counted  # type: ignore[method-assign]
    segment = {
        "extrapolation": lambda: Extrapolation(0.2, 1.0, 0.6, source),
        "consistency": lambda: Consistency(0.2, 1.0, source),
        "omega": lambda: Extrapolation(0.2, 1.0, 0.3, source, omega=1.5),
    }[kind]()
    ours = objective(segment)
    ours.bind(network, label_dropout=0.25)
    for _ in range(5):
        y = torch.where(rows.spread(40, 0.25, CPU), 5, torch.arange(40) % 5)
        x = torch.randn(40, 3, 8, 8)
        noisy = ours.draw(x)
        fast = evaluate(ours, network, noisy, y, ordered=True)
        exact = evaluate(ours, network, noisy, y)
        torch.testing.assert_close(fast.per_sample, exact.per_sample)
        close(gradients(network, fast.total), gradients(network, exact.total))
    assert set(seen[::2]) == ({32} if kind == "omega" else {24})


@pytest.mark.parametrize("blocks", [[0], [1], [1, 3], [2]])
def test_layer_skip_goes_on_where_it_differs(blocks: list[int]):
    """From the strong pass's tokens before the first skipped block: bitwise the whole pass."""
    network = perturbed(DiT(8, 2, 3, 16, depth=4, num_heads=2, num_classes=5))
    source = weak.LayerSkip(blocks)
    source.bind(network)
    noisy, y = noisy_batch(6), torch.arange(6)
    ran = list[int]()
    for i, block in enumerate(network.blocks):
        block.register_forward_hook(lambda *_, i=i: ran.append(i))
    strong = network(noisy.x_t, noisy.t, y, keep_hidden=source.keep_hidden)
    ran.clear()
    found = source.predict(network, noisy, y, strong)
    assert ran == [i for i in range(4) if i > min(blocks) and i not in blocks]
    assert torch.equal(found, network(noisy.x_t, noisy.t, y, skip_blocks=blocks).velocity)
