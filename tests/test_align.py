"""Alignment: the term's value and gradient, stored tokens, and whole runs."""

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, lightning, perturbed
from shard_files import npy
from test_resume import assert_same, checkpoint
from torch import nn
from vae import encode_latents, read_samples, save_vae

from w2s_train.align import MLP, Alignment, Alignments, Convolution, Extractor, Stored
from w2s_train.align.terms import resampled
from w2s_train.errors import UserError
from w2s_train.features import ClassifierFeatures, ConvClassifier, InceptionFeatures
from w2s_train.interpolant import LinearInterpolant
from w2s_train.log import Log
from w2s_train.models import DiT, DiTOutput
from w2s_train.objective import WeakToStrongObjective
from w2s_train.running.guard import Guard
from w2s_train.shards import ShardFiles, ShardWriter, Storage, write_index
from w2s_train.shards.dataset import Decoded
from w2s_train.shards.index import find_shards
from w2s_train.shards.order import Places
from w2s_train.timesteps import Uniform
from w2s_train.weak import Step


def out(tokens: torch.Tensor) -> DiTOutput:
    """A pass that has kept tokens of block 0."""
    return DiTOutput(tokens, tokens, {0: tokens}, tokens)


def term(**options) -> Alignment:
    """A term on block 0 of tokens of two numbers, whose projector is the identity."""
    found = Alignment(Stored(), 2, Convolution(1), block=0, **options)
    found.bind(SimpleNamespace(depth=3, hidden_size=2, forward=lambda keep_hidden: None))
    nn.init.zeros_(found.projector.layer.bias)
    found.projector.layer.weight.data = torch.eye(2).view(2, 2, 1, 1)
    return found


def test_the_term_is_minus_the_mean_cosine():
    """Of each row; lengths do not matter, and a token that is zero counts 0."""
    h = torch.tensor([[[1.0, 0], [0, 2], [3, 0], [1, 1]], [[1, 0]] * 4])
    z = torch.tensor([[[5.0, 0], [0, -1], [0, 0], [0, 1]], [[3, 4]] * 4])
    log = Log()
    found = term(weight=0.5)({"tokens": z}, out(h), log)
    cosines = torch.tensor([(1 - 1 + 0 + 0.5**0.5) / 4, 0.6])
    torch.testing.assert_close(found, -0.5 * cosines)
    log.commit()
    read = log.read(lambda x, op: x)
    assert read["align/encoder/loss"] == pytest.approx(-cosines.mean().item())


def test_spatial_norm_takes_away_what_all_tokens_share():
    """With alpha 1 the same offset on all of the encoder's tokens changes nothing."""
    torch.manual_seed(0)
    h, z = torch.randn(2, 4, 2), torch.randn(2, 4, 2)
    whole, none = term(alpha=1.0), term()
    given = [{"tokens": z}, {"tokens": z + 7}]
    one, other = (whole(each, out(h), Log()) for each in given)
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert (none(given[0], out(h), Log()) - none(given[1], out(h), Log())).abs().max() > 0.01


def test_tokens_of_another_grid_are_resampled():
    grid = torch.arange(4.0).repeat(4, 1)  # a ramp along the rows
    halved = resampled(grid.reshape(1, 16, 1), 4, "x")
    assert halved[0, 0] == halved[0, 2] < 1 < 2 < halved[0, 1] == halved[0, 3]
    assert (halved[0, 0] + halved[0, 1]).item() == pytest.approx(3)
    torch.testing.assert_close(resampled(torch.ones(2, 9, 3), 25, "x"), torch.ones(2, 25, 3))
    with pytest.raises(UserError, match="encoder, 15, as in the network, 16, or square numbers"):
        resampled(torch.ones(1, 15, 2), 16, "x")


def classifier(folder: Path, seed: int = 0) -> str:
    """Random weights that give 8x8 images 4x4 tokens of 12 numbers."""
    torch.manual_seed(seed)
    network = perturbed(ConvClassifier([1, 8, 12], [1, 2], 10), 0.2)
    network.write(folder / f"encoder{seed}.safetensors")
    return str(folder / f"encoder{seed}.safetensors")


def objective(path: str, **options) -> WeakToStrongObjective:
    aligned = Alignment(Extractor(ClassifierFeatures(path)), 12, MLP(16), **options)
    return WeakToStrongObjective(LinearInterpolant(), Uniform(), align=[aligned])


