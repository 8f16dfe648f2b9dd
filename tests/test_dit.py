"""The network: gradients everywhere, zero at the start, published weights convert."""

import pytest
import torch
from conftest import perturbed

from w2s_train.interpolant import CosineInterpolant, LinearInterpolant
from w2s_train.models import DiT, DiTOutput
from w2s_train.models.dit import position_table
from w2s_train.models.published import NoisePredictionField, published_dit, published_sit

SMALL = dict(input_size=8, in_channels=3, hidden_size=32, depth=3, num_heads=4, num_classes=5)


def batch(n: int = 6):
    return torch.randn(n, 3, 8, 8), torch.rand(n), torch.arange(n) % 6


def test_untrained_network_predicts_zero():
    assert DiT(**SMALL)(*batch()).velocity.abs().max() == 0


@pytest.mark.parametrize("qk_norm", [False, True])
def test_every_parameter_gets_a_gradient(qk_norm: bool):
    network = perturbed(DiT(**SMALL, qk_norm=qk_norm))
    network(*batch()).velocity.square().sum().backward()
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.abs().max() > 0, name


def test_skipping_and_keeping(network: DiT):
    x, t, y = batch()
    y = y % 5
    plain = network(x, t, y)
    assert plain.hidden == {}
    kept = network(x, t, y, keep_hidden=(1, 3))
    assert torch.equal(kept.velocity, plain.velocity)
    assert sorted(kept.hidden) == [1, 3]
    # The last kept tokens are what the last layer reads.
    assert torch.equal(network.final_layer(kept.hidden[3], kept.cond), plain.velocity)
    skipped = network(x, t, y, skip_blocks=(2,))
    removed = DiT(**(SMALL | dict(depth=3)))
    state = network.state_dict()
    moved = {
        k.replace("blocks.3.", "blocks.2."): v for k, v in state.items() if "blocks.2" not in k
    }
    removed.load_state_dict(moved)
    torch.testing.assert_close(skipped.velocity, removed(x, t, y).velocity)


DEEP = SMALL | dict(depth=5)


