"""Kills during a save, damaged files and full disks: rows 3, 4 and 5."""

import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from ranks import fork, wait
from test_resume import assert_same, checkpoint

from w2s_train import checkpoint_file as checkpointing
from w2s_train.checkpoint_file import damage, newest_first, point_to, read_file, write_checkpoint
from w2s_train.errors import UserError
from w2s_train.files import atomic_write
from w2s_train.running import checkpoint_io
from w2s_train.running.checkpoint_io import CheckpointFiles
from w2s_train.running.record import find_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.fault]


@pytest.fixture
def elsewhere(tmp_path: Path):
    """A folder on another file system than the temporary one."""
    memory = Path("/dev/shm")
    if not memory.is_dir() or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("no second file system at /dev/shm")
    folder = memory / f"w2s_{os.getpid()}"
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


def content(step: int) -> dict:
    return {"global_step": step, "weights": torch.full((500_000,), float(step))}


def test_kills_while_files_are_written(elsewhere: Path, tmp_path: Path, tally):
    """Row 3: files after files, killed at any moment: the newest is whole, one save is lost."""
    rng, reported = random.Random(0), tmp_path / "reported"
    files = elsewhere / "checkpoints"
    files.mkdir()

    def save_for_ever() -> None:
        plugin, step = CheckpointFiles(), 0
        if found := newest_first(files):
            step = read_file(found[0])["global_step"]
        while True:
            step += 1
            path = files / f"step-{step % 4:06d}.ckpt"  # names are used again, as by `last.ckpt`
            after = lambda path=path: point_to(files / "last.ckpt", path)  # noqa: E731
            plugin.save_checkpoint(content(step), path, after)
            assert plugin.finished(wait=True) is None
            with atomic_write(reported) as file:
                file.write(str(step).encode())

    for _ in range(40):
        child = fork(save_for_ever, tmp_path / "log")
        time.sleep(0.1 + rng.random() * 0.15)
        os.kill(child, signal.SIGKILL)
        assert wait([child]) == [-signal.SIGKILL], (tmp_path / "log").read_text()
        with tally("3   kill -9 while a file is written"):
            newest = find_checkpoint("last", elsewhere, "fit")
            held = read_file(newest)
            assert torch.equal(held["weights"], content(held["global_step"])["weights"])
            done = int(reported.read_text()) if reported.exists() else 0
            assert held["global_step"] >= done


def kill_at(module, name: str, number: int) -> None:
    """Have this process killed at the n-th call of a function of the module that writes."""
    real, calls = getattr(module, name), [0]

    def counting(*arguments: object) -> object:
        calls[0] += 1
        if calls[0] == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments)

    setattr(module, name, counting)


@pytest.mark.long
def test_kills_in_saves_of_a_run(command, tmp_path: Path, tally):
    """Row 3: a fit is killed inside a save, 12 times, and ends with the weights of one that never
    was; at most one save interval is lost each time.
    """
    steps, rng = 60, random.Random(1)
    options = [f"--trainer.max_steps={steps}", "--trainer.val_check_interval=1000"]
    options += ["--checkpoint.every_n_train_steps=1", "--model.objective.init_args.total_steps=60"]
    whole = command("fit", *options, folder="whole")
    before = 0
    for trial in range(12):

        def work(trial: int = trial) -> None:
            # The second save of this start: before, in and after its parts.
            if trial % 3 == 0:
                kill_at(checkpointing._Hashed, "write", rng.randint(40, 120))
            else:
                place = [(checkpointing, "_write_digests"), (checkpoint_io, "write_checkpoint")]
                kill_at(*place[trial % 3 - 1], 3 + trial % 2)
            command("fit", *options, "--ckpt_path=last", folder="part")

        assert wait([fork(work, tmp_path / "log")]) == [-signal.SIGKILL]
        with tally("3   kill -9 of a fit inside a save"):
            found = find_checkpoint("last", tmp_path / "part", "fit")
            step = read_file(found)["global_step"] if found else 0
            assert step >= before  # the first save of a start may be the one that is cut short
            before = step
    part = command("fit", *options, "--ckpt_path=last", folder="part")
    assert_same(checkpoint(whole), checkpoint(part))
    assert not list((part / "checkpoints").glob("*.partial"))


@pytest.fixture
def two_files(tmp_path: Path) -> Path:
    """A run folder with two checkpoints."""
    for step in (1, 2):
        write_checkpoint(content(step), tmp_path / "checkpoints" / f"step-{step:06d}.ckpt")
    newest = tmp_path / "checkpoints" / "step-000002.ckpt"
    point_to(tmp_path / "checkpoints" / "last.ckpt", newest)
    return tmp_path


