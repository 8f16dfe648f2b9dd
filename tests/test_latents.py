"""data/encode_latents.py: what the shards hold, statistics, restarts, and errors."""

import functools
import gzip
import json
from pathlib import Path

import pytest
import torch
from vae import (
    BATCH,
    arguments,
    contents,
    encode,
    encode_latents,
    encoded_image,
    read_samples,
    save_vae,
    write_images,
)

from w2s_train.autoencoder import StableDiffusionVAE, latents_beside, load_autoencoder
from w2s_train.shards import ShardWriter, Storage
from w2s_train.shards.decode import decode_image
from w2s_train.shards.samples import payloads, to_float


def sources(place: Path) -> tuple[list[dict], torch.Tensor]:
    """The images' samples, and all images (N, 3, H, W) in [-1, 1]."""
    samples = read_samples(place / "images")
    pixels = [decode_image(s["png" if "png" in s else "jpeg"]).expand(3, -1, -1) for s in samples]
    return samples, to_float(torch.stack(pixels))


def reference_moments(place: Path, x: torch.Tensor) -> torch.Tensor:
    """By the autoencoder, in the same batches: ten images a shard, up to four at a time."""
    vae = load_autoencoder(str(place / "vae"), "vae")
    parts = [part for shard in x.split(10) for part in shard.split(BATCH)]
    with torch.no_grad():
        return torch.cat([vae.encode(part).latent_dist.parameters for part in parts])


def test_shards_hold_the_moments(place: Path):
    samples, x = sources(place)
    encoded = read_samples(place / "whole")
    assert [s["__key__"] for s in encoded] == [s["__key__"] for s in samples]
    assert [s["cls"] for s in encoded] == [s["cls"] for s in samples]
    assert payloads([k for k in encoded[0] if k[0] != "_"], "the first")[0] == "npy"
    plain, flipped = (torch.stack([s[key] for s in encoded]) for key in ("npy", "flip.npy"))
    assert plain.shape == (30, 8, 8, 8)
    assert torch.equal(plain, reference_moments(place, x).half())
    assert torch.equal(flipped, reference_moments(place, x.flip(-1)).half())
    assert not torch.equal(flipped, plain.flip(-1))
    names = {path.name for path in (place / "whole").iterdir() if path.suffix != ".npz"}
    shards = {f"train-{i:06d}.tar" for i in range(3)}
    assert names == shards | {"index.json", "latents.json", "classes.txt", ".locks"}