def test_gradients_reach_the_projector_and_the_blocks_below_alone(tmp_path: Path):
    """Beside those of the plain loss: the difference to a run without the term."""
    torch.manual_seed(0)
    network = perturbed(DiT(8, 2, 1, hidden_size=16, depth=3, num_heads=2, num_classes=10))
    aligned = objective(classifier(tmp_path), block=1)
    plain = WeakToStrongObjective(LinearInterpolant(), Uniform())
    images, y = torch.randint(0, 256, (6, 1, 8, 8), dtype=torch.uint8), torch.arange(6)
    gradients = []
    for each in (plain, aligned):
        each.bind(network)
        each.plan(10)
        network.zero_grad()
        torch.manual_seed(1)
        x = images / 127.5 - 1
        each(network, x, y, Step(batch={"image": images}), Log()).mean().backward()
        named = network.named_parameters()
        gradients.append({k: p.grad.clone() for k, p in named if p.requires_grad})
    changed = {k for k, g in gradients[0].items() if not torch.equal(g, gradients[1][k])}
    below = {k for k in gradients[0] if "blocks.2" not in k and "final_layer" not in k}
    unused = {k for k in below if "label" in k}
    assert changed == below - unused
    own = dict(aligned.align.named_parameters())
    assert own and all(p.grad is not None and p.grad.abs().max() > 0 for p in own.values())
    assert all("projector" in name for name in own)  # the encoder is no part of the state


def test_classifiers_have_the_tokens_that_their_features_are_the_mean_of(tmp_path: Path):
    features = ClassifierFeatures(classifier(tmp_path))
    features.load()
    images = torch.randint(0, 256, (3, 1, 8, 8), dtype=torch.uint8)
    assert features.tokens(images).shape == (3, 16, 12)
    torch.testing.assert_close(features.tokens(images).mean(1), features.features(images))


def refused(message: str, make, *arguments: object, **options) -> None:
    with pytest.raises(UserError, match=message):
        make(*arguments, **options)


def test_mistakes_are_one_line(tmp_path: Path):
    refused(r"weight=-1: must be at least 0", Alignment, Stored(), 2, weight=-1)
    refused("features=0: must be at least 1", Alignment, Stored(), 0)
    refused(r"alpha=2: must be in \[0, 1\]", Alignment, Stored(), 2, alpha=2)
    refused("name=a/b: must be letters", Alignment, Stored(), 2, name="a/b")
    refused("kernel_size=2: must be odd", Convolution, 2)
    refused(r"align=\['e', 'e'\]: must have names of their own", Alignments, [term(name="e")] * 2)
    refused("InceptionFeatures: must be one that has tokens", Extractor, InceptionFeatures())
    network = DiT(8, 2, 1, hidden_size=16, depth=3, num_heads=2, num_classes=10)
    refused(r"block=3: must be in \[0, 2\], the network", objective("x", block=3).bind, network)
    bare = SimpleNamespace(forward=lambda x: x)
    refused("must have depth, hidden_size, forward.keep_hidden=. for an alignment",
            objective("x").bind, bare)  # fmt: skip
    aligned = objective(classifier(tmp_path))
    encoder = aligned.align.terms[0].encoder
    latents = {"image": torch.zeros(2, 8, 4, 4, dtype=torch.float16)}
    refused("must get pixels, not torch.float16; .*--align MODEL", encoder.tokens, latents)
    refused("must get pixels, here is of latents; .*--align", aligned.align.check, {}, "here")
    refused("must have tokens beside the latents of here", Stored().check, {}, "here")
    refused("must have tokens in the shards; .*--align", Stored().tokens, {})
    small = Extractor(ClassifierFeatures(classifier(tmp_path)))
    wrong = Alignments([Alignment(small, 7)])
    refused("features=7: must be 12, as the encoder has", wrong.load)
    aligned.bind(network)
    aligned.plan(10)
    stored = Stored()
    stored.made = {"encoder": "x", "tokens": [15, 12]}
    fifteen = WeakToStrongObjective(
        LinearInterpolant(), Uniform(), align=[Alignment(stored, 12, MLP(16))]
    )
    fifteen.bind(network)
    refused("encoder, 15, as in the network, 16, or square numbers", fifteen.plan, 10)
    fifteen.align.terms[0].weight = 0  # ended: its tokens are not read
    fifteen.plan(10)
    judge = encoder.describe()
    refused("must not have the extractor of the scores as its", aligned.align.refuse_judge, judge)
    aligned.align.refuse_judge("another one")


