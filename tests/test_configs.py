"""Every committed config parses and instantiates, and takes steps."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, perturbed, quick, sources
from lightning.pytorch.cli import LightningCLI
from recipes import OVERLAYS
from refusals import parsers_built_once
from shard_files import npy

from w2s_train.command.run import Command, compose
from w2s_train.datamodule import ShardDataModule
from w2s_train.loading import instantiate as load
from w2s_train.models import DiT
from w2s_train.module import DiffusionModule
from w2s_train.segment import Extrapolation
from w2s_train.shards import ShardWriter

CONFIGS = sorted(path.name for path in (ROOT / "configs").glob("*.yaml"))
THIN = "--model.network.init_args.hidden_size=48"  # DiT-B/2 with thin blocks


def write_latents(folder: Path, shards: int = 4, rows: int = 4) -> str:
    """Shards of random posterior moments, as `ImageNet` latents come."""
    rng = np.random.default_rng(0)
    for shard in range(shards):
        with ShardWriter(folder / f"train-{shard:06d}.tar") as writer:
            for row in range(rows):
                moments = npy(rng.normal(size=(8, 32, 32)).astype(np.float16))
                writer.write(f"{shard}{row:05d}", rng.integers(1000), npy=moments)
    return str(folder / "train-*.tar")


def instantiate(files: list[str], urls: str, *options: str) -> LightningCLI:
    arguments = [option for file in files for option in ("-c", str(ROOT / "configs" / file))]
    with parsers_built_once():
        return compose(["fit", *arguments, "--data.train_urls", urls, *options], run=False)


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_latents(tmp_path_factory.mktemp("latents"))


@pytest.mark.parametrize("config", quick(CONFIGS, "digits_w2s.yaml", "dit_b_w2s.yaml"))
def test_configs_instantiate(config: str, latents: str):
    more = {"images_w2s.yaml": ["--data.num_classes=1000"]}
    more |= dict.fromkeys(("dit_b_w2s.yaml", "dit_b_sgg_paper_repa.yaml"), [THIN])
    command = instantiate([config], latents, *more.get(config, []))
    assert isinstance(command, Command)
    assert isinstance(command.model, DiffusionModule)
    assert isinstance(command.datamodule, ShardDataModule)


DATA = sorted(path.stem for path in (ROOT / "configs" / "data").glob("*.yaml"))


@pytest.mark.parametrize("name", DATA)
def test_data_configs_instantiate(name: str, latents: str):
    stated = yaml.safe_load((ROOT / "configs" / "data" / f"{name}.yaml").read_text())
    urls = {} if "prepare" in stated else {"train_urls": latents}
    if stated["num_classes"] is None:  # those of an index, which latents here have not
        urls["num_classes"] = 1000
    data = load(ShardDataModule, stated | urls)
    assert (data.batch_size, data.flip) == (stated["batch_size"], stated.get("flip", False))


@pytest.mark.slow
def test_data_by_one_option(latents: str):
    """As the README has it."""
    option = ["--data", str(ROOT / "configs" / "data" / "mnist.yaml")]
    assert instantiate(["digits_w2s.yaml"], latents, *option).datamodule.batch_size == 128


# Of each kind one; the others are slow.
VARIED = ("none", "branch", "mg_release", "sgg_checkpoint", "random_blocks", "dropped_tokens")
VARIED += ("raev2_head", "meanflow_target")


@pytest.mark.parametrize(
    "config", ["digits_w2s", pytest.param("dit_b_w2s", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("overlay", quick(OVERLAYS, *VARIED))
def test_overlays_instantiate(config: str, overlay: str, latents: str):
    thin = [THIN] if config == "dit_b_w2s" else []
    command = instantiate([f"{config}.yaml", f"weak/{overlay}.yaml"], latents, *thin)
    stated = yaml.safe_load((ROOT / "configs" / "weak" / f"{overlay}.yaml").read_text())
    expected = stated["model"]["objective"]["init_args"]["segments"] or []
    objective = command.model.objective
    built = [*objective.segments, *objective.lookers]
    assert [type(s).__name__ for s in built] == [s["class_path"].split(".")[-1] for s in expected]
    ranges = [(s["init_args"]["low"], s["init_args"]["high"]) for s in expected]
    assert [(s.low, s.high) for s in built] == ranges


@pytest.mark.parametrize("overlay", ["mg", "gft", "meanflow_target"])
def test_three_ways_to_one_fixed_point(overlay: str):
    """S <- target(s) ends at guidance by 2; that of GFT is its loss, but for beta^2."""
    stated = yaml.safe_load((ROOT / "configs" / "weak" / f"{overlay}.yaml").read_text())
    (given,) = stated["model"]["objective"]["init_args"]["segments"]
    arguments = given["init_args"] | {"weak": sources.NullClass()}
    segment = Extrapolation(**arguments)
    omega, kappa = segment.omega, segment.scale
    v, null, s = 0.7, -0.4, 0.0
    for _ in range(200):
        s = omega * v + kappa * s + (1 - omega - kappa) * null
    assert s == pytest.approx(null + 2 * (v - null))
    assert segment.effective_scale() == pytest.approx(2)
    if overlay == "gft":
        beta = 1 / omega
        ours = 0.3 - (omega * v + (1 - omega) * null)  # strong - target, for a strong of 0.3
        assert beta * ours == pytest.approx(beta * 0.3 + (1 - beta) * null - v)


# Millions of parameters that the papers state for patch size 2 (DiT, table 1, and SiT).
PUBLISHED = {"s": 33, "b": 130, "l": 458, "xl": 675}


@pytest.mark.parametrize("patch_size", [2, 4, 8])
@pytest.mark.parametrize("size", PUBLISHED)
def test_network_sizes(size: str, patch_size: int):
    """Each size has the published number of parameters; patches hardly change it."""
    path = ROOT / "configs" / "network" / f"dit_{size}_{patch_size}.yaml"
    reference = yaml.safe_load((ROOT / "configs" / "dit_b_w2s.yaml").read_text())
    arguments = reference["model"]["network"]["init_args"]
    stated = yaml.safe_load(path.read_text())["model"]["network"]["init_args"]
    assert stated["patch_size"] == patch_size
    with torch.device("meta"):
        network = DiT(**(arguments | stated))
    millions = sum(p.numel() for p in network.parameters()) / 1e6
    assert millions == pytest.approx(PUBLISHED[size], rel=0.015)


@pytest.mark.parametrize("patch_size", [1, 2])
@pytest.mark.parametrize("size", ["b", "l", "xl"])
def test_lightningdit_sizes(size: str, patch_size: int):
    """Of a published size, less a few per cent: as many parameters in MLPs, weights of norms."""
    path = ROOT / "configs" / "network" / f"lightningdit_{size}_{patch_size}.yaml"
    stated = yaml.safe_load(path.read_text())["model"]["network"]["init_args"]
    assert stated.pop("patch_size") == patch_size
    plain = yaml.safe_load((ROOT / "configs" / "network" / f"dit_{size}_2.yaml").read_text())
    with torch.device("meta"):
        network = DiT(**stated, patch_size=patch_size, in_channels=32, input_size=16)
    sizes = plain["model"]["network"]["init_args"]
    assert {name: stated[name] for name in sizes if name != "patch_size"}.items() <= sizes.items()
    assert all(network.arguments[name] for name in ("rope", "swiglu", "rmsnorm"))
    millions = sum(p.numel() for p in network.parameters()) / 1e6
    assert millions == pytest.approx(PUBLISHED[size], rel=0.015)


def test_the_baseline_differs_in_its_segments_only():
    w2s, baseline = (
        yaml.safe_load((ROOT / "configs" / f"digits_{name}.yaml").read_text())
        for name in ("w2s", "baseline")
    )
    assert w2s["model"]["objective"]["init_args"].pop("segments")
    assert baseline["model"]["objective"]["init_args"].pop("segments") is None
    assert w2s == baseline


@pytest.mark.slow
@pytest.mark.parametrize("overlay", ["irepa", "repa"])
def test_alignment_stands_beside_segments(overlay: str, latents: str):
    files = ["digits_w2s.yaml", "weak/sgg_paper.yaml", f"align/{overlay}.yaml"]
    objective = instantiate(files, latents).model.objective
    assert [s.scale for s in objective.segments] == [0.6, 0.6]
    (term,) = objective.align.terms
    assert (term.kept, term.features, term.encoder.stored) == (3, 768, True)
    assert (term.weight, term.alpha) == ((0.5, None) if overlay == "repa" else (1.0, 0.6))
    shapes = {tuple(p.shape) for p in term.projector.parameters() if p.ndim > 1}
    mlp = {(2048, 64), (2048, 2048), (768, 2048)}
    assert shapes == (mlp if overlay == "repa" else {(768, 64, 3, 3)})


def test_the_papers_best_row_is_the_reference_run_with_repa():
    """dit_b_w2s.yaml, whose segments are those of sgg_paper.yaml, and align/repa.yaml."""
    whole, reference, repa = (
        yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text())
        for name in ("dit_b_sgg_paper_repa", "dit_b_w2s", "align/repa")
    )
    added = whole["model"]["objective"]["init_args"].pop("align")
    assert added == repa["model"]["objective"]["init_args"]["align"]
    assert whole == reference


@pytest.mark.parametrize("config", ["mnist", "cifar10"])
def test_the_small_examples_have_the_segments_that_the_studies_favour(config: str):
    own, stated = (
        yaml.safe_load((ROOT / "configs" / path).read_text())["model"]["objective"]["init_args"]
        for path in (f"{config}_w2s.yaml", "weak/sgg_reversed.yaml")
    )
    assert own["segments"] == stated["segments"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "overlay",
    [pytest.param(name, marks=pytest.mark.long) for name in OVERLAYS if name != "sgg_paper"]
    + ["sgg_paper"],
)
def test_dit_b_takes_steps_with_every_overlay(tmp_path: Path, latents: str, overlay: str):
    """The reference run with thin blocks: two optimisation steps."""
    options = ["--trainer.max_steps=2", "--trainer.devices=1", "--trainer.accelerator=cpu"]
    options += ["--data.global_batch_size=4", "--data.num_workers=0", "--model.compile=false"]
    options += [f"--trainer.default_root_dir={tmp_path}", "--trainer.callbacks=null"]
    options += ["--trainer.precision=32-true", "--model.objective.init_args.total_steps=2"]
    options += ["--model.network.init_args.hidden_size=96"]
    command = instantiate(["dit_b_w2s.yaml", f"weak/{overlay}.yaml"], latents, *options)
    network = command.model.network
    before = network.final_layer.linear.weight.clone()
    command.trainer.fit(command.model, command.datamodule)
    assert command.trainer.global_step == 2
    assert not torch.equal(network.final_layer.linear.weight, before)
    assert all(p.isfinite().all() for p in command.model.parameters())


GUIDANCE = sorted(path.stem for path in (ROOT / "configs" / "guidance").glob("*.yaml"))


@pytest.mark.slow
def test_validate_with_every_guidance(command):
    """Each overlay scores the same checkpoint, says what it did, and guides."""
    sources.LayerSkip()  # two of the overlays need it
    long = ["--trainer.max_steps=120", "--trainer.val_check_interval=120"]
    five = "--model.sampler.init_args.steps=5"  # with two, all steps lie in one segment
    long += ["--data.num_generated=40", five, "--model.ema_decay=0.9"]
    folder = command("fit", *long, "--model.optimizer.init_args.lr=0.01")
    last = folder / "checkpoints" / "last.ckpt"
    fit = ["-c", "configs/guidance/learned_fit.yaml", "--data.num_generated=16"]
    path = f"--model.network.init_args.path={last}"
    learned = command("fit", *fit, path, folder="learned")
    for name in GUIDANCE:
        if name == "learned_fit":
            command("validate", *fit, path, "--ckpt_path=last", folder="learned")
        if name.endswith("_fit"):
            continue  # ssg_fit: tests/test_frozen_head.py
        options = ["-c", f"configs/guidance/{name}.yaml", f"--ckpt_path={last}", *long[2:4]]
        if name == "learned":
            source = learned / "checkpoints" / "last.ckpt"
            options.append(f"--model.guidance.init_args.path={source}")
        elif name == "segmented":
            options.append("--model.guidance.init_args.high_noise.init_args.scale=8")
        else:
            options.append("--model.guidance.init_args.scale=8")
        command("validate", *options)
    scores = json.loads((folder / "scores.json").read_text())
    kinds = [s["guidance"].split(", [")[0] for s in scores]
    own = "autoguidance(8, IntermediateHead+NullClass"
    names = ["none", "adg", "autoguidance(8, LayerSkip", "cfg", "learned", own, "sgg", "tv_cfg"]
    assert [k.startswith(n) for k, n in zip(kinds, names, strict=True)] == [True] * 8, kinds
    kinds = names
    values = {kind: s["value"] for kind, s in zip(kinds, scores, strict=True)}
    values.pop("learned")  # after six steps it is next to unguided
    assert len(set(values.values())) == len(values), values
    own = json.loads((learned / "scores.json").read_text())
    assert [s["guidance"] for s in own] == ["learned"] * 3
    weights = [
        torch.load(f / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for f in (folder, learned)
    ]
    frozen = weights[1]["network.final_layer.linear.weight"]
    assert torch.equal(frozen, weights[0]["ema.module.final_layer.linear.weight"])


@pytest.mark.slow
def test_fine_tuning_away_from_what_it_began_with(command, fits):
    """The overlay that needs a file: its null prediction stays, and the network moves on."""
    base = fits() / "checkpoints" / "last.ckpt"
    sources.Checkpoint(network=DiT(8, 2, 1, 8, 1, 1))
    path = f"--model.objective.segments.0.weak.path={base}"
    folder = command("fit", "-c", "configs/weak/domain.yaml", path, f"--start_from={base}")
    before, after = (
        torch.load(file, weights_only=True)["state_dict"]
        for file in (base, folder / "checkpoints" / "last.ckpt")
    )
    name = "final_layer.linear.bias"
    kept = after[f"objective.segments.0.weak.network.{name}"]
    assert torch.equal(kept, before[f"ema.module.{name}"])
    assert not torch.equal(after[f"network.{name}"], kept)


@pytest.mark.slow
def test_unconditional_training(command):
    """Every label is the null class, in training and when sampling."""
    options = ["-c", "configs/weak/branch.yaml", "--model.label_dropout=1.0"]
    folder = command("fit", *options)
    path = folder / "checkpoints" / "last.ckpt"
    module = DiffusionModule.load_from_checkpoint(path, map_location="cpu", weights_only=True)
    first = torch.load(folder / "checkpoints" / "step-000003.ckpt", weights_only=True)["state_dict"]
    moved = (
        module.network.y_embedder.embedding_table.weight
        - first["network.y_embedder.embedding_table.weight"]
    )
    assert moved[:10].abs().max() == 0
    assert moved[10].abs().max() > 0
    assert torch.equal(module.generate([3, 4], [0, 1]), module.generate([3, 4], [7, 9]))


def test_published_weights_by_config(tmp_path: Path):
    """A published SiT as ``model.network``, in place of a network's sizes."""
    sizes = dict(input_size=8, in_channels=1, hidden_size=32, depth=3, num_heads=4, num_classes=10)
    theirs = perturbed(DiT(**sizes, out_channels=2))
    torch.save(theirs.state_dict(), tmp_path / "sit.pt")
    overlay = tmp_path / "sit.yaml"
    network = {
        "class_path": "w2s_train.models.published_sit",
        "init_args": {"path": str(tmp_path / "sit.pt"), "num_heads": 4},
    }
    overlay.write_text(yaml.safe_dump({"model": {"network": network}}))
    urls = "data/digits/train-{000000..000007}.tar"
    built = instantiate(["digits_w2s.yaml", str(overlay)], urls).model.network
    x, t, y = torch.randn(3, 1, 8, 8), torch.rand(3), torch.arange(3)
    torch.testing.assert_close(built(x, t, y).velocity, -theirs(x, 1 - t, y).velocity)