def falls_back(folder: Path, capture) -> None:
    """`last` is the earlier file, and a warning names both."""
    newest, earlier = (folder / "checkpoints" / f"step-00000{step}.ckpt" for step in (2, 1))
    with pytest.warns(UserWarning) as said:
        assert find_checkpoint("last", folder, "fit") == str(earlier)
    text = str(said[0].message)
    assert str(newest) in text and f"an earlier one is used: {earlier}" in text
    with pytest.raises(UserError, match="must be a whole checkpoint"):
        read_file(newest)
    with pytest.raises(UserError, match=f"whole checkpoint.*{earlier} is whole"):
        find_checkpoint(str(newest), folder, "fit")


def test_flipped_bits(two_files: Path, tally):
    """Row 4: 200 single bits, a fifth of them of the digest beside the file."""
    newest = two_files / "checkpoints" / "step-000002.ckpt"
    rng = random.Random(2)
    for trial in range(200):
        file = newest if trial % 5 else checkpointing.digest_file(newest)
        good = file.read_bytes()
        bad = bytearray(good)
        # In the digest, of the digest: the name after it is for people.
        place = rng.randrange(len(good) if file is newest else 64)
        bad[place] ^= 1 << rng.randrange(8)
        file.write_bytes(bad)
        checkpointing._damage.cache_clear()  # the clock of the files may be coarser than this loop
        with tally("4   one bit of a checkpoint is flipped"):
            falls_back(two_files, None)
        file.write_bytes(good)
    checkpointing._damage.cache_clear()
    assert find_checkpoint("last", two_files, "fit") == str(newest)


def test_truncated_files(two_files: Path, tally):
    """Row 4: cut at any length, empty, gone; with the digest beside it and without."""
    newest = two_files / "checkpoints" / "step-000002.ckpt"
    good, rng = newest.read_bytes(), random.Random(3)
    lengths = [0, 1, 100, len(good) - 1, *(rng.randrange(len(good)) for _ in range(16))]
    for beside in (True, False):
        if not beside:
            checkpointing.digest_file(newest).unlink()
        for length in lengths:
            newest.write_bytes(good[:length])
            checkpointing._damage.cache_clear()
            with tally("4   a checkpoint is cut short"):
                falls_back(two_files, None)
    newest.write_bytes(good)
    checkpointing._damage.cache_clear()
    assert damage(newest) == ""
    for file in two_files.rglob("*.ckpt"):
        file.unlink() if file.is_symlink() else file.write_bytes(b"")
    with pytest.raises(UserError, match="ckpt_path=last: none is whole"):
        find_checkpoint("last", two_files, "fit")


@pytest.fixture
def small_disk(tmp_path: Path):
    """A file system of 2 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small file system can only be mounted with CAP_SYS_ADMIN, as root has it")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_spares_the_file_before(small_disk: Path, tally):
    """Row 5: the file before is as it was, nothing is left over, path and bytes are named."""
    path = small_disk / "step-000001.ckpt"
    small = {"weights": torch.arange(100_000, dtype=torch.float32)}
    write_checkpoint(small, path)
    before = sorted(small_disk.iterdir())
    for size in (400_000, 500_000, 4_000_000):
        for name in (path, small_disk / "step-000002.ckpt"):
            large = {"weights": torch.zeros(size), "more": torch.zeros(size // 2)}
            with tally("5   disk full while a file is written"):
                with pytest.raises(OSError) as error:
                    write_checkpoint(large, name)
                assert str(name) in str(error.value)
                assert f"{6 * size:,} bytes are needed" in str(error.value)
                assert damage(path) == "" and torch.equal(
                    read_file(path)["weights"], small["weights"]
                )
                assert sorted(small_disk.iterdir()) == before


def test_a_run_goes_on_when_the_disk_is_full(command, small_disk: Path, tmp_path, caplog, tally):
    """Row 5: saves that fail are warned about; the last one that fails is an error."""
    options = ["--trainer.max_steps=30", "--trainer.val_check_interval=1000"]
    options += ["--checkpoint.every_n_train_steps=2", "--trainer.logger=false"]
    options += ["--model.network.init_args.hidden_size=24", "--trainer.callbacks=null"]
    with tally("5   disk full under a fit"):
        with pytest.warns(UserWarning, match="a checkpoint was not written; training goes on"):
            with pytest.raises(SystemExit, match=r"error: checkpoint: cannot be written; .*bytes"):
                command("fit", *options, folder="disk/run")
        files = small_disk / "run" / "checkpoints"
        assert not list(files.glob("*.partial"))
        whole = [path for path in files.glob("step-*.ckpt") if damage(path) == ""]
        assert len(whole) == len(list(files.glob("step-*.ckpt"))) >= 2
        step = checkpoint(small_disk / "run")["global_step"]
        assert step == max(read_file(path)["global_step"] for path in whole) < 30
    for path in sorted(files.glob("step-*.ckpt"))[:-1]:
        checkpointing.remove(path)
    with tally("5   disk full under a fit"):
        command("fit", *options, "--ckpt_path=last", "--checkpoint.keep=2", folder="disk/run")
        assert checkpoint(small_disk / "run")["global_step"] == 30
