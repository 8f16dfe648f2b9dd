"""Between shards, network and images: sampled posteriors, scaled latents, decoded images."""

import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import images
from vae import FACTOR, save_vae

from w2s_train.autoencoder import (
    Autoencoder,
    PixelSpace,
    StableDiffusionVAE,
    Vectors,
    latents_beside,
    load_autoencoder,
    to_uint8,
    weights_digest,
)
from w2s_train.shards import Storage


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_vae(tmp_path_factory.mktemp("vae"))


def latents_json(path: Path, **changes) -> str:
    """As the command writes it."""
    about = {"autoencoder": "one", "weights": "0" * 64, "latent_shape": [4, 8, 8]}
    about["statistics"] = {"mean": [0.5, -1.0, 0.0, 3.0], "std": [0.1, 1.0, 2.0, 5.0]}
    path.write_text(json.dumps(about | changes))
    return str(path)


def extreme_moments(n: int) -> torch.Tensor:
    """Log-variances beyond the limits, too."""
    return torch.cat([torch.randn(n, 4, 8, 8), 25 * torch.randn(n, 4, 8, 8)], dim=1)


def test_stored_pixels_and_arrays_become_floats():
    stored = images(3)
    x = PixelSpace().encode(stored)
    torch.testing.assert_close(x, stored.float() / 127.5 - 1)
    assert torch.equal(PixelSpace().decode(x), stored)
    for autoencoder in (PixelSpace(), Vectors()):
        floats = torch.randn(3, 2, 1, 1)
        assert torch.equal(autoencoder.encode(floats), floats)
        assert autoencoder.encode(floats.half()).dtype == torch.float32


@pytest.mark.slow  # imports diffusers
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_samples_are_those_of_diffusers(dtype: torch.dtype):
    distributions = pytest.importorskip("diffusers.models.autoencoders.vae")
    moments = extreme_moments(5).to(dtype)
    torch.manual_seed(1)
    ours = StableDiffusionVAE(scale=1.0).encode(moments)
    torch.manual_seed(1)
    theirs = distributions.DiagonalGaussianDistribution(moments.float()).sample()
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)


