"""Worker processes whose batches do not come: too little shared memory, death, hangs, signals."""

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ROOT
from ranks import fork, wait
from shard_files import write_latents
from torch.utils.data import Dataset

from w2s_train.datamodule import ReferenceImages
from w2s_train.errors import INTERRUPTED, PREEMPTED, UserError
from w2s_train.shards import ShardBatches, workers
from w2s_train.shards.workers import Batches, Late, batches, check_room
from w2s_train.signals import REQUESTS

MEGABYTE = 2**20


class Items(Dataset):
    """Batches 0, 1, 2, ... which a function makes, in a worker."""

    def __init__(self, make: Callable[[int], Any]) -> None:
        self.make = make

    def __getitem__(self, number: int) -> Any:
        return self.make(number)


def loader(make: Callable[[int], Any], *, minutes: float = 1.0) -> Batches:
    return batches(Items(make), range(10), 2, minutes=minutes)


def second(action: Callable[[], Any]) -> Callable[[int], Any]:
    """Good batches, but for the second."""
    return lambda number: torch.full((3,), number) if number != 1 else action()


@pytest.fixture(autouse=True)
def requests() -> Iterator[None]:
    """Nothing was asked for, before and after."""
    REQUESTS.reset()
    yield
    REQUESTS.reset()


def fake_room(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    found = SimpleNamespace(f_bavail=free // 4096, f_frsize=4096)
    monkeypatch.setattr(workers.os, "statvfs", lambda path: found)


# ---- room ------------------------------------------------------------------------------------


def test_room_for_batches(monkeypatch: pytest.MonkeyPatch):
    """Two batches for each worker, and two more, for all processes of the machine."""
    fake_room(monkeypatch, 64 * MEGABYTE)
    check_room(6 * MEGABYTE, 4, 1)
    check_room(100 * MEGABYTE, 0, 8)
    with pytest.raises(UserError, match=r"data.num_workers=4: must be at most 3; /dev/shm.*") as no:
        check_room(7 * MEGABYTE, 4, 1)
    assert "67,108,864 bytes free" in str(no.value) and "--shm-size" in str(no.value)
    assert "need 74,530,816" in str(no.value)
    with pytest.raises(UserError, match=r"must be 0; .* 2 x 4 workers"):
        check_room(20 * MEGABYTE, 4, 2)


@pytest.mark.parametrize("missing", [True, False])
def test_no_shared_memory_at_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, missing: bool):
    """Or none that can be written."""
    monkeypatch.setattr(workers, "SHARED", str(tmp_path / "none" if missing else tmp_path))
    monkeypatch.setattr(workers.os, "access", lambda *_: False)
    check_room(1, 0, 1)
    with pytest.raises(UserError, match="data.num_workers=1: must be 0 without /.*workers pass"):
        check_room(1, 1, 1)


@pytest.mark.parametrize("reference", [False, True])
def test_a_run_looks_at_the_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference: bool):
    """From shape and type of what is stored: 64 x 4 x 32 x 32 in float16, and labels."""
    from test_stream import Process, module

    urls = write_latents(tmp_path, [5], (4, 32, 32))
    data = module(urls, Process(), num_workers=4, batch_size=64, generation_batch_size=64)
    asked: list[tuple[int, int, int]] = []
    monkeypatch.setattr("w2s_train.datamodule.check_room", lambda *about: asked.append(about))
    if reference:
        images = ReferenceImages(urls, data)
        images.trainer = data.trainer
        images.predict_dataloader()
    else:
        data.train_dataloader()
    assert asked == [(64 * 4 * 32 * 32 * 2, 4, 1)]