def test_statistics_are_those_of_all_stored_moments(place: Path):
    about = json.loads((place / "whole" / "latents.json").read_text())
    encoded = read_samples(place / "whole")
    moments = torch.stack([s[key] for s in encoded for key in ("npy", "flip.npy")]).double()
    mean, log_variance = moments.transpose(0, 1).flatten(1).chunk(2)
    variance = mean.var(1, correction=0) + log_variance.exp().mean(1)
    stored = {key: torch.tensor(about["statistics"][key]).double() for key in ("mean", "std")}
    torch.testing.assert_close(stored["mean"], mean.mean(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(stored["std"], variance.sqrt(), rtol=1e-5, atol=0)
    together = (mean.var(correction=0) + log_variance.exp().mean()).sqrt().item()
    assert about["statistics"]["std_of_all"] == pytest.approx(together, rel=1e-5)
    assert about["statistics"]["count"] == 60 * 8 * 8
    assert (about["images"], about["latent_shape"]) == (30, [4, 8, 8])


def test_training_gets_unit_variance_and_evaluation_the_same_autoencoder(place: Path):
    """What a run does: read, sample, normalize; and decode back to the images' latents."""
    path = place / "whole" / "latents.json"
    autoencoder = StableDiffusionVAE(str(place / "vae"), statistics=str(path))
    [(where, made)] = latents_beside([f"{place}/whole/train-000000.tar"], Storage()).items()
    autoencoder.load()
    autoencoder.check(made, where)
    encoded = read_samples(place / "whole")
    moments = torch.stack([s[key] for s in encoded for key in ("npy", "flip.npy")])
    x = torch.cat([autoencoder.encode(moments) for _ in range(20)])
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(4), rtol=0, atol=0.02)
    torch.testing.assert_close(x.std((0, 2, 3)), torch.ones(4), rtol=0.02, atol=0)
    images = autoencoder.decode(autoencoder.encode(moments[:, :4]))
    assert images.shape == (60, 3, 16, 16)
    assert images.dtype == torch.uint8


def test_bfloat16_without_flips(place: Path, tmp_path: Path):
    encode(place, tmp_path / "new", "--dtype", "bfloat16", "--no-flip")
    encoded = read_samples(tmp_path / "new")
    assert {key for key in encoded[0] if key[0] != "_"} == {"bf16.npy", "cls"}
    moments = torch.stack([s["bf16.npy"] for s in encoded])
    _, x = sources(place)
    assert moments.dtype == torch.bfloat16
    assert torch.equal(moments, reference_moments(place, x).bfloat16())


def test_lower_precision_is_close(place: Path, tmp_path: Path):
    encode(place, tmp_path / "new", "--precision", "bfloat16")
    pairs = zip(read_samples(tmp_path / "new"), read_samples(place / "whole"), strict=True)
    off = torch.stack([(a["npy"].float() - b["npy"].float()) for a, b in pairs])
    assert 0 < off.abs().max() < 0.2


def test_parts_make_the_whole(place: Path, tmp_path: Path, capsys):
    encode(place, tmp_path, "--part", "2/2")
    assert [path.name for path in tmp_path.glob("*.tar")] == ["train-000001.tar"]
    assert "2 of 3 shards are missing, such as train-000000.tar" in capsys.readouterr().out
    assert not (tmp_path / "index.json").exists()
    with pytest.raises(ValueError, match="must be of shards that are all encoded"):
        StableDiffusionVAE(statistics=str(tmp_path / "latents.json"))
    encode(place, tmp_path, "--part", "1/2")
    assert "3 shards, 30 images, each also mirrored" in capsys.readouterr().out
    assert contents(tmp_path) == contents(place / "whole")


def test_a_restart_redoes_what_is_not_whole(place: Path, tmp_path: Path, capsys):
    encode(place, tmp_path)
    last = tmp_path / "train-000002.tar"
    last.write_bytes(last.read_bytes()[:-1000])
    for name in ("train-000002.tar", "train-000002.table.npz", "latents.json"):
        (tmp_path / f"{name}.123.partial").touch()
    before = (tmp_path / "train-000000.tar").stat().st_mtime_ns
    capsys.readouterr()
    encode(place, tmp_path)
    assert "2 of 3 shards are written already\nencoded 1 shards" in capsys.readouterr().out
    assert (tmp_path / "train-000000.tar").stat().st_mtime_ns == before
    assert contents(tmp_path) == contents(place / "whole")


def fails(place: Path, output: Path, *options: object, message: str) -> None:
    """With one line, and nothing written that was not there."""
    with pytest.raises(SystemExit, match=f"^error: {message}[^\n]*$"):
        encode(place, output, *options)
    assert list(output.glob("*.partial")) == []


def test_other_settings_need_another_folder(place: Path, tmp_path: Path):
    before = contents(place / "whole")
    refused = functools.partial(fails, place, place / "whole")
    refused("--dtype", "bfloat16", message="output=.*of dtype float16, now bfloat16 ")
    refused("--no-flip", message="output=.*of flip True, now False ")
    refused("--precision", "bfloat16", message="output=.*of precision float32, now bfloat16 ")
    refused("--batch-size", BATCH + 1, message=f"output=.*of batch_size {BATCH}, now {BATCH + 1} ")
    other = save_vae(tmp_path / "other", seed=1)
    refused("--autoencoder", other, message="output=.*of weights .{64}, now .{64} ")
    write_images(tmp_path / "images", shards=1)
    with pytest.raises(SystemExit, match="output=.*of source_shards 3, now 1; source_digest"):
        encode_latents(tmp_path / "images" / "*.tar", *arguments(place, place / "whole")[1:])
    assert contents(place / "whole") == before
    message = "output=.*must be empty or hold a latents.json; it holds other shards"
    fails(place, place / "images", message="output=.*must not be the folder of the images")
    (tmp_path / "x.tar").touch()
    fails(place, tmp_path, message=message)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--autoencoder", "/none"], "autoencoder=/none: must be an existing folder"),
        (["--batch-size", 0], "batch_size=0: must be at least 1"),
        (["--processes", 0], "processes=0: must be at least 1"),
        (["--max-broken", 1], r"max_broken=1.0: must be in \[0, 1\)"),
        (["--part", "3/2"], "part=3/2: must be I/N"),
        (["--devices", "tpu"], "devices=tpu: must be auto, cpu or a number of GPUs"),
        (["--devices", 99], "devices=99: must be at most"),
    ],
)
def test_errors_of_the_command(place: Path, tmp_path: Path, options: list, message: str):
    fails(place, tmp_path / "new", *options, message=message)
    assert not (tmp_path / "new").exists()


