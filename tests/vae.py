"""A small autoencoder on disk, images for it, and the command that encodes them."""

import io
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from sklearn.datasets import load_sample_images

from w2s_train.shards import ShardWriter
from w2s_train.shards.samples import decode_array, read_shard

FACTOR = 2  # of the autoencoder's downsampling
BATCH = 4  # images encoded at a time


def save_vae(folder: Path, seed: int = 0, **changes: Any) -> str:
    """Random weights and their config, as diffusers saves them."""
    diffusers = pytest.importorskip("diffusers", reason="needs the extra [latents]")
    options = dict(block_out_channels=(8, 16), latent_channels=4, norm_num_groups=4)
    options |= dict(down_block_types=("DownEncoderBlock2D",) * 2, layers_per_block=1)
    options |= dict(up_block_types=("UpDecoderBlock2D",) * 2)
    torch.manual_seed(seed)
    vae = diffusers.AutoencoderKL(**options | changes)
    vae.quant_conv.weight.data *= 3  # moments that differ from image to image
    vae.save_pretrained(folder)
    return str(folder)


def encoded_image(pixels: np.ndarray, kind: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def write_images(folder: Path, shards: int = 3, rows: int = 10, size: int = 16) -> str:
    """Crops of two photographs as PNG and JPEG, every fifth one grey; the pattern of the shards."""
    rng, photographs = np.random.default_rng(0), load_sample_images().images
    for shard in range(shards):
        with ShardWriter(folder / f"train-{shard:06d}.tar") as writer:
            for row in range(rows):
                top, left = rng.integers(0, 427 - size), rng.integers(0, 640 - size)
                pixels = photographs[row % 2][top : top + size, left : left + size]
                pixels = pixels[..., 1] if row % 5 == 4 else pixels
                kind = "jpeg" if row % 3 else "png"
                fields = {kind: encoded_image(pixels, kind)}
                writer.write(f"{shard}{row:05d}", row % 2, **fields)
    (folder / "classes.txt").write_text("temple\nflower\n")
    return str(folder / "train-*.tar")


def encode_latents(*arguments: object) -> None:
    """Run data/encode_latents.py in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["encode_latents.py", *map(str, arguments)])
        runpy.run_path(str(ROOT / "data/encode_latents.py"), run_name="__main__")


def read_samples(folder: Path) -> list[dict[str, Any]]:
    """All samples of a folder's shards, arrays decoded."""
    samples = [s for path in sorted(folder.glob("*.tar")) for s in read_shard(path)]
    return [
        {k: decode_array(v, k) if k.endswith("npy") else v for k, v in sample.items()}
        for sample in samples
    ]


def contents(folder: Path) -> dict[str, bytes]:
    """What every run of the command must repeat."""
    files = [path for path in folder.iterdir() if path.is_file() and path.suffix != ".npz"]
    return {path.name: path.read_bytes() for path in files}


def arguments(place: Path, output: Path, *options: object) -> list[object]:
    """Of the command, for the folder `place` with "vae" and "images"."""
    source = ["--autoencoder", place / "vae", "--output", output, "--batch-size", BATCH]
    return [place / "images" / "train-*.tar", *source, *options]


def encode(place: Path, output: Path, *options: object) -> None:
    """Run it in this process."""
    encode_latents(*arguments(place, output, *options))
