"""Autoencoders of today: what their configs say, what is stored of them, what a run measures."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import ROOT
from vae import encode_latents, read_samples, save_vae, write_images

from w2s_train.autoencoder import DiffusersVAE, PixelSpace, load_autoencoder, to_uint8
from w2s_train.autoencoder.of_diffusers import normalization, shrinks_by
from w2s_train.module import DiffusionModule


def save_dc(folder: Path, **changes: Any) -> str:
    """A small AutoencoderDC, two cells a side smaller than its images: 32 channels, f4."""
    diffusers = pytest.importorskip("diffusers", reason="needs the extra [latents]")
    options: dict[str, Any] = dict(latent_channels=32, attention_head_dim=8, scaling_factor=0.41)
    for side in ("encoder", "decoder"):
        options |= {f"{side}_block_out_channels": (8, 16, 32), f"{side}_qkv_multiscales": ((),) * 3}
        options |= {f"{side}_layers_per_block": (1, 1, 1)}
    torch.manual_seed(0)
    diffusers.AutoencoderDC(**options | changes).save_pretrained(folder)
    return str(folder)


def save_16(folder: Path, **changes: Any) -> str:
    """A small AutoencoderKL of 16 channels, shifted and scaled as Stable Diffusion 3's."""
    options = dict(latent_channels=16, scaling_factor=1.5305, shift_factor=0.0609)
    return save_vae(folder, **options | changes)


SAVE = {"AutoencoderKL": save_16, "AutoencoderDC": save_dc}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("autoencoders")
    for kind, save in SAVE.items():
        save(folder / kind)
    return folder


@pytest.mark.slow  # imports diffusers
@pytest.mark.parametrize(
    ("kind", "shift", "scale"), [("AutoencoderKL", 0.0609, 1.5305), ("AutoencoderDC", 0.0, 0.41)]
)
def test_shift_and_scale_are_those_of_its_config(
    place: Path, kind: str, shift: float, scale: float
):
    ours, direct = DiffusersVAE(str(place / kind)), load_autoencoder(str(place / kind), "vae")
    z = torch.randn(3, direct.config.latent_channels, 2, 2)
    x = ours.encode(z)
    torch.testing.assert_close(x, (z - shift) * scale)
    off = ours.decode(x).int() - to_uint8(direct.decode(z).sample).int()
    assert off.abs().max() <= 1
    assert ours.decode(x).shape[-1] == 2 * shrinks_by(direct)
    assert ours.describe().startswith(f"{kind} ")


def test_measured_channels_come_before_one_number():
    config = {"_class_name": "AutoencoderKL", "latent_channels": 2, "scaling_factor": 0.5}
    assert normalization(config, "a") == ([0.0, 0.0], [2.0, 2.0])
    measured = config | {"latents_mean": [1.0, -1.0], "latents_std": [3.0, 4.0]}
    assert normalization(measured, "a") == ([1.0, -1.0], [3.0, 4.0])
    plain = {"_class_name": "AutoencoderDC", "latent_channels": 1}
    assert normalization(plain, "a") == ([0.0], [1.0])
    with pytest.raises(
        ValueError, match="^a: must have latents_mean and latents_std of 3 channels"
    ):
        normalization(measured | {"latent_channels": 3}, "a")


@pytest.mark.slow
@pytest.mark.parametrize("kind", SAVE)
def test_what_is_stored_and_measured(place: Path, tmp_path: Path, kind: str):
    """Of a posterior its moments, else the latent; statistics are those of all that is stored."""
    urls, output = write_images(tmp_path / "images"), tmp_path / "latents"
    encode_latents(urls, "--autoencoder", place / kind, "--output", output, "--batch-size", 4)
    made = json.loads((output / "latents.json").read_text())
    channels = made["latent_shape"][0]
    stored = [s[key].double() for s in read_samples(output) for key in ("npy", "flip.npy")]
    kept = torch.stack(stored).transpose(0, 1).flatten(1)
    assert len(kept) == (2 * channels if kind == "AutoencoderKL" else channels)
    mean, variance = kept[:channels], torch.zeros(())
    if kind == "AutoencoderKL":
        variance = kept[channels:].exp().mean(1)
    std = (mean.var(1, correction=0) + variance).sqrt()
    torch.testing.assert_close(torch.tensor(made["statistics"]["mean"]).double(), mean.mean(1))
    torch.testing.assert_close(torch.tensor(made["statistics"]["std"]).double(), std)
    ours = DiffusersVAE(str(place / kind), **{k: made["statistics"][k] for k in ("mean", "std")})
    ours.check(made, "there")
    assert ours.advice(made, "there") == ""
    assert "std 0.1 once scaled" in DiffusersVAE(
        "none", made["statistics"]["mean"], [10 * s for s in made["statistics"]["std"]]
    ).advice(made, "there")
    x = torch.cat([ours.encode(torch.stack(stored).float()) for _ in range(20)])
    torch.testing.assert_close(x.std((0, 2, 3)), torch.ones(channels), rtol=0.05, atol=0)


