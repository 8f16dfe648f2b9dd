"""data/encode_latents.py beside another run of it, on full disks, and on labels that are none."""

import functools
import gzip
import tarfile
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from image_folders import limited_files
from shard_files import add
from vae import contents, encode, encode_latents, encoded_image, save_vae, write_images

from w2s_train.errors import UserError
from w2s_train.prepare.engine import Task, on_devices
from w2s_train.prepare.latents import Encoder, Settings


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


def lock(target: Path) -> FileLock:
    """That of a run which writes this shard."""
    (target.parent / ".locks").mkdir(exist_ok=True)
    return FileLock(target.parent / ".locks" / f"{target.name}.lock")


@pytest.mark.slow
def test_two_runs_do_not_write_one_shard(place: Path, tmp_path: Path):
    """Neither is the open file of the first deleted, nor does the second go on without it."""
    target = tmp_path / "train-000001.tar"
    partial = tmp_path / "train-000001.tar.1.partial"
    with lock(target):
        partial.touch()
        fails(place, tmp_path, f"output={tmp_path}: another run is writing {target.name}")
        assert partial.exists()
    encode(place, tmp_path)
    assert not partial.exists()
    encode(place, tmp_path / "whole")
    assert contents(tmp_path) == contents(tmp_path / "whole")


def in_a_process(place: Path, output: Path) -> None:
    """Encode as one of several devices does."""
    settings = Settings(str(place / "vae"), None, "float16", True, "float32", 4, 0.0, (16, 16))
    images = sorted((place / "images").glob("*.tar"))
    tasks = [Task(path, output / path.name, shared=True) for path in images]
    with on_devices(functools.partial(Encoder, settings), ["cpu"], tasks) as written:
        list(written)


@pytest.mark.slow
def test_ending_processes_leaves_the_shards_of_others(place: Path, tmp_path: Path):
    """A process that cannot have its shard is ended; what another run writes stays."""
    target = tmp_path / "train-000000.tar"
    partial = tmp_path / f"{target.name}.1.partial"
    with lock(target):
        partial.touch()
        with pytest.raises(UserError, match=f"another run is writing {target.name}"):
            in_a_process(place, tmp_path)
        assert partial.exists()


def test_a_full_disk_names_the_shard(place: Path, tmp_path: Path):
    shard = tmp_path / "train-000000.tar"
    with limited_files(20_000):
        fails(place, tmp_path, f".*File too large: '{shard}'")
    assert list(tmp_path.glob("*.tar*")) == []


@pytest.mark.slow
def test_a_full_disk_under_a_process_names_the_shard(place: Path, tmp_path: Path):
    shard = tmp_path / "train-000000.tar"
    with limited_files(20_000), pytest.raises(OSError, match=f"File too large: '{shard}'"):
        in_a_process(place, tmp_path)
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
