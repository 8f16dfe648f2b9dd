"""Muon for matrices and AdamW for the rest: torch's own, and nothing moves at a bad step."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from faulty import bad_loss
from test_compile import waits
from test_module import fit, module
from test_resume import assert_same, checkpoint, equal
from torch import nn

from w2s_train import weak
from w2s_train.errors import UserError
from w2s_train.loading import optimizer_over
from w2s_train.models import DiT
from w2s_train.muon import MuonWithAdamW, orthogonal
from w2s_train.segment import Extrapolation

SHAPES = {"a": (8, 16), "b": (8, 16), "tall": (24, 8), "x_embed": (8, 4), "bias": (8,)}
OVERLAY = ["-c", "configs/optimizer/muon.yaml", "--trainer.val_check_interval=1000"]


def parameters() -> dict[str, nn.Parameter]:
    torch.manual_seed(0)
    return {name: nn.Parameter(torch.randn(shape)) for name, shape in SHAPES.items()}


def backward(named: dict[str, nn.Parameter], seed: int) -> None:
    torch.manual_seed(seed)
    for parameter in named.values():
        parameter.grad = torch.randn_like(parameter)


def test_it_is_torchs_muon_and_adamw():
    """A step moves a matrix by up to 2e-2; torch's is in bfloat16 on the CPU, too."""
    ours, theirs = parameters(), parameters()
    together = MuonWithAdamW(ours.items(), lr=0.01, matrix_scale=2.0, weight_decay=0.1)
    matrices = [theirs[name] for name in ("a", "b", "tall")]
    muon = torch.optim.Muon(matrices, 0.02, 0.1, adjust_lr_fn="match_rms_adamw")
    rest = [theirs["x_embed"], theirs["bias"]]
    adamw = torch.optim.AdamW(rest, 0.01, (0.9, 0.95), weight_decay=0.0, fused=True)
    for seed in range(5):
        for named, optimizers in ((ours, [together]), (theirs, [muon, adamw])):
            backward(named, seed)
            for optimizer in optimizers:
                optimizer.step()
    for name in SHAPES:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-3)  # bfloat16
    assert torch.equal(ours["bias"], theirs["bias"])


def test_it_makes_singular_values_alike():
    torch.manual_seed(0)
    made = orthogonal(torch.randn(3, 20, 8) * torch.logspace(-2, 0, 8), 8).float()
    values = torch.linalg.svdvals(made)
    assert values.min() > 0.6 and values.max() < 1.3


@pytest.mark.parametrize("fill", [math.nan, math.inf, 1e30])
def test_a_bad_step_moves_nothing(fill: float):
    """Neither weights nor moments nor counters, and what follows is as without it."""
    runs = []
    for bad in (False, True):
        named = parameters()
        optimizer = MuonWithAdamW(named.items(), lr=0.01, weight_decay=0.1)
        for step in (0, 1, "bad", 2) if bad else (0, 1, 2):
            backward(named, 9 if step == "bad" else int(step))
            if step == "bad":
                for parameter in named.values():
                    parameter.grad.fill_(fill)  # type: ignore[union-attr]
            optimizer.found_inf = torch.tensor(float(step == "bad"))
            optimizer.step()
        runs.append([named, optimizer.state_dict()["state"]])
    assert equal(*runs)


def test_where_parameters_go():
    """Embeddings, first and last layers, vectors, and heads of sources to AdamW."""
    model = module(Extrapolation(0.0, 1.0, 0.3, weak.IntermediateHead()))
    model.optimizer = MuonWithAdamW
    optimizer = optimizer_over(model)
    names = {id(p): name for name, p in model.named_parameters()}
    found = [names[id(p)].removeprefix("network.blocks.0.") for p in optimizer.matrices]
    within = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1"]
    assert found[:5] == [f"{name}.weight" for name in within] and len(found) == 10
    model.optimizer = partial(MuonWithAdamW, adamw=[])
    every = optimizer_over(model).matrices
    assert {p.ndim for p in every} == {2} and len(every) > 14


SD3 = ("sequence.weight", "pooled.weight", "transformer.norm_out.linear.weight")


def test_tables_of_networks_are_no_matrices():
    """Of classes and of class tokens; and a pattern of the user's must fit something."""
    sizes = dict(input_size=8, in_channels=1, hidden_size=16, depth=2, num_heads=2, num_classes=3)
    network = DiT(**sizes, class_tokens=3, scales=["head"], rope=True, swiglu=True)
    named = dict(network.named_parameters())
    named |= {f"sd3.{name}": nn.Parameter(torch.zeros(4, 4)) for name in SD3}
    moved = MuonWithAdamW(named.items()).matrices
    names = {name for name, p in named.items() if any(p is each for each in moved)}
    tables = {"context.tokens", "y_embedder.embedding_table.weight", *(f"sd3.{n}" for n in SD3)}
    assert not names & tables and all(name.startswith("blocks.") for name in names)
    assert len(names) == 2 * 5
    with pytest.raises(UserError, match="^adamw=mine.*: must fit the name of a parameter"):
        MuonWithAdamW(named.items(), adamw=["*embed*", "mine*"])
    without = MuonWithAdamW(named.items(), adamw=["*qkv*"]).matrices
    found = {name for name, p in named.items() if any(p is each for each in without)}
    assert tables < found and not [name for name in found if "qkv" in name]


