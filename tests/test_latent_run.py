"""Real images through a small autoencoder: trained on, decoded by it, and scored."""

import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT
from vae import encode_latents, save_vae

from w2s_train.autoencoder import load_autoencoder
from w2s_train.module import DiffusionModule


@pytest.mark.slow
def test_latents_are_trained_on_decoded_and_scored(command, tmp_path: Path):
    vae = save_vae(tmp_path / "vae", in_channels=1, out_channels=1)
    encoding = ["--autoencoder", vae, "--output", tmp_path / "latents"]
    encode_latents(ROOT / "data/digits/train-00000[0-1].tar", *encoding)
    arguments = {"path": vae, "statistics": str(tmp_path / "latents" / "latents.json")}
    autoencoder = {"class_path": "w2s_train.autoencoder.StableDiffusionVAE"}
    network = {"init_args": {"input_size": 4, "in_channels": 4}}
    model = {"network": network, "autoencoder": autoencoder | {"init_args": arguments}}
    data = {"train_urls": str(tmp_path / "latents" / "train-*.tar"), "prepare": None}
    overlay = tmp_path / "latents.yaml"
    overlay.write_text(yaml.safe_dump({"model": model, "data": data | {"dataset": "digits"}}))
    folder = command("fit", "-c", str(overlay))
    scores = json.loads((folder / "scores.json").read_text())
    assert [score["step"] for score in scores] == [3, 6]
    assert all(math.isfinite(score["value"]) for score in scores)
    path = folder / "checkpoints" / "last.ckpt"
    module = DiffusionModule.load_from_checkpoint(path, map_location="cpu", weights_only=True)
    images = module.generate([1, 2, 3], [4, 5, 6])
    assert images.shape == (3, 1, 8, 8)
    other = save_vae(tmp_path / "other", seed=1, in_channels=1, out_channels=1)
    urls = f"{tmp_path}/{{latents,latents}}/train-00000*.tar"
    refused = [f"--model.autoencoder.init_args.path={other}", f"--data.train_urls={urls}"]
    with pytest.raises(SystemExit, match="must be the autoencoder that made the shards"):
        command("fit", "-c", str(overlay), *refused, folder="refused")
    assert not (tmp_path / "refused" / "metrics.csv").exists()
    # Other weights behind the same path would make other images of the same latents.
    module.autoencoder._loaded[0] = load_autoencoder(other, "vae")
    assert not torch.equal(module.generate([1, 2, 3], [4, 5, 6]), images)
