"""One contract for all networks: trained, resumed, averaged, sampled, scored and exported."""

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT, perturbed
from own_networks import Bare, UNet
from safetensors.torch import load_file

from w2s_train import imports, weak
from w2s_train.checkpoint_file import read_file
from w2s_train.cli import main
from w2s_train.errors import UserError
from w2s_train.interpolant import LinearInterpolant
from w2s_train.log import Log
from w2s_train.models import WeightAverage, check_network, saved_network
from w2s_train.module import DiffusionModule
from w2s_train.objective import WeakToStrongObjective
from w2s_train.sampler import Euler
from w2s_train.segment import Extrapolation
from w2s_train.shards.decode import decode_image
from w2s_train.timesteps import Uniform
from w2s_train.weak import Step, WeakSource

PIXELS = {"in_channels": 1, "patch_size": 2, "sample_size": 8, "num_layers": 2}
HEADS = {"num_attention_heads": 2, "attention_head_dim": 8}
SD3 = {"out_channels": 1, "joint_attention_dim": 16, "caption_projection_dim": 16}
SD3 |= {"pooled_projection_dim": 16, "pos_embed_max_size": 8}
DIT = {"num_embeds_ada_norm": 10, "norm_eps": 1e-6}
NETWORKS = {
    "UNet": ("own_networks.UNet", {"width": 8}),
    "DiT": (
        "w2s_train.models.DiT",
        dict(input_size=8, in_channels=1, hidden_size=16, depth=2, num_heads=2, num_classes=10),
    ),
    "DiffusersDiT": ("w2s_train.models.adapters.DiffusersDiT", {"config": PIXELS | HEADS | DIT}),
    "LabelledSD3": (
        "w2s_train.models.adapters.LabelledSD3",
        {"num_classes": 10, "config": PIXELS | HEADS | SD3},
    ),
}
SEGMENTS = [
    ("Snapshot", {"step": 1, "weights": "raw"}, (0.0, 0.3)),
    ("NullClass", {}, (0.3, 0.6)),
    ("EMA", {"decay": 0.5}, (0.6, 1.0)),
]


def segments(*sources: tuple[str, dict, tuple[float, float]]) -> list[dict]:
    return [
        {
            "class_path": "w2s_train.segment.Extrapolation",
            "init_args": {
                "low": low,
                "high": high,
                "scale": 0.3,
                "weak": {"class_path": f"w2s_train.weak.{name}", "init_args": arguments},
            },
        }
        for name, arguments, (low, high) in sources
    ]


def config(path: Path, network: str, *sources: tuple) -> str:
    class_path, init_args = NETWORKS[network]
    made = {"class_path": class_path, "init_args": init_args}
    objective = {"init_args": {"segments": segments(*sources)}}
    text = yaml.safe_dump({"model": {"network": made, "objective": objective}})
    path.write_text(text)
    return str(path)


def fit(folder: Path, own: str, *options: str, steps: int = 6) -> dict:
    """Fit, and give what the last checkpoint holds."""
    files = ["configs/digits_w2s.yaml", "tests/tiny.yaml", own]
    main(
        ["fit", *(f"--config={ROOT / file}" for file in files), "--allow_imports=own_networks"]
        + [f"--trainer.default_root_dir={folder}", f"--trainer.max_steps={steps}", *options]
    )
    return read_file(folder / "checkpoints" / f"step-{steps:06d}.ckpt")


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_contract(name: str, digits: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    own = config(tmp_path / "own.yaml", name, *SEGMENTS)
    whole = fit(tmp_path / "whole", own)

    # Resumed, bit for bit, with the weights of every part and the same scores.
    fit(tmp_path / "parts", own, steps=3)
    parts = fit(tmp_path / "parts", own, "--ckpt_path=last")
    state = whole["state_dict"]
    assert state.keys() == parts["state_dict"].keys()
    for key, value in state.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, parts["state_dict"][key]), key
    scores = [
        json.loads((tmp_path / run / "scores.json").read_text()) for run in ("whole", "parts")
    ]
    assert [[each["value"] for each in run] for run in scores][0] == [
        each["value"] for each in scores[1]
    ]
    assert [each["step"] for each in scores[0]] == [3, 6]

    # Averaged: neither the first weights nor the last.
    ckpt = str(tmp_path / "whole" / "checkpoints" / "step-000006.ckpt")
    allowed = {"allow_imports": ["own_networks"]}
    raw, ema = (saved_network(ckpt, weights, **allowed) for weights in ("raw", "ema"))
    x, t, y = torch.randn(4, 1, 8, 8), torch.rand(4), torch.tensor([0, 3, 9, 10])
    raw.eval(), ema.eval()
    assert (raw(x, t, y).velocity - ema(x, t, y).velocity).abs().max() > 1e-5

    # Exported and read again: the same velocities.
    main(
        ["export", f"--ckpt_path={ckpt}", f"--output={tmp_path / 'exported'}"]
        + ["--allow_imports", "own_networks"]
    )
    about = json.loads((tmp_path / "exported" / "config.json").read_text())
    assert about["class_path"].endswith(f".{name}")
    again = type(ema)(**about["network"]).eval()
    again.load_state_dict(load_file(tmp_path / "exported" / "model.safetensors"))
    assert torch.equal(again(x, t, y).velocity, ema(x, t, y).velocity)

    # Sampled by the command: the images of the module that its checkpoint describes.
    images = tmp_path / "images"
    files = [ROOT / "configs/digits_w2s.yaml", ROOT / "tests/tiny.yaml", own]
    main(
        ["sample", *(f"--config={file}" for file in files), "--allow_imports=own_networks"]
        + [f"--ckpt_path={ckpt}", f"--output={images}", "--seeds=0:4"]
    )
    module = DiffusionModule.load_from_checkpoint(ckpt, allow_imports=["own_networks"]).eval()
    expected = module.generate([0, 1, 2, 3], [0, 1, 2, 3])
    found = torch.stack([decode_image(file.read_bytes()) for file in sorted(images.glob("*.png"))])
    assert torch.equal(found, expected)