def test_what_is_refused():
    with pytest.raises(UserError, match="params=.* pairs of a name and a parameter"):
        MuonWithAdamW([nn.Parameter(torch.zeros(2, 2))])
    for bad in (dict(lr=-1.0), dict(momentum=1.0), dict(newton_schulz=0)):
        with pytest.raises(UserError, match=f"{next(iter(bad))}="):
            MuonWithAdamW(parameters().items(), **bad)  # type: ignore[arg-type]


@pytest.mark.slow
def test_it_learns():
    model = module(optimizer=partial(MuonWithAdamW, lr=3e-3))
    losses, real = list[float](), model.training_step
    model.training_step = lambda *args: losses.append((x := real(*args)).item()) or x  # type: ignore
    fit(model, steps=60, gradient_clip_val=1.0)
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])


def test_other_optimizers_get_what_they_got():
    """Parameters without names, which would stand in checkpoints."""
    model = module()
    assert "param_names" not in optimizer_over(model).state_dict()["param_groups"][0]


@pytest.mark.slow
@pytest.mark.parametrize("devices", [pytest.param(1, marks=pytest.mark.long), 2])
def test_a_run_goes_on_bit_for_bit(command, devices: int):
    options = [*OVERLAY, f"--trainer.devices={devices}", "--trainer.gradient_clip_val=1.0"]
    options += ["--trainer.strategy=ddp_fork"] * (devices > 1)
    options += ["--model.scheduler=torch.optim.lr_scheduler.CosineAnnealingLR"]
    options += ["--model.scheduler.T_max=8"]
    whole = command("fit", *options, "--trainer.max_steps=8", folder="whole")
    first = command("fit", *options, "--trainer.max_steps=5", folder="first")
    start = f"--ckpt_path={first}/checkpoints/last.ckpt"
    part = command("fit", *options, "--trainer.max_steps=8", start, folder="part")
    assert_same(checkpoint(whole), checkpoint(part))


@pytest.mark.slow
def test_settings_apply_where_a_run_goes_on(command, caplog):
    folder = command("fit", *OVERLAY, "--trainer.max_steps=3")
    values = dict(matrix_scale=0.5, weight_decay=0.01, lr=1e-4)
    options = [f"--model.optimizer.init_args.{name}={value}" for name, value in values.items()]
    command("fit", *OVERLAY, "--ckpt_path=last", "--trainer.max_steps=5", *options)
    (group,) = checkpoint(folder)["optimizer_states"][0]["param_groups"]
    assert {name: group[name] for name in values} == values
    with pytest.raises(SystemExit, match="adamw=.*: must be "):
        other = "--model.optimizer.init_args.adamw=['*embed*']"
        command("fit", *OVERLAY, "--ckpt_path=last", "--trainer.max_steps=6", other)


@pytest.mark.slow
@pytest.mark.long
def test_no_host_waits(command, monkeypatch):
    """And a host that learns late of bad steps changes no digit."""
    bad_loss(dict.fromkeys((2, 5), math.nan), patch=monkeypatch.setattr)
    at_once = command("fit", *OVERLAY, "--trainer.max_steps=6", folder="at_once")
    monkeypatch.setattr("w2s_train.running.guard.waits_cost", lambda trainer: True)
    late = command("fit", *OVERLAY, "--trainer.max_steps=6", folder="late")
    assert_same(checkpoint(at_once), checkpoint(late))
    assert waits(command, monkeypatch, *OVERLAY, "--trainer.max_steps=6") == []


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_precisions(precision: str):
    model: Any = module(optimizer=partial(MuonWithAdamW, lr=3e-3))
    options: dict[str, Any] = {"precision": precision}
    if precision == "16-mixed":
        from lightning.pytorch.plugins import MixedPrecision

        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        options = {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)]}
    before = {name: p.clone() for name, p in model.named_parameters()}
    fit(model, steps=3, gradient_clip_val=1.0, **options)
    for name, parameter in model.named_parameters():
        moved = (parameter.float() - before[name]).abs().max().item()
        assert math.isfinite(moved), name
    assert (
        model.network.blocks[0].mlp.fc1.weight.ne(before["network.blocks.0.mlp.fc1.weight"]).any()
    )