@pytest.mark.slow
@pytest.mark.long
def test_compiled_networks_take_steps(command):
    """`torch.compile` on the CPU: same names in the checkpoint, close to the same losses."""
    plain = command("fit", "--trainer.max_steps=3", folder="plain")
    compiled = command("fit", "--trainer.max_steps=3", "--model.compile=true", folder="compiled")
    states = [
        torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for folder in (plain, compiled)
    ]
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.long
def test_dit_b_takes_a_step(tmp_path: Path, latents: str):
    """One real optimisation step of the reference run, on latents: all weights move."""
    options = ["--trainer.max_steps=1", "--trainer.devices=1", "--trainer.accelerator=cpu"]
    options += ["--trainer.precision=32-true"]  # bfloat16 takes minutes where a CPU lacks it
    options += ["--data.global_batch_size=4", "--data.num_workers=1", "--model.compile=false"]
    options += [f"--trainer.default_root_dir={tmp_path}", "--trainer.callbacks=null"]
    command = instantiate(["dit_b_w2s.yaml"], latents, *options)
    network = command.model.network
    assert sum(p.numel() for p in network.parameters()) > 125e6
    before = {name: p.clone() for name, p in network.named_parameters() if p.requires_grad}
    command.trainer.fit(command.model, command.datamodule)
    moved = {name for name, p in before.items() if not torch.equal(p, network.get_parameter(name))}
    # An adaLN-Zero network passes no gradient beyond its zero layers in the first step.
    assert {"final_layer.linear.weight", "final_layer.linear.bias"} <= moved
    assert command.trainer.global_step == 1


@pytest.mark.slow
def test_mixed_precision_is_close_to_float32(command):
    """bf16-mixed through the command: losses within 2 %, not the same ones, weights in float32."""
    losses = []
    for precision in ("32-true", "bf16-mixed"):
        few = ["--trainer.max_steps=6", "--trainer.log_every_n_steps=1"]
        folder = command("fit", *few, f"--trainer.precision={precision}", folder=precision)
        rows = csv.DictReader((folder / "metrics.csv").read_text().splitlines())
        losses.append([float(row["train/loss"]) for row in rows if row["train/loss"]])
    assert losses[0] != losses[1] and len(losses[0]) == 6
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    state = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert {v.dtype for v in state.values() if v.is_floating_point()} == {torch.float32}
