"""Fine-tuning: what fits of other weights is taken over, and the rest is said."""

import argparse
import json
from pathlib import Path

import pytest
import torch
from conftest import ROOT, perturbed
from torch.nn import functional as F

from w2s_train import weak
from w2s_train.errors import UserError
from w2s_train.inbuilt import UniformScale
from w2s_train.interpolant import LinearInterpolant
from w2s_train.models import DiT, made_of, published_sit
from w2s_train.models.published import architecture
from w2s_train.models.warm_start import fitted, resampled, warm_start
from w2s_train.module import DiffusionModule
from w2s_train.objective import WeakToStrongObjective
from w2s_train.sampler import Euler
from w2s_train.segment import Extrapolation
from w2s_train.timesteps import Uniform
from w2s_train.weak import WeakSource

SMALL = dict(input_size=8, in_channels=1, hidden_size=32, depth=4, num_heads=4, num_classes=5)


def module(source: WeakSource, **changes: int) -> DiffusionModule:
    segment = Extrapolation(0.0, 1.0, 0.3, source)
    objective = WeakToStrongObjective(LinearInterpolant(), Uniform(), [segment])
    return DiffusionModule(DiT(**(SMALL | changes)), objective, Euler(2), ema_decay=[0.9, 0.5])


def saved(path: Path, source: WeakSource, **changes: int) -> DiffusionModule:
    """A module whose weights are those of no constructor, in a checkpoint."""
    theirs = perturbed(module(source, **changes))
    perturbed(theirs.ema.module.requires_grad_(True))
    torch.save({"state_dict": theirs.state_dict(), "network": None}, path)
    return theirs


def velocity(network: DiT, y: torch.Tensor) -> torch.Tensor:
    x = torch.randn(len(y), *network.shape, generator=torch.Generator().manual_seed(0))
    return network(x, torch.linspace(0.1, 0.9, len(y)), y).velocity


def test_equal_networks_are_equal(tmp_path: Path):
    """The averaged weights, in network, averages and copies; the head at another depth, too."""
    theirs = saved(tmp_path / "x.ckpt", weak.IntermediateHead(block=0))
    ours = module(weak.IntermediateHead(block=2))
    assert warm_start(ours, str(tmp_path / "x.ckpt")).endswith("x.ckpt: everything fits")
    y, source = torch.tensor([0, 3, 4, 5]), theirs.ema.module
    for network in (ours.network, ours.ema.module, ours.more_ema[0].module):
        assert torch.equal(velocity(network, y), velocity(source, y))
    head, other = (each.objective.segments[0].weak.head.state_dict() for each in (ours, theirs))
    assert all(torch.equal(head[name], other[name]) for name in head)

    lagging = module(weak.EMA(decay=0.5, lag=2))
    warm_start(lagging, str(tmp_path / "x.ckpt"))
    copy = lagging.objective.segments[0].weak.average.module
    assert torch.equal(velocity(copy, y), velocity(source, y))


@pytest.mark.slow
def test_a_co_trained_network_still_learns(tmp_path: Path):
    saved(tmp_path / "x.ckpt", weak.CoTrained())
    ours = module(weak.CoTrained())
    before = len(ours.objective.segments[0].weak.learned)
    warm_start(ours, str(tmp_path / "x.ckpt"))
    assert len(ours.objective.segments[0].weak.learned) == before > 0


def test_other_classes_and_twice_the_side(tmp_path: Path):
    """Every class predicts what no class did; positions are between those that were."""
    theirs = saved(tmp_path / "x.ckpt", weak.NullClass())
    ours = module(weak.NullClass(), num_classes=3)
    said = warm_start(ours, str(tmp_path / "x.ckpt"))
    assert said.endswith(": 3 classes instead of 5: all begin as none")
    none = torch.full((4,), 5)
    for label in range(4):
        mine = velocity(ours.network, torch.full((4,), label))
        assert torch.equal(mine, velocity(theirs.ema.module, none))

    larger = module(weak.NullClass(), input_size=16)
    said = warm_start(larger, str(tmp_path / "x.ckpt"))
    assert said.endswith(": pos_embed: resampled from 16 to 64 patches")
    table = theirs.ema.module.pos_embed
    grid = table.reshape(1, 4, 4, 32).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, (8, 8), mode="bicubic", antialias=True)
    assert torch.equal(larger.network.pos_embed, grid.permute(0, 2, 3, 1).reshape(1, 64, 32))
    # A ramp stays one, away from the border.
    ramp = torch.arange(6.0).repeat_interleave(6).reshape(1, 36, 1)
    rows = resampled(ramp, 144).reshape(12, 12)
    torch.testing.assert_close(rows[4:8, 5], torch.tensor([1.75, 2.25, 2.75, 3.25]))


