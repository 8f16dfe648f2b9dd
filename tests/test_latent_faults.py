"""data/encode_latents.py beside another run of it, on full disks, and on labels that are none."""

import gzip
import tarfile
from pathlib import Path

import numpy as np
import pytest
from image_folders import limited_files
from shard_files import add
from vae import contents, encode, encode_latents, encoded_image, save_vae, write_images

from w2s_train.errors import UserError
from w2s_train.prepare.engine import claim, remove_leftovers
from w2s_train.prepare.latents import Settings, Task, Workers


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small autoencoder and three shards of ten images."""
    folder = tmp_path_factory.mktemp("latents")
    save_vae(folder / "vae")
    write_images(folder / "images")
    return folder


def fails(place: Path, output: Path, message: str) -> None:
    with pytest.raises(SystemExit, match=f"^error: {message}[^\n]*$"):
        encode(place, output)


def test_two_runs_do_not_write_one_shard(place: Path, tmp_path: Path):
    """Neither is the open file of the first deleted, nor does the second go on without it."""
    target = tmp_path / "train-000001.tar"
    partial = tmp_path / "train-000001.tar.1.partial"
    with claim(target):
        partial.touch()
        fails(place, tmp_path, f"output={tmp_path}: another run is writing {target.name}")
        remove_leftovers(target)
        assert partial.exists()
    remove_leftovers(target)
    assert not partial.exists()
    encode(place, tmp_path)
    encode(place, tmp_path / "whole")
    assert contents(tmp_path) == contents(tmp_path / "whole")


@pytest.mark.slow
def test_ending_processes_leaves_the_shards_of_others(place: Path, tmp_path: Path):
    """A process that cannot have its shard is ended; what another run writes stays."""
    settings = Settings(str(place / "vae"), None, "float16", True, "float32", 4, 0.0, (16, 16))
    images = sorted((place / "images").glob("*.tar"))
    tasks = [Task(path, tmp_path / path.name) for path in images]
    partial = tmp_path / f"{images[0].name}.1.partial"
    with claim(tasks[0].target):
        partial.touch()
        with pytest.raises(UserError, match="another run is writing train-000000.tar"):
            with Workers(settings, ["cpu"]) as workers:
                list(workers.run(tasks))
        assert partial.exists()


def test_a_full_disk_names_the_shard(place: Path, tmp_path: Path):
    shard = tmp_path / "train-000000.tar"
    with limited_files(20_000):
        fails(place, tmp_path, f".*File too large: '{shard}'")
    assert list(tmp_path.glob("*.tar*")) == []


@pytest.mark.slow
def test_a_full_disk_under_a_process_names_the_shard(place: Path, tmp_path: Path):
    settings = Settings(str(place / "vae"), None, "float16", True, "float32", 4, 0.0, (16, 16))
    source = place / "images" / "train-000000.tar"
    task = Task(source, tmp_path / source.name)
    with limited_files(20_000), pytest.raises(OSError, match=f"File too large: '{task.target}'"):
        with Workers(settings, ["cpu"]) as workers:
            list(workers.run([task]))
    assert list(tmp_path.glob("*.tar*")) == []


def test_shards_cut_between_samples_of_whole_archives(place: Path, tmp_path: Path):
    """The compression is whole, the tar in it is not."""
    source = place / "images" / "train-000000.tar"
    with tarfile.open(source) as tar:
        end = tar.getmembers()[10].offset
    path = tmp_path / "a.tar.gz"
    path.write_bytes(gzip.compress(source.read_bytes()[:end]))
    common = ["--autoencoder", place / "vae", "--output", tmp_path / "new"]
    with pytest.raises(SystemExit, match=f"error: shard={path}: must be a whole tar .cut off"):
        encode_latents(path, *common)


@pytest.mark.parametrize(
    "label, rule",
    [("9" * 20, r"in \[0, 1048575\]"), ("-1", "at least 0"), ("cat", "a whole number")],
)
def test_labels_that_are_none(place: Path, tmp_path: Path, label: str, rule: str):
    path, image = tmp_path / "a.tar", encoded_image(np.zeros((16, 16), np.uint8), "png")
    with tarfile.open(path, "w") as tar:
        add(tar, "k.png", image)
        add(tar, "k.cls", label.encode())
    common = ["--autoencoder", place / "vae", "--output", tmp_path / "new"]
    with pytest.raises(SystemExit, match=f"error: label={label}: must be {rule}, in k.cls of"):
        encode_latents(path, *common)