def test_statistics_give_each_channel_mean_0_and_std_1(tmp_path: Path):
    path = latents_json(tmp_path / "latents.json")
    about = json.loads(Path(path).read_text())["statistics"]
    mean, std = (torch.tensor(about[key]).view(4, 1, 1) for key in ("mean", "std"))
    # Half of the variance between images, half of it within the posterior of each.
    means = mean + std * torch.randn(4000, 4, 4, 4) / 2**0.5
    log_variance = (std.square() / 2).log().expand_as(means)
    x = StableDiffusionVAE(statistics=path).encode(torch.cat([means, log_variance], 1))
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(4), rtol=0, atol=0.02)
    torch.testing.assert_close(x.std((0, 2, 3)), torch.ones(4), rtol=0.02, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("scaled", ["default", "scale", "statistics"])
def test_decode_inverts_encode(vae: str, tmp_path: Path, scaled: str):
    path = latents_json(tmp_path / "latents.json")
    options = {"default": {}, "scale": {"scale": 0.3}, "statistics": {"statistics": path}}
    autoencoder = StableDiffusionVAE(vae, **options[scaled], decode_batch=3)
    latent = 2 * torch.randn(7, 4, 8, 8) + 1
    x = autoencoder.encode(latent)
    if scaled == "default":
        assert torch.equal(x, latent * 0.18215)
    direct = load_autoencoder(vae, "vae").decode(latent).sample
    off = autoencoder.decode(x).int() - to_uint8(direct).int()
    assert off.abs().max() <= 1
    assert (off != 0).float().mean() < 1e-3
    assert direct.shape[-1] == FACTOR * 8


@pytest.mark.slow
def test_images_do_not_depend_on_the_rest_of_the_batch(vae: str):
    autoencoder = StableDiffusionVAE(vae, decode_batch=4)
    x = torch.randn(11, 4, 8, 8)
    whole = autoencoder.decode(x)
    assert whole.shape == (11, 3, 16, 16)
    for size in (1, 3, 4):
        assert torch.equal(torch.cat([autoencoder.decode(part) for part in x.split(size)]), whole)


@pytest.mark.slow
def test_decoding_stays_in_float32(vae: str):
    autoencoder = StableDiffusionVAE(vae)
    x = torch.randn(2, 4, 8, 8)
    whole = autoencoder.decode(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(autoencoder.decode(x), whole)
        lower = autoencoder._loaded[0].decode(x / 0.18215).sample
    assert not torch.equal(to_uint8(lower.float()), whole)  # so the test can see it
    assert torch.equal(autoencoder.to(torch.bfloat16).decode(x), whole)


@pytest.mark.slow
def test_checkpoints_hold_nothing_of_it(vae: str, tmp_path: Path):
    autoencoder = StableDiffusionVAE(vae, statistics=latents_json(tmp_path / "latents.json"))
    autoencoder.load()
    assert autoencoder.state_dict() == {}
    assert list(autoencoder.parameters()) == []


@pytest.mark.slow
def test_shards_of_another_autoencoder_are_refused(vae: str, tmp_path: Path):
    """Found beside the shards however they are named; weights once there are some to compare."""
    autoencoder = StableDiffusionVAE(vae)
    path = tmp_path / "latents.json"

    def check(autoencoder: Autoencoder = autoencoder) -> None:
        [(where, made)] = latents_beside(
            [f"{tmp_path}/train-000000.tar"], Storage(tmp_path)
        ).items()
        assert where == str(path)
        autoencoder.check(made, where)

    latents_json(path)
    check()
    autoencoder.load()
    with pytest.raises(
        ValueError, match=r"^autoencoder.path=.*must be .*, one with weights 0{12};"
    ):
        check()
    latents_json(path, weights=weights_digest(load_autoencoder(vae, "vae")))
    check()
    latents_json(path, latent_shape=[16, 8, 8])
    with pytest.raises(ValueError, match="^channels=4: must be 16"):
        check()
    other = StableDiffusionVAE(vae, statistics=latents_json(tmp_path / "other.json"))
    latents_json(path)
    check(StableDiffusionVAE(vae, statistics=str(path)))
    made = json.loads(path.read_text())
    made["statistics"]["std"][0] *= 2
    path.write_text(json.dumps(made))
    with pytest.raises(ValueError, match="^statistics=.*other.json: must be those of .*latents.js"):
        check(other)
    del made["statistics"]
    path.write_text(json.dumps(made))
    with pytest.raises(ValueError, match="^train_urls=.*must be of shards that are all encoded"):
        check()
    with pytest.raises(ValueError, match="^channels=16: must be 4, as"):
        StableDiffusionVAE(vae, channels=16).load()
    PixelSpace().check({}, "")
    PixelSpace().load()


@pytest.mark.parametrize("std, advised", [(1.04, "0.9615"), (5.0, ""), (4.0, ""), (50.0, "0.02")])
def test_latents_that_are_not_of_unit_variance(tmp_path: Path, std: float, advised: str):
    """Stable Diffusion's factor on other latents; with their own statistics nothing is said."""
    path = latents_json(tmp_path / "latents.json")
    made = json.loads(Path(path).read_text())
    made["statistics"]["std_of_all"] = std
    said = StableDiffusionVAE().advice(made, path)
    assert bool(said) == bool(advised)
    if advised:
        begin = f"autoencoder.scale=0.18215: latents of {path} have std {std:.3g}, "
        assert said.startswith(f"{begin}{std * 0.18215:.2g} once scaled")
        assert f"must be about {advised}; or give autoencoder.statistics={path}" in said
        assert StableDiffusionVAE(scale=1 / std).advice(made, path) == ""
    assert StableDiffusionVAE(statistics=path).advice(made, path) == ""
    assert PixelSpace().advice(made, path) == ""


@pytest.mark.slow
def test_weights_digest(vae: str, tmp_path: Path):
    """Of the values, not of the file; of every value, and of where it stands."""
    from safetensors.torch import load_file, save_file

    loaded = load_autoencoder(vae, "vae")
    digest = weights_digest(loaded)
    assert weights_digest(load_autoencoder(save_vae(tmp_path / "a"), "vae")) == digest
    assert weights_digest(load_autoencoder(save_vae(tmp_path / "b", seed=1), "vae")) != digest
    path = tmp_path / "a" / "diffusion_pytorch_model.safetensors"
    save_file({name: value.half() for name, value in load_file(path).items()}, path)
    half = load_autoencoder(str(tmp_path / "a"), "vae")
    assert next(half.parameters()).dtype == torch.float32
    assert weights_digest(half) == weights_digest(loaded.half())
    loaded.decoder.conv_out.bias.data[0] += 1
    assert weights_digest(loaded) != weights_digest(half)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(scale=0.0), "^scale=0.0: must be a finite number above 0"),
        (dict(channels=0), "^channels=0: must be at least 1"),
        (dict(decode_batch=0), "^decode_batch=0: must be at least 1"),
        (dict(scale=1.0, statistics="s.json"), "^scale=1.0: must be left out where statistics="),
        (dict(statistics="none.json"), "^statistics=none.json: must be an existing file"),
    ],
)
def test_errors_of_construction(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        StableDiffusionVAE(**options)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(latent_shape=[]), "must be a latents.json"),
        (dict(statistics={"mean": [0] * 4}), "must hold numbers, mean and std"),
        (dict(statistics={"mean": [0] * 3, "std": [1] * 3}), "must be of 4 channels, are of 3"),
        (
            dict(statistics={"mean": [0] * 4, "std": [1, 1, 1, 0]}),
            "must be finite, and std above 0",
        ),
        (dict(statistics={"mean": [0] * 4, "std": [1, 1, 1, float("nan")]}), "must be finite"),
    ],
)
def test_unusable_statistics(tmp_path: Path, changes: dict, message: str):
    path = latents_json(tmp_path / "latents.json", **changes)
    with pytest.raises(ValueError, match=f"^statistics=.*: {message}"):
        StableDiffusionVAE(statistics=path)
    Path(path).write_text("{")
    with pytest.raises(ValueError, match="^statistics=.*must be a latents.json"):
        StableDiffusionVAE(statistics=path)
    Path(path).write_text('{"autoencoder": "a", "weights": "b", "latent_shape": [4]}')
    with pytest.raises(ValueError, match="must be of shards that are all encoded"):
        StableDiffusionVAE(statistics=path)


