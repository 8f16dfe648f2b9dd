"""The switches of the block: each trains, resumes, drops and shuffles tokens as the plain one."""

import pytest
import torch
from conftest import perturbed
from test_dit import SMALL, batch
from torch import Tensor

from w2s_train import weak
from w2s_train.errors import UserError
from w2s_train.interpolant import CosineInterpolant, LinearInterpolant
from w2s_train.log import Log
from w2s_train.models import DiT
from w2s_train.objective import WeakToStrongObjective
from w2s_train.segment import Extrapolation
from w2s_train.timesteps import Uniform

TODAY = dict(rope=True, swiglu=True, rmsnorm=True, qk_norm=True)
SWITCHES = {
    "rope": dict(rope=True),
    "swiglu": dict(swiglu=True),
    "rmsnorm": dict(rmsnorm=True),
    "layer": dict(qk_norm="layer"),
    "shift": dict(shift=False),
    "class_tokens": dict(class_tokens=3),
    "today": TODAY,
    "all": TODAY | dict(shift=False, class_tokens=2, data_on="linear", patch_size=1),
}
ALL = pytest.mark.parametrize("name", SWITCHES)


def made(name: str, **more: object) -> DiT:
    torch.manual_seed(3)
    return perturbed(DiT(**(SMALL | SWITCHES[name] | more)))


def gradients(network: DiT) -> dict[str, Tensor]:
    torch.manual_seed(4)
    out = network(*batch(), keep_hidden=(1,))
    (out.velocity.square().sum() + out.hidden[1].square().sum()).backward()
    return {n: p.grad for n, p in network.named_parameters() if p.requires_grad}


@ALL
def test_gradients_and_rebuilding(name: str):
    """All get one, the same where blocks are recomputed; its arguments rebuild it."""
    network = made(name)
    found = gradients(network)
    assert all(gradient.abs().max() > 0 for gradient in found.values())
    other = DiT(**(network.arguments | dict(gradient_checkpointing=2)))
    other.load_state_dict(network.state_dict())
    for key, gradient in gradients(other).items():
        assert torch.equal(gradient, found[key]), key


@ALL
@torch.no_grad()
def test_passes_go_on_from_kept_tokens(name: str):
    network, (x, t, y) = made(name), batch()
    whole = network(x, t, y, keep_hidden=(-1, 0, 2))
    for block in (-1, 0):
        again = network(x, t, y, resume=(block, whole.hidden[block]))
        torch.testing.assert_close(again.velocity, whole.velocity, rtol=0, atol=1e-6)
    assert whole.hidden[2].shape[1] == (8 // network.patch_size) ** 2  # of the image alone
    said = network.final_layer(whole.hidden[2], whole.cond)
    if network.data_on:
        said = (x - said) / t.clamp(min=0.05).view(-1, 1, 1, 1)
    torch.testing.assert_close(said, whole.velocity)


@ALL
@torch.no_grad()
def test_tokens_know_their_places(name: str):
    """Few tokens, in any order, come out as if the others had been masked."""
    network, (x, t, y) = made(name), batch()
    tokens = network(x, t, y, keep_hidden=(-1,)).hidden[-1]
    order = torch.stack([torch.randperm(tokens.shape[1]) for _ in x])
    index = order.unsqueeze(2).expand_as(tokens)
    options = dict(keep_hidden=(2,), places=order)
    moved = network(x, t, y, resume=(-1, tokens.gather(1, index)), **options).hidden[2]
    plain = network(x, t, y, keep_hidden=(2,)).hidden[2]
    torch.testing.assert_close(moved, plain.gather(1, index), rtol=1e-4, atol=1e-5)


def test_rotations_are_relative():
    """The product of a query and a key depends on the difference of their places only."""
    from w2s_train.models.rope import Rope, rotate

    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)
    turned = [rotate(a.expand(1, 1, 36, 8), Rope(8, 6)().double())[0, 0] for a in (q, k)]
    products = (turned[0] @ turned[1].T).view(6, 6, 6, 6)  # rows and columns of both
    torch.testing.assert_close(products[1, 2, 3, 5], products[0, 1, 2, 4], rtol=0, atol=1e-6)
    assert (products[0, 0, 0, 3] - products[0, 0, 3, 0]).abs() > 1e-3


