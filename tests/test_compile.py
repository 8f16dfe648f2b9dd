"""A compiled step is the eager one, without graph breaks, recompilations or waiting hosts."""

from functools import partialmethod
from typing import Any

import pytest
import torch
from recipes import every_source
from test_module import fit, module
from torch import nn
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from w2s_train import weak
from w2s_train.inbuilt import UniformScale
from w2s_train.models import DiT
from w2s_train.module import DiffusionModule
from w2s_train.segment import Consistency, Extrapolation, Segment

# What hands a value of the device to the host, or has a shape that depends on one.
WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique", "item")


def recipe(name: str) -> list[Segment]:
    """Segments with every kind of weak source between them."""
    recipes: dict[str, Any] = {
        "sgg_paper": lambda: [
            Extrapolation(0.0, 0.2, 0.6, weak.IntermediateHead()),
            Extrapolation(0.2, 1.0, 0.6, weak.NullClass()),
        ],
        "sgg_release": lambda: [
            Consistency(0.0, 0.2, weak.IntermediateHead()),
            Extrapolation(0.2, 0.8, 0.6, weak.NullClass()),
        ],
        "layer_skip": lambda: [Extrapolation(0.0, 1.0, 0.3, weak.LayerSkip([1]))],
        "ema": lambda: [Extrapolation(0.0, 1.0, 0.3, weak.EMA(0.9), from_average=True)],
        "drawn": lambda: [
            Extrapolation(0.0, 1.0, UniformScale(plain=0.4), weak.IntermediateHead(), name="head"),
            Extrapolation(0.0, 1.0, UniformScale(plain=0.4), weak.NullClass(), name="class"),
            Extrapolation(0.0, 0.7, UniformScale(plain=0.4), weak.LayerSkip(), name="skip"),
        ],
        "separate": lambda: [Extrapolation(0.0, 1.0, 0.3, weak.CoTrained(every=2))],
        "dropped_tokens": lambda: [
            Extrapolation(0.0, 0.4, 0.3, weak.DroppedTokens()),
            Extrapolation(0.4, 0.7, 0.3, weak.ShuffledTokens()),
            Extrapolation(0.7, 1.0, 0.3, weak.RandomLabel()),
        ],
    }
    return recipes[name]()


RECIPES = ["drawn", "sgg_paper", "sgg_release", "layer_skip", "ema", "separate", "dropped_tokens"]


class Waits(TorchDispatchMode):
    """Counts what the host would wait for on an accelerator, in the steps after the first few."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        boolean = name == "index" and any(
            x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1]
        )
        if name in WAITS or boolean:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def late(monkeypatch):
    """As on an accelerator, where the host learns of bad steps later."""
    monkeypatch.setattr("w2s_train.running.guard.waits_cost", lambda trainer: True)


def waits(command, monkeypatch, *options: str) -> list[str]:
    """What the host waits for, from the batch to the weights behind it, in a run of six steps."""
    found, real = Waits(), DiffusionModule.optimizer_step

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        with found:
            real(self, *args, **kwargs)

    monkeypatch.setattr(DiffusionModule, "optimizer_step", optimizer_step)
    options += ("--trainer.log_every_n_steps=1000", "--trainer.val_check_interval=1000")
    command("fit", *options, "--trainer.gradient_clip_val=1.0")
    return found.found


@pytest.mark.slow
def test_the_host_waits_for_nothing_in_a_step(command, fits, monkeypatch, late):
    """With every weak source."""
    sources = every_source(fits() / "checkpoints" / "last.ckpt")
    assert waits(command, monkeypatch, sources) == []
    drawn = every_source(fits() / "checkpoints" / "last.ckpt", drawn=True)
    assert waits(command, monkeypatch, drawn) == []
    with (counting := Waits()):
        torch.ones(2).sum().item()
    assert counting.found == ["_local_scalar_dense"]  # it does count


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_the_host_waits_for_nothing_in_a_recipe(command, monkeypatch, late, name: str):
    assert waits(command, monkeypatch, "-c", f"configs/weak/{name}.yaml") == []


def compiled_by(monkeypatch, backend: str) -> None:
    monkeypatch.setattr(DiT, "compile", partialmethod(nn.Module.compile, backend=backend))


TODAY = dict(rope=True, swiglu=True, rmsnorm=True, qk_norm=True, class_tokens=2, data_on="linear")
LATER = ("sgg_release", "layer_skip", "separate", "dropped_tokens")
WITH_TODAY = [
    pytest.param(name, {}, marks=pytest.mark.long if name in LATER else [], id=name)
    for name in RECIPES
]
WITH_TODAY += [
    pytest.param(name, TODAY, marks=[] if name == "drawn" else pytest.mark.long, id=f"{name}-today")
    for name in RECIPES
]


@pytest.mark.slow
@pytest.mark.parametrize("name, switches", WITH_TODAY)
def test_no_graph_breaks_and_no_recompilations(monkeypatch, name: str, switches: dict):
    """Strong, weak and averaged passes are one graph each, made in the first few steps."""
    torch._dynamo.reset()
    counters.clear()
    compiled_by(monkeypatch, "aot_eager")
    model, frames = module(*recipe(name), switches=switches, compile=True), list[int]()
    real = model.optimizer_step

    def optimizer_step(*args: Any, **kwargs: Any) -> None:
        real(*args, **kwargs)
        frames.append(counters["frames"]["total"])

    model.optimizer_step = optimizer_step  # type: ignore[method-assign]
    fit(model, steps=24)
    assert len(frames) == 24 and frames[0] >= 1
    assert frames[4] == frames[-1], frames
    assert not counters["graph_break"]
    assert counters["frames"]["ok"] == counters["frames"]["total"]


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("switches", [{}, TODAY], ids=["plain", "today"])
def test_compiled_and_eager_steps_agree(monkeypatch, switches: dict):
    """Losses of three steps agree to 1e-4, with the compiler that users get; names are the same."""
    losses, names = [], []
    for compile in (False, "blocks", True) if switches else (False, True):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = module(*recipe("sgg_paper"), switches=switches, compile=compile)
        found = list[torch.Tensor]()
        real = model.training_step

        def training_step(*args: Any, real: Any = real, found: Any = found) -> torch.Tensor:
            found.append(real(*args))
            return found[-1]

        model.training_step = training_step  # type: ignore[method-assign]
        torch.manual_seed(1)
        fit(model, steps=3)
        losses.append(torch.stack(found).detach())
        names.append(model.state_dict().keys())
    for other, found in zip(losses[1:], names[1:], strict=True):
        torch.testing.assert_close(losses[0], other, rtol=1e-4, atol=0)
        assert names[0] == found


@pytest.mark.slow
@pytest.mark.long
def test_compiled_blocks_compute_what_eager_ones_do_in_bf16():
    """By the real compiler, which made NaN of tokens that lay by channel (torch 2.15, CPU)."""
    torch.manual_seed(0)
    network = DiT(32, 4, 3, hidden_size=128, depth=2, num_heads=4, num_classes=20)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.05)
    x_t, t, y = torch.randn(16, 3, 32, 32), torch.rand(16), torch.arange(16)
    found = []
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            found.append(network(x_t, t, y).velocity.float())
        found[-1].square().mean().backward()
        for block in network.blocks:
            block.compile()
    eager, compiled = found
    assert compiled.std() > 0.1
    torch.testing.assert_close(compiled, eager, rtol=0.05, atol=0.05)
    grads = [p.grad for p in network.blocks.parameters() if p.grad is not None]
    assert len(grads) > 10 and all(grad.isfinite().all() for grad in grads)