def test_what_does_not_fit_is_said(tmp_path: Path):
    saved(tmp_path / "x.ckpt", weak.NullClass(), depth=2)
    ours = module(weak.IntermediateHead())
    said = warm_start(ours, str(tmp_path / "x.ckpt")).partition(".ckpt: ")[2]
    parts = ["new: blocks.2 (10 tensors)", "new: blocks.3 (10 tensors)"]
    assert said.split("; ") == [*parts, "new: segments.0 (4 tensors)"]
    with pytest.raises(UserError) as error:
        warm_start(module(weak.NullClass(), hidden_size=64), str(tmp_path / "x.ckpt"))
    assert "of the network's weights fit, must be 10% or more" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(hidden_size=64), "has hidden_size 32, must have 64 as the network"),
        (dict(num_heads=2), "has num_heads 4, must have 2 as the network"),
        (dict(time_scale=-1.0, time_shift=1.0), "has time_scale 1.0, must have -1.0"),
    ],
)
def test_shapes_do_not_tell_all(changes: dict, message: str, tmp_path: Path):
    """Weights that mean something else are refused, although they may fit."""
    theirs = saved(tmp_path / "x.ckpt", weak.NullClass())
    content = torch.load(tmp_path / "x.ckpt", weights_only=True)
    for made in (theirs.network.arguments, made_of(theirs.network)):  # of old versions, and new
        torch.save(content | {"network": made}, tmp_path / "x.ckpt")
        with pytest.raises(UserError, match=message):
            warm_start(module(weak.NullClass(), **changes), str(tmp_path / "x.ckpt"))


def test_what_is_dropped_and_what_learns_alone(tmp_path: Path):
    """Blocks that there are no more; a network that weak sources train is taken over."""
    theirs = saved(tmp_path / "x.ckpt", weak.CoTrained())
    ours = module(weak.CoTrained(), depth=2)
    said = warm_start(ours, str(tmp_path / "x.ckpt")).partition(".ckpt: ")[2]
    assert said == "not taken: blocks.2; not taken: blocks.3"
    mine, other = (each.objective.segments[0].weak.network for each in (ours, theirs))
    assert torch.equal(mine.x_embedder.proj.weight, other.x_embedder.proj.weight)
    assert not any(parameter.requires_grad for parameter in mine.parameters())


def with_scales(*names: str, first: int = 0) -> DiffusionModule:
    """A module whose head and null class, or others of such names, draw their scales."""
    kinds = {"head": weak.IntermediateHead, "class": weak.NullClass, "skip": weak.LayerSkip}
    segments = [Extrapolation(0.0, 1.0, UniformScale(), kinds[n](), name=n) for n in names]
    objective = WeakToStrongObjective(LinearInterpolant(), Uniform(), segments)
    return DiffusionModule(DiT(**SMALL, scales_from=first), objective, Euler(2), ema_decay=0.9)


def written(module: DiffusionModule, path: Path) -> DiT:
    perturbed(perturbed(module).ema.module.requires_grad_(True))
    torch.save({"state_dict": module.state_dict(), "network": made_of(module.network)}, path)
    return module.ema.module


def test_scales_begin_at_zero(tmp_path: Path):
    """Whatever they are, the network is bit for bit the plain one; published weights fit, too."""
    theirs = written(module(weak.NullClass()), tmp_path / "x.ckpt")
    ours = with_scales("head", "class")
    said = warm_start(ours, str(tmp_path / "x.ckpt")).partition(".ckpt: ")[2]
    new = [f"new: scale_embedder.mlps.{k} (2 tensors)" for k in range(2)]
    assert said.split("; ") == [*new, "new: segments.0 (4 tensors)"]
    x, t, y = torch.randn(4, 1, 8, 8), torch.rand(4), torch.tensor([0, 3, 4, 5])
    for network in (ours.network, ours.ema.module):
        for scales in (None, torch.zeros(4, 2), torch.rand(4, 2)):
            out = network(x, t, y, scales=scales).velocity
            assert torch.equal(out, theirs(x, t, y).velocity)
    torch.save(theirs.state_dict(), tmp_path / "sit.pt")
    sizes = dict(num_heads=4, num_classes=5, input_size=8, reversed_time=False)
    public = published_sit(str(tmp_path / "sit.pt"), **sizes)
    public.add_scales(["head"])
    assert torch.equal(public(x, t, y, scales=torch.rand(4, 1)).velocity, theirs(x, t, y).velocity)


