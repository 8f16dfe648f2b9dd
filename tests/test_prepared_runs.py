"""From images to a run: CIFAR-10 and a messy folder, on one and two processes."""

import io
from pathlib import Path

import numpy as np
import pytest
from conftest import shared
from image_folders import encode, noise, preparer
from PIL import Image
from test_resume import checkpoint

SMALL = ["--data.prepare=null", "--data.num_workers=2", "--trainer.max_steps=4"]
SMALL += ["--trainer.val_check_interval=4", "--data.num_generated=16", "--data.batch_size=8"]
SMALL += ["--model.generation_block=8", "--model.sampler.init_args.steps=2"]
SMALL += ["--model.objective.init_args.total_steps=4", "--checkpoint.every_n_train_steps=4"]
SMALL += ["--model.network.init_args.hidden_size=32", "--model.network.init_args.depth=2"]
GRID = "[{class_path: w2s_train.callbacks.SampleGrid, init_args: {num_images: 16, columns: 4}}]"


def processes(number: int) -> list[str]:
    several = ["--trainer.strategy=ddp_fork"] if number > 1 else []
    return [f"--trainer.devices={number}", "--trainer.accelerator=cpu", *several]


def messy_folder(folder: Path) -> None:
    """Three classes of odd files, sixty of them sound and three broken."""
    for i in range(60):
        path = folder / f"class {i % 3}" / f"sub{i % 2}" / f"image {i}"
        path.parent.mkdir(parents=True, exist_ok=True)
        shape = (20 + i % 7, 33 - i % 5)
        exif = Image.Exif()
        exif[0x0112] = 1 + i % 8
        content, suffix = [
            (encode(noise(*shape, 3, seed=i), "jpeg", exif=exif), ".jpg"),
            (encode(noise(*shape, seed=i)), ".PNG"),
            (encode(Image.fromarray(noise(*shape, 4, seed=i), "CMYK"), "jpeg"), ".jpeg"),
            (encode(noise(*shape, 4, seed=i), "webp"), ".webp"),
            (encode(noise(*shape, seed=i).astype(np.uint16) * 257), ".png"),
        ][i % 5]
        path.with_name(path.name + suffix).write_bytes(content)
    for i, content in enumerate((b"", b"text", encode(noise(40, 40, 3))[:900])):
        (folder / "class 1" / f"broken{i}.png").write_bytes(content)


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, pytest.param(2, marks=pytest.mark.long)])
def test_a_messy_folder(command, tmp_path: Path, monkeypatch, capsys, number: int):
    messy_folder(tmp_path / "raw")
    options = ("--size", 16, "--per-shard", 25, "--max-broken", 0.1, "--processes", 2)
    said = preparer(monkeypatch, capsys)(
        "folder", tmp_path / "raw", "--output", tmp_path / "data", *options
    )
    assert "3 broken images skipped" in said
    data = [f"--data.train_urls={tmp_path}/data/train-*.tar", "--data.num_classes=3"]
    network = ["--model.network.init_args.input_size=16", "--model.network.init_args.in_channels=3"]
    network += ["--model.network.init_args.num_classes=3", f"--trainer.callbacks={GRID}"]
    overlay = ["--data=configs/data/images.yaml", *data, *network, *SMALL, *processes(number)]
    folder = command("fit", *overlay)
    assert checkpoint(folder)["progress"]["images_seen"] == 4 * 8 * number
    grid = Image.open(io.BytesIO((folder / "grids" / "step-000004.png").read_bytes()))
    assert grid.mode == "RGB" and min(grid.size) >= 4 * 16


@pytest.mark.slow
@pytest.mark.parametrize("number", [pytest.param(1, marks=pytest.mark.long), 2])
def test_cifar10(command, tmp_path: Path, monkeypatch, capsys, number: int):
    """Real images from other people's shards, scored with the shared classifier."""
    source = shared("data/cifar10/test-000000.tar.gz")
    weights = shared("features/cifar10_classifier.safetensors")
    output = tmp_path / "cifar10"
    prepare = preparer(monkeypatch, capsys)
    prepare("shards", source, "--output", output, "--split", "test", "--processes", 1)
    urls = [f"--data.train_urls={output}/test-000000.tar", "--data.in_memory=false"]
    score = "[{class_path: w2s_train.callbacks.FID, init_args: {reference: %s, features: "
    score += (
        "{class_path: w2s_train.features.ClassifierFeatures, init_args: {weights: %s, network: "
    )
    score += "{class_path: w2s_train.features.CIFAR10Classifier}, dataset: cifar10}}}}]"
    callbacks = f"--trainer.callbacks={score % (output / 'reference.npz', weights)}"
    options = [*urls, callbacks, *SMALL, *processes(number)]
    command("reference", *options, config="cifar10_w2s", tiny=False)
    folder = command("fit", *options, config="cifar10_w2s", tiny=False)
    assert checkpoint(folder)["progress"]["images_seen"] == 4 * 8 * number
    assert '"fd_cifar10' in (folder / "scores.json").read_text()
