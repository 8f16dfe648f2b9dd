"""data/prepare.py on folders: what it writes and says, mistakes, and runs that are cut short."""

import errno
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds
from conftest import ROOT
from filelock import FileLock
from image_folders import (
    BROKEN,
    SCRIPT,
    encode,
    noise,
    pixels,
    preparer,
    samples,
    write_messy,
    written,
)
from PIL import Image

import w2s_train.prepare.engine
import w2s_train.prepare.images
from w2s_train.errors import UserError
from w2s_train.prepare.sources import ImageFolder
from w2s_train.shards.samples import read_shard


@pytest.fixture
def prepare(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    return preparer(monkeypatch, capsys)


@pytest.fixture
def messy(tmp_path: Path) -> Path:
    write_messy(tmp_path / "raw")
    return tmp_path / "raw"


def test_folder(prepare, messy: Path, tmp_path: Path):
    out = tmp_path / "out"
    options = ("--size", 16, "--per-shard", 5, "--max-broken", 0.5, "--output", out)
    printed = prepare("folder", messy, *options)
    assert (out / "classes.txt").read_text() == "ant\nbee\ncow\n"
    found = samples(out)
    assert len(found) == 12 and len({sample["__key__"] for sample in found}) == 12
    assert sorted(int(sample["cls"]) for sample in found) == [0] * 4 + [1] * 4 + [2] * 4
    for sample in found:
        image = Image.open(io.BytesIO(sample["png"]))
        assert image.mode == "RGB" and image.size == (16, 16)
    ready = (messy / "cow/ready.png").read_bytes()
    assert sum(sample["png"] == ready for sample in found) == 1
    listed = (out / "train.skipped.txt").read_text().splitlines()
    reasons = dict(line.split("\t") for line in listed)
    assert reasons.keys() == {f"cow/{name}" for name in (*BROKEN, "gone.png")}
    assert reasons["cow/gone.png"] == "No such file or directory"
    index = json.loads((out / "index.json").read_text())["shards"]
    assert sum(shard["samples"] for shard in index.values()) == 12 and len(index) == 4
    for line in ("4 train shards, 12 images", "3 classes of 4 to 4", "1 images as they were"):
        assert line in printed
    assert "8 broken images skipped" in printed and "5 ignored" in printed
    assert len(list(wds.WebDataset(sorted(map(str, out.glob("*.tar"))), shardshuffle=False))) == 12


def test_folder_as_it_is(prepare, messy: Path, tmp_path: Path):
    """Without a size: files that need no change are in the shards, byte for byte.

    One that says that it is turned is none of these: who reads the shard would turn it.
    """
    out = tmp_path / "out"
    prepare("folder", messy, "--max-broken", 0.5, "--exif", "ignore", "--output", out)
    fields = {sample["__key__"]: set(sample) - {"__key__", "cls"} for sample in samples(out)}
    contents = {sample[field] for sample in samples(out) for field in fields[sample["__key__"]]}
    for name in ("ant/a.PNG", "ant/b.jpeg", "bee/c.webp", "cow/ready.png"):
        assert (messy / name).read_bytes() in contents
    turned = np.asarray(Image.open(messy / "cow/turned.jpg"))
    assert any(np.array_equal(pixels(content), turned) for content in contents)
    assert sorted(field for each in fields.values() for field in each) == ["jpg"] + ["png"] * 10 + [
        "webp"
    ]


@pytest.mark.slow
def test_processes_do_not_matter(prepare, messy: Path, tmp_path: Path):
    options = ("--size", 8, "--per-shard", 3, "--max-broken", 1)
    for processes in (1, 3):
        out = tmp_path / str(processes)
        prepare("folder", messy, *options, "--processes", processes, "--output", out)
    assert written(tmp_path / "1") == written(tmp_path / "3")
    prepare("folder", messy, *options, "--shuffle-seed", 1, "--output", tmp_path / "other")
    labels = [[s["cls"] for s in samples(tmp_path / name)] for name in ("1", "other")]
    assert labels[0] != labels[1] and sorted(labels[0]) == sorted(labels[1])


def test_restart(prepare, messy: Path, tmp_path: Path):
    """Whatever is missing is written, nothing else; skipped images stay known."""
    out = tmp_path / "out"
    options = ("folder", messy, "--size", 8, "--per-shard", 3, "--max-broken", 1, "--output", out)
    prepare(*options)
    before = written(out)
    (out / "train-000001.table.npz").unlink()
    (out / "train-000002.tar").write_bytes(before["train-000002.tar"][:1000])
    (out / "train-000003.tar.99.partial").write_bytes(b"left")
    (out / "index.json").unlink()
    (out / "train.skipped.txt").unlink()
    kept = {
        name: (out / name).stat().st_mtime_ns for name in ("train-000000.tar", "train-000003.tar")
    }
    printed = prepare(*options)
    assert written(out) == before
    assert all((out / name).stat().st_mtime_ns == then for name, then in kept.items())
    assert "5 shards were there" in printed and "8 broken images skipped" in printed


def test_failing_disk(prepare, messy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """It ends the run: its images are not broken, and are there the next time."""
    options = ("folder", messy, "--per-shard", 3, "--max-broken", 1, "--output", tmp_path / "out")
    with monkeypatch.context() as patch:

        def fail(self: ImageFolder, index: int) -> bytes:
            raise OSError(errno.EIO, "Input/output error", self.files[index])

        patch.setattr(ImageFolder, "content", fail)
        with pytest.raises(OSError, match="Input/output error: '"):
            prepare(*options)
    assert not list((tmp_path / "out").glob("*.tar*"))
    assert "12 images" in prepare(*options)


def test_too_many_broken_images(prepare, messy: Path, tmp_path: Path):
    """An error that names one and the share; allowing more then redoes nothing."""
    options = ("folder", messy, "--size", 8, "--output", tmp_path / "out")
    with pytest.raises(
        UserError, match=r"max_broken=0.01: 8 of 20 images are broken, such as cow/"
    ):
        prepare(*options)
    assert not (tmp_path / "out/index.json").exists()
    assert "1 shards were there" in prepare(*options, "--max-broken", 0.4)


CHANGES = {
    "size 8, not 4": ("--size", 4),
    "mode RGB, not L": ("--mode", "L"),
    "format png, not jpg": ("--format", "jpg"),
    "exif True, not False": ("--exif", "ignore"),
    "per_shard 1000, not 7": ("--per-shard", 7),
    "shuffle_seed 0, not 1": ("--shuffle-seed", 1),
}


def test_other_settings_are_refused(prepare, messy: Path, tmp_path: Path):
    out = tmp_path / "out"
    options = ("folder", messy, "--size", 8, "--max-broken", 1, "--output", out)
    prepare(*options)
    before = written(out)
    for difference, change in CHANGES.items():
        with pytest.raises(UserError, match=f"made with {difference}.*another --output"):
            prepare(*options, *change)
    (messy / "ant/new.png").write_bytes(encode(noise(4, 4, 3)))
    with pytest.raises(UserError, match="items 20, not 21.*|other files"):
        prepare(*options)
    with pytest.raises(UserError, match="must name the same classes; it has 3, these are 4"):
        (messy / "dog").mkdir()
        prepare(*options, "--split", "val")
    assert written(out) == before


def test_odd_names(prepare, tmp_path: Path):
    """File names that are no UTF-8, and classes without images."""
    raw, out = tmp_path / "raw", tmp_path / "out"
    for name in ("b c", "é", "empty"):
        (raw / name).mkdir(parents=True)
    (raw / "b c" / os.fsdecode(b"\xff.png")).write_bytes(b"")
    (raw / "é" / "a.png").write_bytes(encode(noise(4, 4)))
    printed = prepare("folder", raw, "--max-broken", 1, "--mode", "auto", "--output", out)
    assert (out / "classes.txt").read_bytes() == "b c\nempty\né\n".encode()
    assert (out / "train.skipped.txt").read_bytes() == b"b c/\xff.png\tempty file\n"
    assert "no image: b c, empty" in printed
    assert [(s["cls"], pixels(s["png"]).ndim) for s in samples(out)] == [(b"2", 2)]


def test_one_run_at_a_time(prepare, messy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Of a split; another split of the same folder may be written meanwhile."""
    monkeypatch.setattr(w2s_train.prepare.images, "LOCK_SECONDS", 0.1)
    options = ("folder", messy, "--max-broken", 1, "--output", tmp_path / "out")
    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out/.train.lock"):
        prepare(*options, "--split", "other")
        with pytest.raises(UserError, match="another run is writing train"):
            prepare(*options)
    assert not list((tmp_path / "out").glob("train*"))


# ---- mistakes

MISTAKES = {
    "folder=nope: must be an existing folder": ("folder", "nope"),
    "folder=flat: must hold one sub-folder per class": ("folder", "flat"),
    "folder=hollow: must hold images": ("folder", "hollow"),
    "size=0: must be at least 1": ("folder", "ok", "--size", 0),
    "per_shard=0": ("folder", "ok", "--per-shard", 0),
    "processes=0": ("folder", "ok", "--processes", 0),
    "shuffle_seed=-1": ("folder", "ok", "--shuffle-seed", -1),
    "shuffle_seed=4294967296": ("folder", "ok", "--shuffle-seed", 2**32),
    "split=a-b": ("folder", "ok", "--split", "a-b"),
    "quality=9: must come with --format jpg": ("folder", "ok", "--quality", 9),
    "quality=101": ("folder", "ok", "--quality", 101, "--format", "jpg"),
    "max_broken=2.0": ("folder", "ok", "--max-broken", 2),
    "reference=no.yaml: must be an existing config": ("folder", "ok", "--reference", "no.yaml"),
    "output=ok/out: must not lie in the folder": ("folder", "ok", "--output", "ok/out"),
    "output=flat/a.png: must be a folder": ("folder", "ok", "--output", "flat/a.png"),
    "split=val: must be one of train, test": (
        "torchvision",
        "MNIST",
        "--root",
        ".",
        "--split",
        "val",
    ),
    "root=flat: must hold CIFAR10; --download fetches it": (
        "torchvision",
        "CIFAR10",
        "--root",
        "flat",
    ),
    "root=flat: must hold ImageNet": ("torchvision", "ImageNet", "--root", "flat"),
    "download: not for ImageNet": ("torchvision", "ImageNet", "--root", "flat", "--download"),
}


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes(prepare, tmp_path: Path, message: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for name in ("flat", "hollow/a", "ok/a"):
        Path(name).mkdir(parents=True)
    for name in ("flat/a.png", "ok/a/a.png"):
        Path(name).write_bytes(encode(noise(4, 4)))
    args = MISTAKES[message]
    output = () if "--output" in args else ("--output", "out")
    with pytest.raises(UserError) as caught:
        prepare(*args, *output)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)
    assert not Path("out").exists()


# ---- runs that are cut short


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """Forty images that take a while."""
    ramp = np.add.outer(np.arange(1100), np.arange(1100)) // 9
    content = encode(np.stack([ramp, ramp[::-1], ramp[:, ::-1]], 2).astype(np.uint8), "jpeg")
    for i in range(40):
        path = tmp_path / "raw" / "ab"[i % 2] / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / "raw"


def start(raw: Path, out: Path) -> tuple[subprocess.Popen, list[str]]:
    """The command in a group of its own, and what it was, once it has finished three shards."""
    options = ["--size", "550", "--per-shard", "2", "--processes", "2", "--output", str(out)]
    args = ["folder", str(raw), *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), *args],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while len(list(out.glob("*.npz"))) < 3:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    return process, args


def group_ends(group: int) -> bool:
    for _ in range(100):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


def children(process: int) -> list[int]:
    return [
        int(pid) for pid in Path(f"/proc/{process}/task/{process}/children").read_text().split()
    ]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["kill", "interrupt", "terminate", "worker"])
def test_cut_short(prepare, large: Path, tmp_path: Path, how: str):
    """Finished shards stay, none is half there, nobody is left, and the rest comes the same."""
    out = tmp_path / "out"
    process, args = start(large, out)
    began = time.monotonic()
    if how == "kill":
        process.kill()
    elif how == "interrupt":
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of them
    elif how == "terminate":
        process.terminate()
    else:
        os.kill(random.choice(children(process.pid)), signal.SIGKILL)
    error = process.communicate(timeout=30)[1].splitlines()[-1]
    assert time.monotonic() - began < 10 and group_ends(process.pid)
    status = {"kill": -9, "interrupt": 130, "terminate": 143, "worker": 1}[how]
    message = {"worker": "error: processes=2: one of them was killed"}.get(how, "stopped: the same")
    assert process.returncode == status and (how == "kill" or error.startswith(message))
    finished = {p.name: p.stat().st_mtime_ns for p in out.glob("*.npz")}
    tars = [out / name.replace(".table.npz", ".tar") for name in finished]
    assert 3 <= len(tars) < 20 and not (out / "index.json").exists()
    assert how == "kill" or not list(out.glob("*.partial"))
    assert all(len(list(read_shard(path))) == 2 for path in out.glob("*.tar"))

    printed = prepare(*args)
    assert f"{len(finished)} shards were there" in printed
    assert all((out / name).stat().st_mtime_ns == then for name, then in finished.items())
    prepare(*args[:-1], tmp_path / "whole")
    assert written(out) == written(tmp_path / "whole")


@pytest.mark.slow
def test_command(tmp_path: Path):
    """As a user starts it: the summary, an error in one line, and no trainer is imported."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    (tmp_path / "raw/a").mkdir(parents=True)
    (tmp_path / "raw/a/x.png").write_bytes(encode(noise(4, 4, 3)))
    command = [sys.executable, "-X", "importtime", str(SCRIPT), "folder"]
    run = subprocess.run(
        [*command, str(tmp_path / "raw"), "--output", str(tmp_path / "out")],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0 and "1 train shards, 1 images" in run.stdout
    assert "shard" in run.stderr and " lightning" not in run.stderr
    run = subprocess.run(
        [sys.executable, str(SCRIPT), "folder", "nope", "--output", str(tmp_path / "out")],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1
    assert run.stderr == "error: folder=nope: must be an existing folder\n"


@pytest.mark.slow
def test_reference(prepare, digits: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The statistics are those of `lightning reference`, of this folder's data set and split."""
    from w2s_train.features.frechet import Reference

    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    path, config = tmp_path / "reference.npz", tmp_path / "config.yaml"
    text = Path("configs/digits_w2s.yaml").read_text()
    text = text.replace("data/digits/reference.npz", str(path))
    config.write_text(text.replace("data: data/", f"data: {ROOT}/configs/data/"))
    options = ("--split", "heldout", "--output", tmp_path / "mine", "--reference", config)
    prepare("shards", "data/digits/heldout-*.tar", *options)
    found, expected = Reference.load(path), Reference.load(ROOT / "data/digits/heldout.npz")
    np.testing.assert_allclose(found.moments.mu, expected.moments.mu, rtol=1e-6, atol=1e-9)
    assert (found.fingerprint["dataset"], found.fingerprint["split"]) == ("mine", "heldout")
