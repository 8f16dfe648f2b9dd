"""data/prepare.py where something is wrong: colours, cut shards, disks, signals, large folders."""

import errno
import gzip
import multiprocessing
import os
import signal
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from image_folders import encode, limited_files, noise, pixels, preparer, samples, write_tar
from shard_files import add

from w2s_train.errors import UserError
from w2s_train.prepare.engine import Progress, Task, Work, in_processes
from w2s_train.prepare.sources import ImageFolder
from w2s_train.shards import ShardWriter
from w2s_train.shards.samples import read_shard

GREY = {"png": encode(noise(4, 4)), "cls": b"1"}
COLOURED = {"png": encode(noise(4, 4, 3)), "cls": b"0"}


@pytest.fixture
def prepare(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    return preparer(monkeypatch, capsys)


# ---- the mode


def test_colours_behind_a_grey_image(prepare, tmp_path: Path):
    """Are lost only where the user says so."""
    source, out = write_tar(tmp_path / "a.tar", GREY, GREY, COLOURED), tmp_path / "out"
    options = ("shards", source, "--output", out)
    with pytest.raises(UserError, match="mode=auto: .* a.tar 002 is not; give --mode RGB .or L"):
        prepare(*options)
    assert "mode RGB: 1 images as they were, 2 converted" in prepare(*options, "--mode", "RGB")
    assert [pixels(s["png"]).shape for s in samples(out)] == [(4, 4, 3)] * 3
    printed = prepare(*options, "--mode", "L", "--split", "grey")
    assert "mode L: 2 images as they were, 1 converted" in printed
    assert [pixels(s["png"]).shape for s in samples(out, "grey")] == [(4, 4)] * 3


def test_a_grey_image_behind_colours(prepare, tmp_path: Path):
    source = write_tar(tmp_path / "a.tar", COLOURED, GREY)
    assert "mode RGB: 1 images as" in prepare("shards", source, "--output", tmp_path / "out")


# ---- shards that are cut off


def boundaries(path: Path) -> list[int]:
    """Where each of the three samples of a tar ends, in bytes; they have two members each."""
    with tarfile.open(path) as tar:
        starts = [member.offset for member in tar]
        return [starts[2], starts[4], tar.offset]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kept", [1, 2, 3])
def test_shards_cut_between_samples(prepare, tmp_path: Path, packed: bool, kept: int):
    """Are refused before the first sample: tarfile ends there without an error."""
    path = write_tar(tmp_path / "a.tar", GREY, GREY, GREY)
    content = path.read_bytes()[: boundaries(path)[kept - 1]]
    if packed:
        path = tmp_path / "a.tar.gz"
        content = gzip.compress(content)  # whole, but its tar is not
    path.write_bytes(content)
    message = f"shard={path}: must be a whole tar .cut off after 00"
    with pytest.raises(UserError, match=message):
        next(read_shard(path))
    with pytest.raises(UserError, match=message):
        prepare("shards", path, "--mode", "L", "--output", tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.tar*"))


@pytest.mark.parametrize("packed", [False, True])
def test_whole_shards(tmp_path: Path, packed: bool):
    """Of any length, also one that does not end on tar's usual blocks of 10,240 bytes."""
    path = write_tar(tmp_path / "a.tar", GREY, GREY, GREY)
    for length in (boundaries(path)[2] + 512, None):
        content = path.read_bytes()[:length]
        (tmp_path / "b.tar").write_bytes(gzip.compress(content) if packed else content)
        assert len(list(read_shard(tmp_path / "b.tar"))) == 3


def test_errors_of_tars_are_readable(tmp_path: Path):
    path = write_tar(tmp_path / "a.tar", GREY, GREY)
    path.write_bytes(path.read_bytes()[:2700])
    with pytest.raises(UserError, match=f"^shard={path}: must be a whole tar [^<>,]*$"):
        next(read_shard(path))


def test_a_sample_that_comes_twice(prepare, tmp_path: Path):
    """Is named with the file that has it, not one that is deleted by then."""
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for key in "aba":
            for kind, content in GREY.items():
                add(tar, f"{key}.{kind}", content)
    with pytest.raises(UserError, match=f"shard={path}: holds two members a.png"):
        prepare("shards", path, "--mode", "L", "--output", tmp_path / "out")
    target = tmp_path / "b.tar"
    with pytest.raises(UserError, match=f"shard={target}: holds two members same.") as caught:
        with ShardWriter(target) as writer:
            for _ in range(2):
                writer.write("same", 0, png=GREY["png"])
    assert "partial" not in str(caught.value) and not list(tmp_path.glob("b.*"))


@pytest.mark.parametrize("label", [2**63, -(2**63) - 1, 10**30])
def test_labels_that_no_table_holds(tmp_path: Path, label: int):
    target = tmp_path / "b.tar"
    message = f"label={str(label)[:20]}: must be below .* .sample a of {target}"
    with pytest.raises(UserError, match=message), ShardWriter(target) as writer:
        writer.write("a", label, png=GREY["png"])


# ---- disks


def test_a_full_disk_names_the_shard(prepare, tmp_path: Path):
    source = write_tar(tmp_path / "a.tar", *[COLOURED] * 40)
    shard = tmp_path / "out" / "train-000000.tar"
    with limited_files(20_000), pytest.raises(OSError, match=f"File too large: '{shard}'"):
        prepare("shards", source, "--output", tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.partial"))
    with limited_files(10), pytest.raises(OSError, match="too large: '.*train.preparation.json'"):
        prepare("shards", source, "--output", tmp_path / "out")


def test_a_failing_disk_names_the_image(prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Reading an open file fails without a name."""
    (tmp_path / "raw/a").mkdir(parents=True)
    (tmp_path / "raw/a/x.png").write_bytes(GREY["png"])

    def fail(self: ImageFolder, index: int) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(ImageFolder, "content", fail)
    with pytest.raises(OSError, match="Input/output error: 'a/x.png'"):
        prepare("folder", tmp_path / "raw", "--output", tmp_path / "out")


# ---- signals


@pytest.fixture
def at_fork() -> Iterator[list[int]]:
    """Signals that this process gets during its next fork."""
    numbers: list[int] = []

    def send() -> None:
        while numbers:
            os.kill(os.getpid(), numbers.pop())

    os.register_at_fork(before=send)
    yield numbers
    numbers.clear()


def write(work: Work, folder: Path) -> list[Progress]:
    """Three shards in two processes."""
    tasks = [Task(k, folder / f"{k}.tar", shared=False) for k in range(3)]
    with in_processes(work, 2, tasks) as written:
        return list(written)


class Nothing(Work):
    """Shards without a sample."""

    def write(self, source: int, writer: ShardWriter) -> Iterator[int]:
        yield 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_a_fork(tmp_path: Path, at_fork: list[int], number: int):
    """Python swallows an exception that a handler raises there; the run must not go on."""

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt(number)

    before, ended = signal.signal(number, stop), threading.Event()
    threading.Thread(target=ended.wait).start()  # signals may reach any thread
    at_fork.append(number)
    try:
        with pytest.raises(KeyboardInterrupt) as caught:
            write(Nothing(), tmp_path)
    finally:
        signal.signal(number, before)
        ended.set()
    assert caught.value.args == (number,)
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, [])
    assert not multiprocessing.active_children()


class Handled(Nothing):
    """Fails in a process that would not end when it is told to."""

    def write(self, source: int, writer: ShardWriter) -> Iterator[int]:
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [])
        wrong = signal.getsignal(signal.SIGINT) is not signal.SIG_IGN
        wrong |= signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        if blocked or wrong:
            raise UserError(f"blocked={blocked}")
        yield 1


def test_processes_let_signals_through(tmp_path: Path):
    written = write(Handled(), tmp_path)
    assert sum(progress.images for progress in written) == 3
    assert len(list(tmp_path.glob("*.tar"))) == sum(progress.shards for progress in written) == 3


class Mistaken(Nothing):
    """Has an error that nobody foresaw."""

    def write(self, source: int, writer: ShardWriter) -> Iterator[int]:
        yield 1 // source


def test_errors_of_processes_arrive(tmp_path: Path):
    """As they are, with the place where they were raised; nothing half done is left."""
    with pytest.raises(ZeroDivisionError) as caught:
        write(Mistaken(), tmp_path)
    assert "yield 1 // source" in "".join(caught.value.__notes__)
    assert not list(tmp_path.glob("*.partial")) and not (tmp_path / "0.tar").exists()
    assert not multiprocessing.active_children()


# ---- large folders


def test_folders_are_listed_with_few_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """One look at each file; on a file system of a cluster each takes a millisecond."""
    for number in range(50):
        path = tmp_path / "ab"[number % 2] / "deep" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(number))
    (tmp_path / "a/loop.png").symlink_to("loop.png")
    (tmp_path / "a/up").symlink_to("..")
    (tmp_path / "b/file.png").symlink_to("deep/7.png")
    os.mkfifo(tmp_path / "b/pipe.png")
    calls = []
    for name in ("realpath", "exists", "isfile", "lexists"):
        real = getattr(os.path, name)

        def counted(*args: object, real=real, **options: object) -> object:
            calls.append(args)
            return real(*args, **options)

        monkeypatch.setattr(os.path, name, counted)
    images = ImageFolder(tmp_path)
    # The folder, two classes (twice: with the folder above), a folder in each, and the loop.
    assert len(calls) == 4 + 3
    assert len(images.files) == 52 and images.ignored == 2
    assert np.bincount(images.labels).tolist() == [26, 26]
    assert {"a/loop.png", "b/file.png", "a/deep/0.png"} < set(images.files)