def objective(source: WeakSource) -> WeakToStrongObjective:
    return WeakToStrongObjective(
        LinearInterpolant(), Uniform(), [Extrapolation(0.0, 1.0, 0.5, source)]
    )


def test_the_target_of_any_network():
    """V + scale (strong - weak), by hand, for a network that offers nothing but the least."""
    network, source = Bare().eval(), weak.NullClass()
    ours = objective(source)
    ours.bind(check_network(network), 0.1)
    x, y = torch.randn(6, 1, 8, 8), torch.tensor([0, 1, 2, 3, 10, 5])
    torch.manual_seed(1)
    loss = ours(network, x, y, Step(), Log())
    torch.manual_seed(1)
    noisy = ours.draw(x)
    strong = network(noisy.x_t, noisy.t, y).velocity
    without = network(noisy.x_t, noisy.t, torch.full_like(y, 10)).velocity
    rows = torch.tensor([0, 1, 2, 3, 5])  # only the labelled ones
    target = noisy.v.clone()
    target[rows] += 0.5 * (strong - without)[rows].detach()
    torch.testing.assert_close(loss, (strong - target).square().flatten(1).mean(1))
    loss.mean().backward()
    assert network.net.leave.weight.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (lambda: weak.IntermediateHead(), "must have depth, make_head, forward(keep_hidden=) for"),
        (lambda: weak.LayerSkip(), "must have depth, forward(keep_hidden=), forward(skip_blocks=)"),
        (lambda: weak.RandomBlocks(), "must have depth, forward(keep_hidden=), forward(skip_bloc"),
        (lambda: weak.ShuffledTokens(), "must have depth, forward(keep_hidden=), forward(resume="),
        (lambda: weak.DroppedTokens(), "must have depth, forward(keep_hidden=), forward(skip_blo"),
        (lambda: weak.CoTrained(), "must have hidden_size, num_heads for CoTrained that is given"),
        (lambda: weak.Checkpoint(network=torch.nn.Linear(1, 1)), "Linear: must have null_class"),
        (lambda: weak.Checkpoint(network=UNet(num_classes=3)), "num_classes 3, must have 10"),
    ],
)
def test_what_a_network_does_not_offer(source, message: str):
    with pytest.raises(UserError) as error:
        objective(source()).bind(UNet(), 0.1)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_network_that_says_too_little():
    for network, message in (
        (lambda x: x, "must be a torch.nn.Module"),
        (torch.nn.Linear(1, 1), "must have null_class, an int"),
    ):
        with pytest.raises(UserError, match=message):
            check_network(network)
    odd = UNet()
    odd.arguments = {"width": torch.zeros(1)}
    with pytest.raises(UserError, match="arguments must be plain values"):
        check_network(odd)
    ours = objective(weak.EMA())
    ours.bind(Bare(), 0.1)
    wrong = Bare()
    wrong.forward = lambda x_t, t, y: x_t
    with pytest.raises(UserError, match=r"with velocity \(2, 1, 8, 8\), not Tensor"):
        ours(wrong, torch.randn(2, 1, 8, 8), torch.arange(2), Step(), Log())


def test_without_a_shape_nothing_is_sampled():
    module = DiffusionModule(Bare(), objective(weak.NullClass()), Euler(2))
    with pytest.raises(UserError, match="network=Bare: must have shape for sampling"):
        module.generate([0], [1])