def write_tokens(folder: Path, rows: int = 10, *, flip: bool = True, broken: int = -1) -> None:
    """A shard of arrays, whose values are the number of the sample, + 100 if it is mirrored."""
    with ShardWriter(folder / "train-000000.tar") as writer:
        for row in range(rows):
            plain = npy(np.full((2, 2, 2), row, np.float16))
            fields = {"npy": plain, "tokens.npy": npy(np.full((4, 3), row, np.float16))}
            fields["flip.npy"] = npy(np.full((2, 2, 2), row + 100, np.float16))
            if flip:
                fields["flip.tokens.npy"] = npy(np.full((4, 3), row + 100, np.float16))
            if row == broken:
                fields["tokens.npy"] = fields["tokens.npy"][:-5]
            writer.write(f"a.{row:04d}", row % 10, **fields)
    write_index(folder)


def shard_files(folder: Path, **options) -> ShardFiles:
    storage = Storage()
    shards = find_shards([str(folder / "train-000000.tar")], storage)
    return ShardFiles(shards, storage, **options)


def test_tokens_are_read_beside_the_data_mirrored_as_they_are(tmp_path: Path):
    write_tokens(tmp_path)
    files = shard_files(tmp_path, flip=True, tokens=True)
    places = Places(np.array([3, 7, 1]), np.array([False, True, True]))
    for source in (files, Decoded(files)):
        rows = source.read(places)
        assert rows.image[:, 0, 0, 0].tolist() == [3, 107, 101]
        assert rows.tokens is not None and rows.tokens.shape == (3, 4, 3)
        assert rows.tokens[:, 0, 0].tolist() == [3, 107, 101]
    assert shard_files(tmp_path).read(places).tokens is None


def test_a_sample_whose_tokens_cannot_be_read_is_a_bad_one(tmp_path: Path):
    write_tokens(tmp_path, broken=2)
    rows = shard_files(tmp_path, tokens=True).read(Places.of(range(5)))
    assert set(rows.bad) == {2}
    assert rows.tokens is not None and rows.tokens[[0, 1, 3, 4], 0, 0].tolist() == [0, 1, 3, 4]


def test_shards_without_tokens_are_refused(tmp_path: Path):
    write_tokens(tmp_path, flip=False)
    with pytest.raises(UserError, match=r"flip=True: must be False .* \(tokens.npy\)"):
        shard_files(tmp_path, flip=True, tokens=True).read(Places.of([0]))
    with ShardWriter(tmp_path / "train-000000.tar") as writer:
        writer.write("0", 0, npy=npy(np.zeros((2, 2, 2), np.float16)))
    write_index(tmp_path)
    with pytest.raises(UserError, match="must hold an encoder's tokens .* --align MODEL"):
        shard_files(tmp_path, tokens=True).read(Places.of([0]))


# ---- whole runs ------------------------------------------------------------------------------


def overlay(folder: Path, encoder: dict, **more) -> list[str]:
    """Options: a REPA and an iREPA term, beside the segments of the config."""
    terms = [
        dict(encoder=encoder, features=12, name="repa", block=0),
        dict(encoder=encoder, features=12, name="irepa", alpha=0.6)
        | {"projector": {"class_path": "w2s_train.align.Convolution"}},
    ]
    terms[0]["projector"] = {"class_path": "w2s_train.align.MLP", "init_args": {"hidden": 16}}
    named = [{"class_path": "w2s_train.align.Alignment", "init_args": each} for each in terms]
    model = {"objective": {"init_args": {"align": named}}}
    path = folder / "align.yaml"
    path.write_text(yaml.safe_dump({"model": model | more.pop("model", {})} | more))
    return ["-c", str(path)]


def online(path: str) -> dict:
    features = {"class_path": "w2s_train.features.ClassifierFeatures"}
    features["init_args"] = {"weights": path, "dataset": "other"}
    return {"class_path": "w2s_train.align.Extractor", "init_args": {"extractor": features}}


@pytest.mark.slow
def test_a_run_with_segments_and_terms_resumes_bitwise(tmp_path: Path):
    path = classifier(tmp_path)
    options = [
        *overlay(tmp_path, online(path)),
        "--data.flip=true",
        "--trainer.precision=bf16-mixed",
    ]
    options += ["--trainer.accumulate_grad_batches=2", "--model.objective.init_args.total_steps=6"]
    whole = lightning("fit", tmp_path / "whole", *options)
    part = lightning("fit", tmp_path / "part", *options, "--trainer.max_steps=3")
    # Scoring and going on need no more than the checkpoint and the config.
    lightning("fit", part, *options, "--ckpt_path=last")
    assert_same(checkpoint(whole), checkpoint(part))
    state = checkpoint(whole)["state_dict"]
    own = [key for key in state if "align" in key]
    assert own and all(key.startswith("objective.align.") and "projector" in key for key in own)
    assert not any("convs" in key for key in state)
    header = (whole / "metrics.csv").read_text().splitlines()[0]
    assert "train/align/repa/loss" in header and "train/align/irepa/loss" in header
    [start] = json.loads((whole / "environment.json").read_text())
    features = ClassifierFeatures(path, dataset="other")
    features.load()
    assert start["encoders"] == {"repa": features.describe(), "irepa": features.describe()}
    Path(path).unlink()
    lightning("validate", whole, *options, "--ckpt_path=last")