def test_class_tokens_tell_the_class():
    """Beside the condition, which is made the same for all here; null class and label differ."""
    network = made("class_tokens")
    x, t, _ = batch(1)
    labels = torch.arange(6)
    network.y_embedder.embedding_table.weight.data[1:] = 0
    network.t_embedder.mlp[2].weight.data.zero_()
    for block in network.blocks:
        block.adaLN_modulation[1].weight.data.zero_()
    network.final_layer.adaLN_modulation[1].weight.data.zero_()
    out = network(x.expand(6, -1, -1, -1), t.expand(6), labels).velocity
    assert (out[0] - out[1]).abs().max() > 1e-3
    torch.testing.assert_close(out[1:], out[1:2].expand(5, -1, -1, -1))


@pytest.mark.parametrize("source", [weak.IntermediateHead, weak.DroppedTokens, weak.ShuffledTokens])
@pytest.mark.parametrize("name", ["all", "today"])
def test_sources_and_segments(source: type, name: str):
    """Losses are finite, and the network and heads learn."""
    network = made(name)
    segments = [
        Extrapolation(0.0, 0.5, 0.4, source()),
        Extrapolation(0.5, 1, 0.4, weak.NullClass()),
    ]
    objective = WeakToStrongObjective(LinearInterpolant(), Uniform(), segments)
    objective.bind(network, 0.1)
    x, _, y = batch(8)
    loss = objective(network, x, y, weak.Step(), Log())
    loss.mean().backward()
    learned = [*network.parameters(), *objective.parameters()]
    assert loss.isfinite().all() and all(p.grad is not None for p in learned if p.requires_grad)


@pytest.mark.parametrize(
    "data_on, interpolant",
    [
        ("linear", LinearInterpolant()),
        ("cosine", CosineInterpolant()),
    ],
)
@torch.no_grad()
def test_data_become_velocities(data_on: str, interpolant):
    """A last layer that says the data is right about the velocity, where sigma is 0.05 or more."""
    network, x = DiT(**SMALL, data_on=data_on), torch.randn(6, 3, 8, 8)
    t = torch.tensor([0.01, 0.06, 0.2, 0.5, 0.9, 1.0])
    noisy = interpolant.corrupt(x, torch.randn_like(x), t)
    network.final_layer.register_forward_hook(lambda *_: x)
    v = network(noisy.x_t, t, torch.arange(6)).velocity
    torch.testing.assert_close(v[1:], noisy.v[1:], rtol=1e-4, atol=1e-4)
    _, sigma, *_ = interpolant.coefficients(t)
    torch.testing.assert_close(v[0], noisy.v[0] * sigma[0] / 0.05, rtol=1e-4, atol=1e-4)
    head = weak.IntermediateHead()
    head.bind(network)
    head.head.register_forward_hook(lambda *_: x)
    out = network(noisy.x_t, t, torch.arange(6), keep_hidden=head.keep_hidden)
    said = head.predict(network, noisy, torch.arange(6), out)
    assert torch.equal(said, v)


def test_velocities_below_the_floor_are_exact():
    """There the best output is x_t - 0.05 v, which gives v."""
    x_t, v, t = torch.randn(2, 1, 2, 2), torch.randn(2, 1, 2, 2), torch.tensor([0.001, 0.04])
    linear = LinearInterpolant()
    torch.testing.assert_close(linear.data_to_velocity(x_t - 0.05 * v, x_t, t, 0.05), v)


@pytest.mark.parametrize(
    "bad, message",
    [
        (dict(rope=True, num_heads=16), "rope=true: must have heads as wide as a multiple of 4"),
        (dict(class_tokens=-1), "class_tokens=-1: "),
        (dict(data_on="sine"), "data_on=sine: must be null, linear or cosine"),
        (dict(qk_norm="rms"), "qk_norm=rms: must be true, false or layer"),
    ],
)
def test_bad_switches(bad: dict, message: str):
    with pytest.raises(UserError, match=f"^{message}"):
        DiT(**(SMALL | bad))


def test_data_on_another_interpolant():
    objective = WeakToStrongObjective(CosineInterpolant(), Uniform())
    with pytest.raises(
        UserError, match="^network.data_on=linear: must be that of the objective, C"
    ):
        objective.bind(DiT(**SMALL, data_on="linear"), 0.1)