def recomputed(k: int | bool) -> tuple[int, list[torch.Tensor]]:
    """Bytes that are kept for the backward pass by groups of k blocks, and the gradients."""
    torch.manual_seed(1)
    network, kept = perturbed(DiT(**DEEP, gradient_checkpointing=k)), {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = network(*batch(), keep_hidden=(1, 3), skip_blocks=(2,))
    total = sum(kept.values())
    parts = [out.velocity, *out.hidden.values()]
    sum(part.square().sum() for part in parts).backward()
    return total, [p.grad for p in network.parameters() if p.grad is not None]


def test_checkpointing_changes_nothing():
    """Bitwise, for groups of any size, with blocks kept and skipped inside of them."""
    _, plain = recomputed(0)
    for k in (1, True, 2, 3, 5, 9):
        _, gradients = recomputed(k)
        assert len(gradients) == len(plain)
        assert all(torch.equal(one, other) for one, other in zip(plain, gradients, strict=True)), k


def test_checkpointing_saves_memory():
    """Of each group its input is kept; larger groups keep less, until all is recomputed at once."""
    bytes_of = {k: recomputed(k)[0] for k in (0, 1, 2, 3, 5)}
    assert bytes_of[5] < bytes_of[3] < bytes_of[2] < bytes_of[1] < bytes_of[0] / 2
    tokens = 6 * 16 * 32 * 4  # bytes of the input of a group, in float32
    assert bytes_of[3] - bytes_of[5] == tokens


def test_checkpoints_with_a_switch_load():
    """Checkpoints of older versions say true or false."""
    for switch in (False, True):
        network = DiT(**(DiT(**SMALL).arguments | dict(gradient_checkpointing=switch)))
        assert network.gradient_checkpointing == switch
        assert type(network.arguments["gradient_checkpointing"]) is int


def test_rows_are_independent(network: DiT):
    x, t, y = batch()
    whole = network(x, t, y % 5).velocity
    part = network(x[2:4], t[2:4], y[2:4] % 5).velocity
    torch.testing.assert_close(whole[2:4], part)


def test_output_rows(network: DiT):
    out = network(*batch(), keep_hidden=(0, 2))
    part: DiTOutput = out.take(torch.tensor([4, 1]), [0])
    assert list(part.hidden) == [0]
    assert torch.equal(part.velocity, out.velocity[[4, 1]])
    assert torch.equal(part.hidden[0], out.hidden[0][[4, 1]])


def test_position_table_encodes_column_then_row():
    table = position_table(16, side=3).view(3, 3, 16)
    assert torch.equal(table[0, :, :8], table[2, :, :8])  # the first half is blind to the row
    assert torch.equal(table[:, 0, 8:], table[:, 2, 8:])
    assert table[0, :, :8].unique(dim=0).shape[0] == 3


@pytest.mark.parametrize(
    "bad",
    [
        dict(patch_size=3),
        dict(num_heads=5),
        dict(hidden_size=30, num_heads=3),
        dict(depth=0),
        dict(mlp_ratio=float("nan")),
        dict(num_classes=0),
        dict(out_channels=2),
        dict(gradient_checkpointing=-1),
    ],
)
def test_bad_sizes(bad: dict):
    with pytest.raises(ValueError, match=f"{next(iter(bad))}="):
        DiT(**(SMALL | bad))


def test_published_sit(tmp_path):
    """v(x, t) = -v_SiT(x, 1 - t), variance channels dropped, sizes read from the weights."""
    theirs = perturbed(DiT(**SMALL, out_channels=6))
    torch.save({"ema": theirs.state_dict(), "args": None}, tmp_path / "sit.pt")
    ours = published_sit(str(tmp_path / "sit.pt"), num_heads=4)
    x, t, y = batch()
    assert ours(x, t, y).rest.shape[1] == 0
    torch.testing.assert_close(ours(x, t, y).velocity, -theirs(x, 1 - t, y).velocity)


def test_published_repa(tmp_path):
    """REPA and SGG use our time and sign; other networks in the file are left out."""
    theirs = perturbed(DiT(**SMALL))
    state = theirs.state_dict() | {"projectors.0.weight": torch.ones(2)}
    torch.save(state, tmp_path / "repa.pt")
    ours = published_sit(str(tmp_path / "repa.pt"), num_heads=4, reversed_time=False)
    torch.testing.assert_close(ours(*batch()).velocity, theirs(*batch()).velocity, rtol=0, atol=9)
    x, t, y = batch()
    assert torch.equal(ours(x, t, y).velocity, theirs(x, t, y).velocity)


def test_published_heads_must_be_known(tmp_path):
    torch.save(DiT(**SMALL).state_dict(), tmp_path / "odd.pt")
    with pytest.raises(ValueError, match="num_heads=None"):
        published_dit(str(tmp_path / "odd.pt"))


class GaussianNoise(torch.nn.Module):
    """The exact noise prediction of DDPM for data N(0, 0.25): e = sqrt(1 - a) z / var(z)."""

    def __init__(self, a: torch.Tensor) -> None:
        super().__init__()
        self.a = a

    def forward(self, z, step, y):
        k = step[0].item()
        low = int(k)
        log = (1 - self.a).log() - self.a.log()
        level = log[low] + (k - low) * (log[min(low + 1, 999)] - log[low])
        a = 1 / (1 + level.exp())
        noise = (1 - a).sqrt() * z / (0.25 * a + 1 - a)
        return DiTOutput(noise, noise[:, :0], {}, noise)


@pytest.mark.parametrize("interpolant", [LinearInterpolant(), CosineInterpolant()])
@pytest.mark.parametrize("t", [0.05, 0.3, 0.7, 0.99, 1.0])
def test_noise_prediction_becomes_velocity(interpolant, t: float):
    """Against the closed form E[v | x_t] for Gaussian data, at every noise level."""
    y = torch.zeros(4, dtype=torch.long)
    field = NoisePredictionField(GaussianNoise(torch.ones(1)), y, interpolant)
    field.network.a = field.a
    x_t = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    time = torch.tensor(t, dtype=torch.float64)
    alpha, sigma, alpha_dot, sigma_dot = interpolant.coefficients(time)
    variance = 0.25 * alpha**2 + sigma**2
    exact = (0.25 * alpha * alpha_dot + sigma * sigma_dot) / variance * x_t
    torch.testing.assert_close(field(x_t, t, t), exact, rtol=2e-2, atol=2e-2)