def test_averages_follow_what_is_saved_beside_parameters():
    """Statistics of a batch normalization are copied, parameters are averaged."""
    network = UNet()
    average = WeightAverage(network, 0.5)
    before = copy.deepcopy(average.module.state_dict())
    perturbed(network)
    network.train()(torch.randn(4, 1, 8, 8), torch.rand(4), torch.arange(4))
    average.update(network)
    for name, value in average.module.state_dict().items():
        expected = network.state_dict()[name]
        if name in dict(network.named_parameters()):
            expected = (before[name] + expected) / 2
        torch.testing.assert_close(value, expected)
    assert network.norm.running_mean.abs().max() > 0


def test_a_checkpoint_names_no_class_that_is_not_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    made = {"class_path": "os.path.join", "init_args": {}}
    for path, message in (
        ("os.path.join", "may not be imported"),
        ("w2s_train.models.no", "class"),
    ):
        torch.save({"state_dict": {}, "network": made | {"class_path": path}}, tmp_path / "x.ckpt")
        with pytest.raises(UserError, match=message):
            saved_network(str(tmp_path / "x.ckpt"))
    path = str(tmp_path / "own.ckpt")
    state = {f"ema.module.{name}": value for name, value in UNet().state_dict().items()}
    own = {"class_path": "own_networks.UNet", "init_args": {"width": 8}}
    torch.save({"state_dict": state, "network": own, "hyper_parameters": {}}, path)
    export = ["export", f"--ckpt_path={path}", f"--output={tmp_path / 'out'}"]
    with pytest.raises(SystemExit, match="--allow_imports=own_networks allows it"):
        main(export)
    with pytest.raises(SystemExit, match="allow_imports=5: must name packages"):
        main([*export, "--allow_imports=5"])
    main([*export, "--allow_imports=own_networks"])
    written = load_file(tmp_path / "out" / "model.safetensors")
    monkeypatch.setattr(imports, "trusted", [])
    for name, value in saved_network(path, allow_imports=["own_networks"]).state_dict().items():
        assert torch.equal(value, written[name])
    with pytest.raises(UserError, match="in Python, allow_imports"):
        saved_network(path)  # that call was for itself
    torch.save({"state_dict": {}, "network": None}, tmp_path / "x.ckpt")
    with pytest.raises(UserError, match="its network has no arguments to build it by"):
        saved_network(str(tmp_path / "x.ckpt"))


@pytest.mark.slow
def test_the_network_of_the_page(digits: None, tmp_path: Path):
    """docs/networks.md as a user follows it; with a head, which the UNet has not, one line."""
    text = (ROOT / "docs" / "networks.md").read_text()
    code, overlay = (re.search(rf"```{x}\n# mine/.*?```", text, re.S) for x in ("python", "yaml"))
    assert code is not None and overlay is not None
    (tmp_path / "mine").mkdir()
    for name, block in (("my.py", code), ("unet.yaml", overlay)):
        (tmp_path / "mine" / name).write_text("\n".join(block[0].splitlines()[1:-1]))
    (line,) = re.findall(r"PYTHONPATH=mine (lightning fit .*)", text)
    words = [w.replace("mine/", f"{tmp_path}/mine/") for w in line.split()[1:]]
    run = ["--trainer.default_root_dir", str(tmp_path / "run")]
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}/mine:{ROOT}"}
    for overlay_name, status in (("early_checkpoint", 0), ("head_above", 1)):
        options = [w.replace("early_checkpoint", overlay_name) for w in words]
        tiny = ["-c", "tests/tiny.yaml"]
        command = [sys.executable, "-m", "w2s_train", *options[:3], *tiny, *options[3:], *run]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == status, done.stderr
    refused = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(refused) == 1
    assert "network=UNet: must have depth, make_head, forward(keep_hidden=) for" in refused[0]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "source",
    [
        lambda: weak.EMA(decay=0.5, lag=1),
        lambda: weak.Snapshot(step=1),
        lambda: weak.Checkpoint(network=UNet()),
    ],
)
def test_frozen_copies_stay_as_they_are(source):
    """Statistics of theirs do not move, whatever mode the module around them is in."""
    ours, network = objective(source()), UNet()
    ours.bind(network, 0.1)
    ours.train()
    frozen = [part for part in ours.modules() if isinstance(part, UNet)]
    before = copy.deepcopy([part.state_dict() for part in frozen])
    with torch.no_grad():
        for part in frozen:
            part(torch.randn(4, 1, 8, 8), torch.rand(4), torch.arange(4))
    assert not any(part.training for each in frozen for part in each.modules())
    for part, state in zip(frozen, before, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in part.state_dict().items())
    assert copy.deepcopy(ours).train().training