def write_shard(path: Path, *images: tuple[str, bytes]) -> None:
    with ShardWriter(path) as writer:
        for number, (kind, content) in enumerate(images):
            writer.write(f"k{number}", number, **{kind: content})


def test_sources_that_cannot_be_encoded(place: Path, tmp_path: Path):
    """Each names the shard and the sample."""
    shard, pixels = tmp_path / "a.tar", torch.zeros(16, 16, 3, dtype=torch.uint8).numpy()
    good = ("png", encoded_image(pixels, "png"))

    def message(*options: object, vae: Path = place / "vae") -> str:
        output = tmp_path / f"of {vae.name}"
        common = ["--autoencoder", vae, "--output", output, *options]
        with pytest.raises(SystemExit, match="^error: [^\n]*$") as caught:
            encode_latents(tmp_path / "*.tar", *common)
        assert list(output.glob("*.tar*")) == []
        return str(caught.value)

    assert "source=" in message()
    write_shard(shard, ("png", encoded_image(pixels[:15], "png")))
    assert "multiples of 2, the factor of" in message()
    assert "they are 15x16" in message()
    write_shard(shard, good, ("png", encoded_image(pixels[:14], "png")))
    assert f"source={shard}: must hold images of 16x16 pixels, as the first one; k1" in message()
    write_shard(shard, good, ("npy", b"0"))
    assert f"shard={shard}: must hold images (png, " in message()
    write_shard(shard, good, ("png", good[1][:45]), good)
    assert f"max_broken=0: image k1 of {shard} cannot be decoded" in message()
    assert f"max_broken=0.3: 1 of 3 images of {shard}" in message("--max-broken", 0.3)
    content = shard.read_bytes()
    shard.write_bytes(content[:-1024])
    assert f"shard={shard}: must be as long as when it was written" in message()
    (tmp_path / "a.table.npz").unlink()
    shard.write_bytes(content[:1000])
    assert f"shard={shard}: must be a whole tar" in message()
    write_shard(shard, good)
    huge = Path(save_vae(tmp_path / "huge"))
    vae = load_autoencoder(str(huge), "vae")
    vae.quant_conv.bias.data[0] = 1e5
    vae.save_pretrained(huge)
    assert f"dtype=float16: must hold the moments of image k0 of {shard}" in message(vae=huge)


def test_compressed_sources(place: Path, tmp_path: Path):
    """The same latents; one that is cut off is refused, though what is left could be read."""
    for path in (place / "images").glob("*.tar"):
        (tmp_path / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
    common = ["--autoencoder", place / "vae", "--batch-size", BATCH, "--output", tmp_path / "new"]
    last = tmp_path / "train-000002.tar.gz"
    content = last.read_bytes()
    last.write_bytes(content[:-2000])
    with pytest.raises(SystemExit, match=f"^error: shard={last}: must be a whole tar "):
        encode_latents(tmp_path / "*.gz", *common)
    last.write_bytes(content)
    encode_latents(tmp_path / "*.gz", *common)
    for shard in (place / "whole").glob("*.tar"):
        assert (tmp_path / "new" / shard.name).read_bytes() == shard.read_bytes()


def test_a_source_that_has_changed_is_named(place: Path, tmp_path: Path):
    """Its shard is not kept as if it were of the new one, nor overwritten."""
    urls = write_images(tmp_path / "images", shards=1)
    common = ["--autoencoder", place / "vae", "--output", tmp_path / "new"]
    encode_latents(urls, *common)
    before = contents(tmp_path / "new")
    write_images(tmp_path / "images", shards=1, rows=30)
    with pytest.raises(SystemExit, match="output=.*train-000000.tar: must be of .*delete it to"):
        encode_latents(urls, *common)
    assert contents(tmp_path / "new") == before
    (tmp_path / "new" / "train-000000.tar").unlink()
    encode_latents(urls, *common)
    assert len(read_samples(tmp_path / "new")) == 30


def test_broken_images_are_left_out_and_counted(place: Path, tmp_path: Path, capsys):
    pixels = torch.zeros(16, 16, 3, dtype=torch.uint8).numpy()
    good = ("png", encoded_image(pixels, "png"))
    write_shard(tmp_path / "a.tar", good, ("png", good[1][:45]), good)
    common = ["--autoencoder", place / "vae", "--output", tmp_path / "new"]
    encode_latents(tmp_path / "*.tar", *common, "--max-broken", 0.4)
    assert "left out: 1 images" in capsys.readouterr().out
    assert [s["__key__"] for s in read_samples(tmp_path / "new")] == ["k0", "k2"]
    assert json.loads((tmp_path / "new" / "latents.json").read_text())["broken"] == 1
