"""data/encode_latents.py killed, interrupted, and on several devices."""

import functools
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from vae import arguments, contents, encode, read_samples, write_images

from w2s_train.prepare.engine import Task, on_devices
from w2s_train.prepare.latents import Encoder, Settings


def start(place: Path, output: Path, *options: object) -> subprocess.Popen:
    """The command as a process, in a group of its own as a terminal does it."""
    command = [sys.executable, ROOT / "data/encode_latents.py", *arguments(place, output, *options)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(list(map(str, command)), env=environment, process_group=0, **pipes)


def wait_for_a_shard(process: subprocess.Popen, output: Path) -> set[str]:
    """Tables of the finished shards, one at least."""
    while not (done := {path.name for path in output.glob("*.table.npz")}):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    return done


@pytest.fixture(scope="module")
def long(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `place`, with shards that take a while."""
    folder = tmp_path_factory.mktemp("long")
    (folder / "vae").symlink_to(place / "vae")
    write_images(folder / "images", shards=4, rows=100, size=32)
    return folder


@pytest.mark.slow
def test_a_killed_command_goes_on(long: Path, tmp_path: Path):
    """Shards that were finished are kept; in the end every byte is that of an undisturbed run."""
    process = start(long, tmp_path)
    done = wait_for_a_shard(process, tmp_path)
    process.kill()
    process.communicate()
    assert len(done) < 4
    first = tmp_path / "train-000000.tar"
    before = first.stat().st_mtime_ns
    encode(long, long / "whole")
    encode(long, tmp_path)
    assert first.stat().st_mtime_ns == before
    assert contents(tmp_path) == contents(long / "whole")


@pytest.mark.slow
def test_two_processes_equal_one(place: Path, tmp_path: Path):
    """And the number of threads that the environment allows does not matter."""
    process = start(place, tmp_path, "--devices", "cpu", "--processes", 2)
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    assert "encoded 3 shards, 30 images" in output
    assert contents(tmp_path) == contents(place / "whole")


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("processes", [1, 2])
def test_an_interrupt_ends_at_once(long: Path, tmp_path: Path, processes: int):
    process = start(long, tmp_path, "--processes", processes)
    wait_for_a_shard(process, tmp_path)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does, to all of them
    began = time.monotonic()
    _, errors = process.communicate(timeout=20)
    assert time.monotonic() - began < 10
    assert process.returncode == 130, errors
    lines = [line for line in errors.splitlines() if line.strip() and "images/s" not in line]
    assert lines == ["stopped; the same command goes on with the shards that are missing"]
    assert list(tmp_path.glob("*.partial")) == []


@pytest.mark.slow
@pytest.mark.long
def test_a_dead_process_is_an_error(long: Path, tmp_path: Path):
    """As the kernel kills one when memory runs out; its neighbour is ended, too."""
    settings = Settings(str(long / "vae"), None, "float16", True, "float32", 1, 0.0, (32, 32))
    images = sorted((long / "images").glob("*.tar"))
    tasks = [Task(path, tmp_path / path.name, shared=True) for path in images]
    with (
        pytest.raises(ValueError, match="its process must live, but ended with code -9 at .*tar"),
        on_devices(functools.partial(Encoder, settings), ["cpu", "cpu"], tasks) as written,
    ):
        next(written)
        multiprocessing.active_children()[0].kill()
        list(written)
    assert not multiprocessing.active_children()
    assert list(tmp_path.glob("*.partial")) == []


@pytest.mark.gpu
def test_all_gpus_equal_the_cpu(place: Path, tmp_path: Path):
    """But for rounding."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    encode(place, tmp_path, "--devices", "auto")
    pairs = zip(read_samples(tmp_path), read_samples(place / "whole"), strict=True)
    for gpu, cpu in pairs:
        for field in ("npy", "flip.npy"):
            torch.testing.assert_close(gpu[field], cpu[field], rtol=2e-3, atol=2e-3)
