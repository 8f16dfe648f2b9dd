"""A head for somebody else's network: trained, resumed, and guiding; the network stays as it is."""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import perturbed, sources
from test_resume import assert_same, checkpoint

from w2s_train.cli import main
from w2s_train.generation import generate
from w2s_train.guidance import Autoguidance, FrozenHeadObjective
from w2s_train.interpolant import LinearInterpolant
from w2s_train.log import Log
from w2s_train.models import DiT, published_sit
from w2s_train.module import DiffusionModule
from w2s_train.timesteps import Uniform
from w2s_train.weak import Step

LINEAR = LinearInterpolant()
SSG = ["-c", "configs/guidance/ssg_fit.yaml", "--model.optimizer.init_args.lr=0.02"]


def frozen(network: torch.nn.Module) -> FrozenHeadObjective:
    objective = FrozenHeadObjective(LINEAR, Uniform(), sources.IntermediateHead())
    objective.bind(network)
    objective.plan(10)
    return objective


def test_the_head_learns_plain_velocities_and_the_network_nothing(network: DiT):
    """The gradient of the head is that of |head - v|^2 alone; the network has none."""
    objective = frozen(network)
    head = objective.segments[0].weak.head
    perturbed(head)
    x, y = torch.randn(8, 3, 8, 8), torch.arange(8) % 6
    torch.manual_seed(2)
    objective(network, x, y, Step(1), Log()).mean().backward()
    assert all(p.grad is None for p in network.parameters())
    torch.manual_seed(2)
    noisy = objective.draw(x)
    out = network(noisy.x_t, noisy.t, y, keep_hidden=(0,))
    error = (head(out.hidden[0], out.cond) - noisy.v).square().mean()
    expected = torch.autograd.grad(error, [*head.parameters()])
    for parameter, gradient in zip(head.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_statistics_of_a_frozen_network_stay(network: DiT):
    """Those of a batch normalization, also where the module around it trains."""
    network.x_embedder = torch.nn.Sequential(network.x_embedder, torch.nn.BatchNorm1d(16))
    objective, before = frozen(network), copy.deepcopy(network.state_dict())
    torch.nn.ModuleList([network, objective]).train()
    objective(network, torch.randn(8, 3, 8, 8), torch.arange(8) % 6, Step(1), Log())
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_published_weights_get_a_head(tmp_path: Path):
    """As `published_sit` reads them: the head's velocity at its block, and guidance by it."""
    sizes = dict(input_size=8, in_channels=3, hidden_size=32, depth=3, num_heads=4, num_classes=5)
    torch.save(perturbed(DiT(**sizes)).state_dict(), tmp_path / "sit.pt")
    network = published_sit(str(tmp_path / "sit.pt"), num_heads=4)
    objective, guidance = frozen(network), Autoguidance(2.0)
    perturbed(objective.segments[0].weak.head)
    guidance.bind(network, objective)
    x_t, y = torch.randn(4, 3, 8, 8), torch.arange(4)
    with torch.no_grad():
        out = network(x_t, torch.full((4,), 0.4), y, keep_hidden=(0,))
        weak = objective.segments[0].weak.head(out.hidden[0], out.cond)
        found = guidance.field(network, y, [])(x_t, 0.4, 0.4)
    torch.testing.assert_close(found, 2 * out.velocity - weak)


@pytest.mark.parametrize("name", ["LayerSkip", "NullClass", "CoTrained"])
def test_only_what_the_loss_trains(name: str):
    source = getattr(sources, name)()
    with pytest.raises(ValueError, match=f"weak={name}: must be a source that the loss trains"):
        FrozenHeadObjective(LINEAR, Uniform(), source)


@pytest.mark.slow
def test_from_the_network_to_guided_images(command: Callable[..., Path], tmp_path: Path):
    """On images of its own; stopped and resumed bitwise; no weight of it changes, and images do."""
    base = command("fit", "-c", "configs/weak/none.yaml", folder="base")
    file = base / "checkpoints" / "last.ckpt"
    own = tmp_path / "own"
    main(["sample", f"--ckpt_path={base}", "--seeds=0:64", "--format=shards", f"--output={own}"])
    fit = [*SSG, f"--model.network.init_args.path={file}", f"--data.train_urls={own}/*.tar"]
    fit += ["--data.dataset=digits", "--trainer.val_check_interval=6"]
    whole = command("fit", *fit, folder="whole")
    command("fit", *fit, "--trainer.max_steps=4", folder="part")
    part = command("fit", *fit, "--ckpt_path=last", folder="part")
    assert_same(checkpoint(whole), checkpoint(part))

    before, after = checkpoint(base)["state_dict"], checkpoint(whole)["state_dict"]
    for name, value in before.items():
        if name.startswith("ema.module."):
            assert torch.equal(after[name], value), name
            assert torch.equal(after[name.replace("ema.module.", "network.")], value), name
    head = "objective.segments.0.weak.head.linear.bias"
    assert after[head].abs().min() > 0
    assert not torch.equal(after[head], checkpoint(whole, "step-000003")["state_dict"][head])

    module = DiffusionModule.load_from_checkpoint(whole / "checkpoints/last.ckpt")
    guided, plain = (
        generate(
            setting._replace(guidance=guidance),
            module.sampler,
            module.autoencoder,
            [1, 2, 3],
            [3, 1, 4],
            shape=module.input_shape,
            block=3,
            device=module.device,
        ).int()
        for setting in module.settings
        for guidance in (setting.guidance, Autoguidance(1.0))
    )
    assert not torch.equal(guided, plain)
    scores = json.loads((whole / "scores.json").read_text())
    assert {s["guidance"] for s in scores} == {"autoguidance(1.5, IntermediateHead, [0, 1])"}


@pytest.mark.slow
def test_the_head_is_trained_on_two_processes(command: Callable[..., Path]):
    """Their heads are one, and the network is that of the file."""
    file = command("fit", folder="base") / "checkpoints" / "last.ckpt"
    options = [*SSG, f"--model.network.init_args.path={file}", "--data.num_generated=8"]
    options += ["--trainer.devices=2", "--trainer.strategy=ddp_fork", "--trainer.max_steps=4"]
    folder = command("fit", *options, "--trainer.val_check_interval=4", folder="two")
    after = checkpoint(folder)["state_dict"]
    before = torch.load(file, weights_only=True)["state_dict"]
    assert torch.equal(
        after["network.blocks.0.attn.qkv.weight"], before["ema.module.blocks.0.attn.qkv.weight"]
    )
    assert after["objective.segments.0.weak.head.linear.bias"].abs().min() > 0