@pytest.mark.slow
def test_a_run_takes_what_was_measured_and_keeps_it(command, place: Path, tmp_path: Path):
    """Left out, mean and std are those beside the shards, in the run's config and checkpoints."""
    vae = save_dc(tmp_path / "vae", in_channels=1)
    encode_latents(
        ROOT / "data/digits/train-000000.tar",
        "--autoencoder",
        vae,
        "--output",
        tmp_path / "latents",
    )
    made = json.loads((tmp_path / "latents" / "latents.json").read_text())["statistics"]
    autoencoder = {"class_path": "w2s_train.autoencoder.DiffusersVAE", "init_args": {"path": vae}}
    network = {"init_args": {"input_size": 2, "in_channels": 32, "patch_size": 1}}
    data = {"train_urls": str(tmp_path / "latents" / "train-*.tar"), "prepare": None}
    overlay = tmp_path / "latents.yaml"
    model = {"network": network, "autoencoder": autoencoder}
    overlay.write_text(yaml.safe_dump({"model": model, "data": data | {"dataset": "digits"}}))
    other = save_16(tmp_path / "other")
    with pytest.raises(SystemExit, match=r"autoencoder.path=.* \(16 channels\): must be 32, as"):
        command("fit", "-c", str(overlay), f"--model.autoencoder.init_args.path={other}")
    folder = command("fit", "-c", str(overlay))
    settings = yaml.safe_load((folder / "config.yaml").read_text())["model"]["autoencoder"]
    assert {key: settings["init_args"][key] for key in made if key in ("mean", "std")} == {
        key: made[key] for key in ("mean", "std")
    }
    (tmp_path / "latents" / "latents.json").unlink()  # what was trained does not need it
    module = DiffusionModule.load_from_checkpoint(folder / "checkpoints" / "last.ckpt")
    mean, std = module.autoencoder.latent_moments  # type: ignore[operator]
    assert torch.equal(mean, torch.tensor(made["mean"]))
    torch.testing.assert_close(std, torch.tensor(made["std"]))
    assert module.generate([1, 2], [4, 5]).shape == (2, 1, 8, 8)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (dict(path="nowhere"), "autoencoder.path=nowhere: must be an existing folder, or OWNER/"),
        (dict(path="a", mean=[0.0]), r"mean=\[0.0\]: must be given with std=None, or neither"),
        (dict(path="a", mean=[0.0], std=[1.0, 2.0]), r"mean=\[0.0\]: must have as many channels"),
        (dict(path="a", mean=[0.0], std=[0.0]), r"std=\[0.0\]: must be finite, .* and above 0"),
        (dict(path="a", mean=[], std=[]), r"mean=\[\]: must have as many channels"),
        (
            dict(path="a", mean=[0.0], std=[1.0], decode_batch=0),
            "decode_batch=0: must be at least 1",
        ),
    ],
)
def test_mistakes_are_one_line(settings: dict[str, Any], said: str):
    with pytest.raises(ValueError, match=f"^{said}[^\n]*$"):
        DiffusersVAE(**settings)


def test_what_is_no_autoencoder_of_images(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKLWan"}')
    rule = "must hold an AutoencoderKL or an AutoencoderDC, holds AutoencoderKLWan$"
    with pytest.raises(ValueError, match=f"^autoencoder.path={tmp_path}: {rule}"):
        DiffusersVAE(str(tmp_path))
    ours = DiffusersVAE("a", [0.0] * 8, [1.0] * 8)
    with pytest.raises(ValueError, match=r"^autoencoder.path=a \(8 channels\): the shards hold 3 "):
        ours.encode(torch.zeros(2, 3, 4, 4))
    with pytest.raises(ValueError, match=r"\(8 channels\): must be 4, as there says of the shards"):
        ours.check({"latent_shape": [4, 2, 2]}, "there")
    assert PixelSpace().advice({}, "") == ""