def in_small_memory(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """Run where /dev/shm has 64 MB, as in a container; skipped where that is not permitted."""
    mount = 'mount -t tmpfs -o size=64m tmpfs /dev/shm && exec "$@"'
    wrapped = ["unshare", "-m", "bash", "-c", mount, "-"]
    if not shutil.which("unshare") or subprocess.run([*wrapped, "true"], check=False).returncode:
        pytest.skip("/dev/shm cannot be replaced here")
    return subprocess.run(
        [*wrapped, *command], capture_output=True, text=True, timeout=120, check=False, **options
    )


LARGE = """
import sys, torch
sys.path[:0] = ["tests", "tests/faults"]
from test_workers import loader
try:
    for batch in loader(lambda number: torch.zeros(20 * 2**20, dtype=torch.uint8)):
        held = [batch] if "held" not in vars() else [*held, batch]
except Exception as error:
    print(type(error).__name__, error)
"""


@pytest.mark.slow
def test_a_batch_for_which_there_is_no_room():
    """The fourth of 20 MB in 64 MB: torch alone would drop it, and wait for it for ever."""
    begun = time.monotonic()
    done = in_small_memory([sys.executable, "-c", LARGE], cwd=ROOT)
    assert done.stdout.startswith("UserError data.num_workers"), done.stdout + done.stderr
    assert "/dev/shm has" in done.stdout and "--shm-size" in done.stdout
    assert time.monotonic() - begun < 60


@pytest.mark.slow
def test_a_fit_in_64_megabytes(digits: None, tmp_path: Path):
    """One line before anything is trained."""
    urls = write_latents(tmp_path, [50], (16, 128, 128))
    command = [sys.executable, "-m", "w2s_train", "fit", "-c", "tests/minimal.yaml"]
    command += ["--data.prepare=null", f"--data.train_urls={urls}", "--data.num_workers=4"]
    done = in_small_memory([*command, f"--trainer.default_root_dir={tmp_path}/run"], cwd=ROOT)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1, done.stderr
    assert last.startswith("error: data.num_workers=4: must be at most 2; /dev/shm"), done.stderr
    assert re.search(r"has 67,\d{3},\d{3} bytes free", last) and "Traceback" not in done.stderr


def test_workers_that_cannot_be_started(monkeypatch: pytest.MonkeyPatch):
    def fail(process: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr("multiprocessing.process.BaseProcess.start", fail)
    with pytest.raises(UserError, match="data.num_workers=2: must be fewer, .* cannot be started"):
        iter(loader(second(lambda: None)))


# ---- batches that do not come ----------------------------------------------------------------


def test_batches_come_in_order():
    assert [batch.tolist() for batch in loader(second(lambda: torch.ones(3)))][:3] == [
        [0, 0, 0],
        [1, 1, 1],
        [2, 2, 2],
    ]


def test_a_batch_that_cannot_be_passed_on():
    """Its reason comes in its place."""
    found = iter(loader(second(lambda: lambda: None)))
    next(found)
    with pytest.raises(UserError, match=r"data.num_workers=2: .* not pass a batch on \(.*lambda"):
        next(found)


@pytest.mark.parametrize("number", [signal.SIGBUS, signal.SIGKILL])
def test_a_worker_that_dies(number: signal.Signals):
    """Of too little shared memory, or of too little memory."""
    found = iter(loader(second(lambda: os.kill(os.getpid(), number))))
    with pytest.raises(UserError, match=r"data.num_workers=2: .*\(pid.*/dev/shm has [\d,]+ bytes"):
        list(found)


def test_a_batch_is_not_waited_for_for_ever():
    """Nor are the workers, which hear no signal but one."""
    found = iter(loader(second(lambda: time.sleep(60)), minutes=1.5 / 60))
    begun = time.monotonic()
    next(found)
    with pytest.raises(UserError, match=r"data.batch_timeout_minutes=0.025: .*/dev/shm"):
        next(found)
    del found
    assert 1.5 < time.monotonic() - begun < 10


def test_a_slow_batch_is_waited_for(monkeypatch: pytest.MonkeyPatch):
    """Also when the run is to stop, for a while."""
    monkeypatch.setattr(workers, "POLL", 0.1)
    slow = loader(second(lambda: time.sleep(1) or torch.ones(3)))
    REQUESTS.preempted = True
    assert len(list(slow)) == 10


@pytest.mark.parametrize("asked", ["preempted", "interrupted"])
def test_signals_are_heard(monkeypatch: pytest.MonkeyPatch, asked: str):
    monkeypatch.setattr(workers, "GRACE", 0.5)
    found = iter(loader(second(lambda: time.sleep(60))))
    next(found)
    threading.Timer(0.5, setattr, (REQUESTS, asked, True)).start()
    begun = time.monotonic()
    with pytest.raises(Late, match="told to stop; no batch came for") as stop:
        next(found)
    assert stop.value.status == (PREEMPTED if asked == "preempted" else INTERRUPTED)
    assert time.monotonic() - begun < 8


@pytest.mark.slow
@pytest.mark.fault("6   signal while no batch comes")
def test_a_stop_while_no_batch_comes(command, tmp_path: Path):
    """The run ends within seconds, as a run that was told to stop does, and loses no step."""

    def work() -> None:
        read = ShardBatches.__getitem__

        def stuck(self, positions):
            if positions.start >= 16 * 20:
                (tmp_path / "stuck").touch()
                time.sleep(600)
            return read(self, positions)

        ShardBatches.__getitem__ = stuck  # type: ignore[method-assign]
        command("fit", "--trainer.max_steps=1000", "--data.num_workers=1", "--trainer.callbacks=[]")

    child = fork(work, tmp_path / "log")
    while not (tmp_path / "stuck").exists():
        time.sleep(0.05)
    time.sleep(3)  # the batches before are used up
    begun = time.monotonic()
    os.kill(child, signal.SIGTERM)
    assert wait([child]) == [PREEMPTED], (tmp_path / "log").read_text()
    assert time.monotonic() - begun < 15
    assert (tmp_path / "run/checkpoints/last.ckpt").resolve().name == "step-000019.ckpt"
    assert "told to stop; no batch came" in (tmp_path / "log").read_text()
