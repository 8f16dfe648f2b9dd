"""Rows are chosen with the right probability, in known numbers, and keep the gradient's mean."""

import pytest
import torch
from conftest import perturbed
from test_objective import LINEAR, close, gradients, objective

from w2s_train import timesteps as rows
from w2s_train import weak
from w2s_train.errors import UserError
from w2s_train.models import DiT
from w2s_train.segment import Chosen, Consistency, Extrapolation

CPU = torch.device("cpu")


def every_offset(monkeypatch, draw, count: int) -> torch.Tensor:
    """What ``draw`` gives for each of the ``count`` random offsets."""
    drawn = []
    for offset in range(count):

        def randint(high: int, size: tuple, device: torch.device, offset: int = offset):
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


@pytest.mark.parametrize("n, m", [(10, 3), (7, 7), (64, 21), (5, 1)])
def test_subset(monkeypatch, n: int, m: int):
    """As many as asked for, none twice, each row as often as any other."""
    drawn = every_offset(monkeypatch, lambda: rows.subset(n, m, CPU), n)
    assert (drawn.diff(dim=1) > 0).all() and drawn.min() == 0 and drawn.max() == n - 1
    assert drawn.flatten().bincount().tolist() == [m] * n


def noisy_batch(n: int):
    x, noise = torch.randn(2, n, 3, 8, 8)
    return LINEAR.corrupt(x, noise, torch.sort(torch.rand(n)).values)


def test_the_mean_gradient_over_all_draws_of_a_share_is_exact(network: DiT, monkeypatch):
    """The target's shift is linear in what is drawn, whatever is guessed of it."""
    noisy, y = noisy_batch(8), torch.tensor([0, 1, 5, 2, 3, 4, 5, 1])
    plain = objective(Extrapolation(0.0, 1.0, 0.5, weak.LayerSkip([2])))
    segment = Extrapolation(0.0, 1.0, 0.5, weak.LayerSkip([2]), share=0.4)
    ours = objective(segment)
    plain.bind(network)
    ours.bind(network)
    perturbed(segment.guess)
    exact = gradients(network, plain.evaluate(network, noisy, y).total)
    # Without a draw, all rows are evaluated and nothing is left to guess.
    close(gradients(network, ours.evaluate(network, noisy, y).total), exact)
    sums = [torch.zeros_like(g) for g in exact]
    guessed = []

    def draw():
        chosen = segment.choose(slice(0, 8), y != 5, 0.0)
        assert len(chosen.evaluated) == 3
        losses = ours.evaluate(network, noisy, y, [chosen])
        guessed.append(
            torch.autograd.grad(losses.total, segment.guess.parameters(), retain_graph=True)
        )
        for total, gradient in zip(sums, gradients(network, losses.total), strict=True):
            total += gradient / 8
        return losses.total

    every_offset(monkeypatch, draw, 8)
    close(sums, exact)
    assert all(gradient.abs().max() > 0 for gradient in guessed[0])


def test_the_guess_learns_the_difference(network: DiT):
    """By regression at the rows that are evaluated; then little is left to the draw."""
    segment = Extrapolation(0.0, 1.0, 0.5, weak.NullClass(), share=0.25)
    ours = objective(segment)
    ours.bind(network)
    network.requires_grad_(False)
    optimizer, errors = torch.optim.Adam(segment.guess.parameters(), lr=0.02), list[float]()
    for _ in range(300):
        losses = ours(network, torch.randn(32, 3, 8, 8), torch.arange(32) % 5)
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
        (error,) = (s for s in losses.statistics if s.names == ("t_0-1/guess_error_rms",))
        errors.append(error.values.mean().item())
    assert sum(errors[-30:]) < 0.5 * sum(errors[:30])


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
        chosen = segment.choose(slice(8, 40), y != 5, 0.25)
        fast = ours.evaluate(network, noisy, y, [chosen])
        exact = ours.evaluate(network, noisy, y, [Chosen(slice(8, 40))])
        torch.testing.assert_close(fast.per_sample, exact.per_sample)
        close(gradients(network, fast.total), gradients(network, exact.total))
    assert set(seen[::2]) == ({32} if kind == "omega" else {24})


def test_a_share_of_the_labelled_rows(network: DiT):
    segment = Extrapolation(0.0, 1.0, 0.6, weak.NullClass(), share=0.5)
    labelled = torch.arange(40) % 4 != 1
    chosen = segment.choose(slice(0, 40), labelled, 0.25)
    assert isinstance(chosen.rows, torch.Tensor) and isinstance(chosen.evaluated, torch.Tensor)
    assert len(chosen.rows) == 30 and labelled[chosen.rows].all()
    assert len(chosen.evaluated) == 15
    assert set(chosen.evaluated.tolist()) < set(chosen.rows.tolist())


def test_a_share_that_cannot_be():
    for share in (0.0, -1.0, 1.5):
        with pytest.raises(UserError, match=f"^share={share}: must be in "):
            Extrapolation(0.0, 1.0, 0.3, weak.NullClass(), share=share)
    with pytest.raises(UserError, match="^share=0.5: must be 1, IntermediateHead learns on every"):
        Extrapolation(0.0, 1.0, 0.3, weak.IntermediateHead(), share=0.5)
    with pytest.raises(UserError, match="^share=0.5: must be 1, omega=1.5"):
        Extrapolation(0.0, 1.0, 0.3, weak.NullClass(), share=0.5, omega=1.5)


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


def test_a_share_of_no_rows(network: DiT):
    """Timesteps in any order may leave a segment empty; its guess still is part of the graph."""
    segment = Extrapolation(0.0, 0.5, 0.3, weak.NullClass(), share=0.5)
    ours = objective(segment)
    ours.bind(network)
    noisy = LINEAR.corrupt(*torch.randn(2, 4, 3, 8, 8), torch.full((4,), 0.9))
    losses = ours.evaluate(network, noisy, torch.arange(4))
    torch.testing.assert_close(
        losses.total, objective().evaluate(network, noisy, torch.arange(4)).total
    )
    losses.total.backward()
    assert all(p.grad is not None for p in segment.guess.parameters())