@pytest.mark.slow
def test_the_guard_judges_a_loss_that_is_at_least_zero(tmp_path: Path, monkeypatch):
    """A loss about 0 would make a spike of every other one."""
    options = overlay(tmp_path, online(classifier(tmp_path)))
    options += [f"--model.objective.init_args.align.{i}.weight=10" for i in range(2)]
    judge, seen = Guard.judge, []

    def spy(self, trainer, loss, norm):
        seen.append(loss.item())
        return judge(self, trainer, loss, norm)

    monkeypatch.setattr(Guard, "judge", spy)
    folder = lightning("fit", tmp_path / "run", *options)
    with open(folder / "metrics.csv") as file:
        logged = [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]
    assert min(seen) >= 0 > min(logged)
    assert seen == pytest.approx([loss + 20 for loss in logged], rel=1e-4)


@pytest.mark.slow
def test_the_judge_is_refused_as_encoder(tmp_path: Path, capsys):
    encoder = online("data/digits/classifier.safetensors")
    options = overlay(tmp_path, encoder)
    features = ClassifierFeatures(str(ROOT / "data/digits/classifier.safetensors"))
    features.load()
    text = (tmp_path / "align.yaml").read_text()
    text = text.replace("features: 12", f"features: {features.num_features}")
    (tmp_path / "align.yaml").write_text(text)
    with pytest.raises(SystemExit, match="must not have the extractor of the scores"):
        lightning("fit", tmp_path / "run", *options)


@pytest.mark.slow
@pytest.mark.long
def test_tokens_stored_beside_latents_are_those_of_the_encoder(tmp_path: Path):
    path = classifier(tmp_path)
    vae = save_vae(tmp_path / "vae", in_channels=1, out_channels=1)
    latents = tmp_path / "latents"
    where = ["--autoencoder", vae, "--output", latents]
    encode_latents(ROOT / "data/digits/train-00000[0-1].tar", *where, "--align", path)
    features = ClassifierFeatures(path)
    features.load()
    made = json.loads((latents / "latents.json").read_text())
    assert made["align"] == {"encoder": features.describe(), "tokens": [16, 12]}
    images = [s for i in range(2) for s in images_of(ROOT / f"data/digits/train-{i:06d}.tar")]
    samples = read_samples(latents)
    assert len(samples) == len(images) > 0
    for mirrored, key in ((False, "tokens.npy"), (True, "flip.tokens.npy")):
        x = torch.stack(images)
        stored = torch.stack([sample[key] for sample in samples])
        expected = features.tokens(x.flip(-1) if mirrored else x).half()
        torch.testing.assert_close(stored, expected, rtol=2e-3, atol=2e-3)
    with pytest.raises(SystemExit, match="of align .* now None"):
        encode_latents(ROOT / "data/digits/train-00000[0-1].tar", *where)
    autoencoder = {"class_path": "w2s_train.autoencoder.StableDiffusionVAE"}
    autoencoder["init_args"] = {"path": vae, "statistics": str(latents / "latents.json")}
    network = {"init_args": {"input_size": 4, "in_channels": 4, "patch_size": 1}}
    data = {"train_urls": f"{latents}/train-*.tar", "prepare": None, "dataset": "digits"}
    more = dict(model={"network": network, "autoencoder": autoencoder}, data=data)
    stored = {"class_path": "w2s_train.align.Stored"}
    options = [*overlay(tmp_path, stored, **more), "--data.flip=true"]
    run = lightning("fit", tmp_path / "run", *options)
    [start] = json.loads((run / "environment.json").read_text())
    assert start["encoders"] == dict.fromkeys(("repa", "irepa"), features.describe())
    files = [lightning("fit", tmp_path / name, *options, f"--data.in_memory={value}")
             for name, value in (("read", "false"), ("kept", "true"))]  # fmt: skip
    assert_same(*map(checkpoint, files))
    options = overlay(tmp_path, online(path), **more)
    with pytest.raises(SystemExit, match="must get pixels, .*latents.json is of latents"):
        lightning("fit", tmp_path / "online", *options)


def images_of(shard: Path) -> list[torch.Tensor]:
    from w2s_train.shards.decode import decode_image
    from w2s_train.shards.samples import read_shard

    return [decode_image(sample["png"]) for sample in read_shard(shard)]