def test_data_that_is_no_latent():
    with pytest.raises(ValueError, match="^channels=4: the shards hold images"):
        StableDiffusionVAE().encode(images(2, channels=4))
    with pytest.raises(ValueError, match="^channels=4: the shards hold 3 channels"):
        StableDiffusionVAE().encode(torch.zeros(2, 3, 8, 8))


@pytest.mark.slow
def test_weights_that_cannot_be_loaded(vae: str, tmp_path: Path, monkeypatch):
    """One line each, and never random weights instead."""
    from safetensors.torch import load_file, save_file

    folder = Path(save_vae(tmp_path / "vae"))
    weights = folder / "diffusion_pytorch_model.safetensors"

    def message(path: object) -> str:
        with pytest.raises(ValueError, match="^autoencoder.path=[^\n]*$") as caught:
            StableDiffusionVAE(str(path)).load()
        return str(caught.value)

    state = load_file(weights)
    bias = state.pop("encoder.conv_in.bias")
    save_file(state, weights)
    assert "1 are missing, such as encoder.conv_in.bias" in message(folder)
    save_file(state | {"encoder.conv_in.bias": bias[:3].clone()}, weights)
    assert "size mismatch" in message(folder)
    weights.write_bytes(weights.read_bytes()[:500])
    assert "Unable to load weights" in message(folder)
    weights.unlink()
    assert "no file named diffusion_pytorch_model" in message(folder)
    (folder / "config.json").write_text("{")
    assert "and its config.json (JSONDecodeError" in message(folder)
    (folder / "config.json").unlink()
    assert "and its config.json (FileNotFoundError: [Errno 2]" in message(folder)
    assert "must be an existing folder, or OWNER/NAME of the hub" in message(tmp_path / "none")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert "needs diffusers" in message(vae)


@pytest.mark.slow
@pytest.mark.parametrize(
    "path, asked",
    [("owner/name", ("owner/name", None)), ("owner/name/a/vae", ("owner/name", "a/vae"))],
)
def test_names_on_the_hub(vae: str, monkeypatch, path: str, asked: tuple):
    diffusers, hub = map(pytest.importorskip, ("diffusers", "huggingface_hub"))
    calls = []

    def config(name: str, file: str, **options) -> str:
        calls.append((name, options["subfolder"]))
        assert options["revision"] == "main" and file == "config.json"
        return f"{vae}/{file}"

    def offline(name: str, **options) -> None:
        calls.append((name, options["subfolder"]))
        assert options["revision"] == "main" and not options.get("local_files_only")
        raise OSError("no connection\nat all")

    monkeypatch.setattr(hub, "hf_hub_download", config)
    monkeypatch.setattr(diffusers.AutoencoderKL, "from_pretrained", offline)
    said = "^vae=owner.*on the hub.*no connection at all[)]$"
    with pytest.raises(ValueError, match=said):
        load_autoencoder(path, "vae", "main")
    assert calls == [asked, asked]
    monkeypatch.setattr(hub, "hf_hub_download", lambda *_, **options: offline("", **options))
    with pytest.raises(ValueError, match=said):
        load_autoencoder(path, "vae", "main")


def test_statistics_move_to_the_device_once():
    """A copy from the host at every step would have it wait for an accelerator."""
    vae = StableDiffusionVAE(scale=0.5)
    vae.encode(torch.zeros(2, 4, 2, 2, device="meta"))
    moved = vae._mean, vae._factor
    vae.encode(torch.zeros(2, 4, 2, 2, device="meta"))
    assert vae._mean is moved[0] and vae._factor is moved[1] and moved[0].device.type == "meta"