def test_scales_are_taken_over_by_name(tmp_path: Path):
    theirs = written(with_scales("head", "class"), tmp_path / "x.ckpt")
    x, t, y = torch.randn(4, 1, 8, 8), torch.rand(4), torch.tensor([0, 3, 4, 5])
    w = torch.rand(4, 1)
    none = torch.zeros_like(w)

    plain = module(weak.NullClass())
    said = warm_start(plain, str(tmp_path / "x.ckpt")).partition(".ckpt: ")[2]
    assert said.split("; ") == [f"not taken: scale {n}" for n in ("head", "class")]
    assert torch.equal(plain.network(x, t, y).velocity, theirs(x, t, y).velocity)

    ours = with_scales("class", "skip")
    said = warm_start(ours, str(tmp_path / "x.ckpt")).partition(".ckpt: ")[2]
    assert said == "new: scale_embedder.mlps.1 (2 tensors); not taken: scale head"
    mine = ours.network(x, t, y, scales=torch.cat([w, torch.rand(4, 1)], 1)).velocity
    other = theirs(x, t, y, scales=torch.cat([none, w], 1)).velocity
    assert torch.equal(mine, other) and not torch.equal(mine, theirs(x, t, y).velocity)

    with pytest.raises(UserError, match="has scales_from 0, must have 3 as the network"):
        warm_start(with_scales("head", "class", first=3), str(tmp_path / "x.ckpt"))


def test_tables_that_are_no_grid(tmp_path: Path):
    """With a class token, or of another width: new, and said."""
    for shape in ((1, 17, 32), (1, 12, 32), (1, 16, 16), (16, 32)):
        fit = fitted({"pos_embed": torch.ones(shape)}, {"pos_embed": torch.zeros(1, 64, 32)})
        assert not fit.changed
        assert fit.left == [f"new: pos_embed, (1, 64, 32) and not {shape}"]


FORMS = {
    "state dict": lambda state: state,
    "ema first": lambda state: {"model": {}, "ema": state, "opt": {}, "args": arguments()},
    "state_dict": lambda state: {"state_dict": wrapped("module.", state), "args": arguments()},
    "compiled": lambda state: {"model": wrapped("_orig_mod.", state)},
    "both": lambda state: {"ema": wrapped("_orig_mod.module.", state), "steps": 7},
    "the other way": lambda state: wrapped("module._orig_mod.", state),
}


def arguments() -> argparse.Namespace:
    return argparse.Namespace(model="SiT-XL/2", proj_coeff=0.5, nested=argparse.Namespace(a=[1]))


def wrapped(prefix: str, state: dict) -> dict:
    return {prefix + key: value for key, value in state.items()}


@pytest.mark.parametrize("form", FORMS)
def test_training_checkpoints_of_others(form: str, tmp_path: Path):
    theirs = perturbed(DiT(**SMALL))
    extra = {"projectors.0.weight": torch.ones(2)}
    torch.save(FORMS[form](theirs.state_dict() | extra), tmp_path / "x.pt")
    ours = published_sit(str(tmp_path / "x.pt"), num_heads=4, reversed_time=False)
    y = torch.tensor([0, 2, 5])
    assert torch.equal(velocity(ours, y), velocity(theirs, y))


def test_a_published_network_of_other_classes_and_size(tmp_path: Path):
    """The original SiT's time and sign, three classes, twice the side."""
    theirs = perturbed(DiT(**SMALL, out_channels=2))
    torch.save(theirs.state_dict(), tmp_path / "x.pt")
    with pytest.warns(UserWarning, match="3 classes instead of 5.*|pos_embed: resampled"):
        ours = published_sit(str(tmp_path / "x.pt"), num_heads=4, num_classes=3, input_size=16)
    assert (ours.null_class, ours.shape) == (3, (1, 16, 16))
    big = DiT(**(SMALL | dict(input_size=16)), out_channels=2)
    big.load_state_dict(fitted(theirs.state_dict(), big.state_dict()).state)
    x, t = torch.randn(3, 1, 16, 16), torch.rand(3)
    expected = -big(x, 1 - t, torch.full((3,), 5)).velocity
    torch.testing.assert_close(ours(x, t, torch.tensor([0, 2, 3])).velocity, expected)


def test_half_a_published_network(tmp_path: Path):
    state = DiT(**SMALL).state_dict()
    del state["blocks.3.mlp.fc2.weight"]
    torch.save(state | {"blocks.0.attn.odd": torch.ones(1)}, tmp_path / "x.pt")
    with pytest.raises(UserError, match=r"new: blocks\.3; blocks\.0\.attn\.odd is unknown"):
        published_sit(str(tmp_path / "x.pt"), num_heads=4)
    for key in ("blocks.0.mlp.fc1.weight", "x_embedder.proj.weight", "pos_embed"):
        torch.save(DiT(**SMALL).state_dict() | {key: None}, tmp_path / "x.pt")
        with pytest.raises(UserError, match=f"must hold a published .*; lacks {key}$"):
            published_sit(str(tmp_path / "x.pt"), num_heads=4)


def test_heads_of_another_network():
    """A config before may have set them, and shapes would not tell."""
    state = DiT(input_size=4, hidden_size=384, depth=1, num_heads=6).state_dict()
    assert architecture(state)["num_heads"] == architecture(state, 6)["num_heads"] == 6
    with pytest.raises(UserError, match="num_heads=4: must be null or 6, as published for hidden"):
        architecture(state, 4)


@pytest.mark.slow
def test_as_a_user_does_it(digits: None, tmp_path: Path, monkeypatch, capsys):
    """Fits three classes from a run of ten; stopped, it goes on without the file."""
    from w2s_train.cli import main

    monkeypatch.chdir(ROOT)
    base = ["-c", "configs/digits_w2s.yaml", "-c", "tests/tiny.yaml"]
    main(["fit", *base, f"--trainer.default_root_dir={tmp_path / 'old'}"])
    capsys.readouterr()
    old = tmp_path / "old" / "checkpoints" / "step-000006.ckpt"
    options = ["--model.ema_decay=0.5", f"--trainer.default_root_dir={tmp_path / 'new'}"]
    options += [f"--start_from={old}", "--model.objective.init_args.total_steps=6"]
    main(["fit", *base, *options, "--trainer.max_steps=3"])
    old.unlink()
    main(["fit", *base, *options, "--ckpt_path=last"])
    scores = json.loads((tmp_path / "new" / "scores.json").read_text())
    assert [each["step"] for each in scores] == [3, 6]
    with pytest.raises(SystemExit, match="start_from=.*must be an existing file"):
        main(["fit", *base, *options, f"--trainer.default_root_dir={tmp_path / 'third'}"])
    assert not (tmp_path / "third").exists()


@pytest.mark.slow
def test_published_weights_are_scored_without_a_checkpoint(
    digits: None, tmp_path: Path, monkeypatch
):
    """The scores of a run's checkpoint, from its weights as a published file."""
    from w2s_train.cli import main
    from w2s_train.models import saved_network

    monkeypatch.chdir(ROOT)
    base = ["-c", "configs/digits_w2s.yaml", "-c", "tests/tiny.yaml"]
    main(["fit", *base, f"--trainer.default_root_dir={tmp_path / 'run'}"])
    path = tmp_path / "run" / "checkpoints" / "step-000006.ckpt"
    torch.save(saved_network(str(path)).state_dict(), tmp_path / "x.pt")
    made = {"path": str(tmp_path / "x.pt"), "num_heads": 2, "reversed_time": False}
    network = {"class_path": "w2s_train.models.published_sit", "init_args": made}
    (tmp_path / "published.yaml").write_text(json.dumps({"model": {"network": network}}))
    main(
        ["validate", *base, "-c", str(tmp_path / "published.yaml")]
        + [f"--trainer.default_root_dir={tmp_path / 'scored'}"]
    )
    (score,) = json.loads((tmp_path / "scored" / "scores.json").read_text())
    last = json.loads((tmp_path / "run" / "scores.json").read_text())[-1]
    assert score["value"] == last["value"]
    assert score["step"] == 0
