"""Checkpoint files, when they are written and which are kept; the slow faults are in faults/."""

import subprocess
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_resume import assert_same, checkpoint

from w2s_train.checkpoint_file import (
    damage,
    digest_file,
    newest_first,
    point_to,
    read_file,
    write_checkpoint,
)
from w2s_train.errors import PREEMPTED, UserError
from w2s_train.module import DiffusionModule
from w2s_train.running import checkpoint_io
from w2s_train.running import checkpoints as module
from w2s_train.running.checkpoint_io import CheckpointFiles
from w2s_train.running.checkpoints import Checkpoints, fingerprint
from w2s_train.running.run import Run
from w2s_train.signals import REQUESTS

LONG = ["--trainer.val_check_interval=1000"]


def test_the_digest_is_that_of_sha256sum(tmp_path: Path):
    write_checkpoint({"x": torch.arange(5)}, tmp_path / "a.ckpt")
    check = subprocess.run(
        ["sha256sum", "--check", digest_file(tmp_path / "a.ckpt").name],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert check.stdout == "a.ckpt: OK\n"


def test_training_waits_for_the_copy_and_not_for_the_disk(tmp_path: Path, monkeypatch):
    """What is written is what was there when it was saved, however slow the disk is."""
    release, real = threading.Event(), checkpoint_io.write_checkpoint
    monkeypatch.setattr(
        checkpoint_io, "write_checkpoint", lambda *args: (release.wait(60), real(*args))
    )
    files, weights, done = CheckpointFiles(), torch.zeros(1000), []
    files.save_checkpoint({"weights": weights}, tmp_path / "a.ckpt", lambda: done.append(1))
    weights += 1
    assert files.finished() is None and not done and not (tmp_path / "a.ckpt").exists()
    release.set()
    files.teardown()  # as at the end of a run
    assert done and torch.equal(read_file(tmp_path / "a.ckpt")["weights"], torch.zeros(1000))


def test_errors_of_writing_come_back_once(tmp_path: Path):
    (tmp_path / "checkpoints").write_text("no folder")
    files = CheckpointFiles()
    files.save_checkpoint({}, tmp_path / "checkpoints" / "a.ckpt")
    assert isinstance(files.finished(wait=True), OSError)
    assert files.finished(wait=True) is None
    files.save_checkpoint({}, tmp_path / "checkpoints" / "a.ckpt")
    with pytest.raises(OSError):
        files.teardown()


def test_a_copy_without_a_digest_is_judged_by_its_own_checksums(tmp_path: Path):
    write_checkpoint({"x": torch.arange(5000)}, tmp_path / "a.ckpt")
    digest_file(tmp_path / "a.ckpt").unlink()
    assert damage(tmp_path / "a.ckpt") == ""
    content = bytearray((tmp_path / "a.ckpt").read_bytes())
    content[content.index(torch.arange(100, 110).numpy().tobytes())] ^= 1
    (tmp_path / "b.ckpt").write_bytes(content)
    assert "is damaged" in damage(tmp_path / "b.ckpt")
    with pytest.raises(UserError, match="must be a whole checkpoint"):
        read_file(tmp_path / "b.ckpt")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int64, torch.bool])
def test_fingerprints(dtype: torch.dtype):
    """Equal for equal tensors; other for one other bit, and for two that change places."""
    x = torch.randint(0, 2, (70_000,)).to(dtype)
    x[:2] = torch.tensor([0, 1])
    mine = fingerprint({"a": x, "about": "text", "b": x[:5]})
    assert mine.names == ["a", "b"]
    assert mine.differences(fingerprint({"a": x.clone(), "b": x[:5].clone()})) == []
    for change in ([1, 1], [1, 0]):
        y = x.clone()
        y[:2] = torch.tensor(change)
        assert mine.differences(fingerprint({"a": y, "b": x[:5]})) == ["a"]


def test_fingerprints_tell_what_is_not_finite():
    state = {name: torch.tensor([1.0, value]) for name, value in dict(a=1.0, b=torch.nan).items()}
    state["c"] = torch.tensor([[-torch.inf]])
    assert fingerprint(state).not_finite() == ["b", "c"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "keep, expected",
    [("null", [4, 8, 12, 14, 16]), ("2", [12, 14, 16])],
)
def test_what_stays(command, keep: str, expected: list[int]):
    """Round steps, all or the newest; of those before evaluations and at the end, the newest two
    files.
    """
    options = ["--trainer.max_steps=16", "--trainer.val_check_interval=7"]
    options += ["--checkpoint.every_n_train_steps=4", f"--checkpoint.keep={keep}"]
    folder = command("fit", *options) / "checkpoints"
    steps = sorted(int(path.stem[5:]) for path in folder.glob("step-*.ckpt"))
    assert steps == expected
    assert sorted(folder.glob("*.sha256")) == [
        digest_file(folder / f"step-{step:06d}.ckpt") for step in expected
    ]
    assert (
        (folder / "last.ckpt").resolve() == folder / "step-000016.ckpt" == newest_first(folder)[0]
    )


@pytest.mark.slow
def test_time_makes_checkpoints_due(command, monkeypatch):
    """With a clock that runs a minute per look, every other step is saved; the file says so."""
    saved = []
    real = Checkpoints.save
    monkeypatch.setattr(
        Checkpoints, "save", lambda self, t, m: (saved.append(t.global_step), real(self, t, m))
    )
    ticks = iter(range(100_000))
    monkeypatch.setattr(module.time, "monotonic", lambda: 30.0 * next(ticks))
    folder = command("fit", *LONG, "--trainer.max_steps=9", "--checkpoint.every_minutes=2")
    assert len(saved) > 3 and saved[-1] == 9
    assert checkpoint(folder)["global_step"] == 9


@pytest.mark.slow
def test_one_wish_is_one_checkpoint(command, monkeypatch):
    """Also where the host hears a step later that it was granted, and has wished again."""
    monkeypatch.setattr("w2s_train.running.guard.waits_cost", lambda trainer: True)
    saved, now, real, step = list[int](), [0.0], Checkpoints.save, DiffusionModule.training_step
    monkeypatch.setattr(
        Checkpoints, "save", lambda self, t, m: (saved.append(t.global_step), real(self, t, m))
    )

    def training_step(self, batch, batch_idx):
        now[0] = 1000.0 * (self.global_step >= 2)
        return step(self, batch, batch_idx)

    monkeypatch.setattr(DiffusionModule, "training_step", training_step)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    options = ["--checkpoint.every_minutes=2", "--checkpoint.every_n_train_steps=1000"]
    command("fit", *LONG, "--trainer.max_steps=9", *options)
    assert saved == [4, 9]


@pytest.mark.slow
def test_a_run_stops_after_whole_steps(command, monkeypatch):
    """Also where the host hears of the wish while a checkpoint is written, after a step."""
    monkeypatch.setattr("w2s_train.running.guard.waits_cost", lambda trainer: True)
    real, steps = DiffusionModule.training_step, list[int]()

    def training_step(self, batch, batch_idx):
        steps.append(self.global_step)
        REQUESTS.preempted = self.global_step >= 2
        return real(self, batch, batch_idx)

    monkeypatch.setattr(DiffusionModule, "training_step", training_step)
    options = ["--trainer.accumulate_grad_batches=2", "--checkpoint.every_n_train_steps=1"]
    with pytest.raises(SystemExit) as end:
        command("fit", *LONG, *options)
    REQUESTS.reset()
    assert end.value.code == PREEMPTED
    assert steps == [0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.slow
def test_states_of_what_were_callbacks_of_their_own(command, recwarn):
    """Checkpoints of before `Run`: the guard and the skipped samples go on counting."""
    options = [*LONG, "--trainer.callbacks=null"]
    whole = checkpoint(command("fit", *options, folder="whole"))
    part = command("fit", *options, "--trainer.max_steps=3", folder="part")
    content, skipped = checkpoint(part), {"counts": [[0, "a.tar", 2]], "reasons": {"a.tar": "b"}}
    assert content["callbacks"].keys() == {"Run"}
    assert content["callbacks"]["Run"]["samples"] == {"counts": [], "reasons": {}}
    guard = content["callbacks"].pop("Run")["guard"]
    content["callbacks"] = {"SkippedSamples": skipped, "Guard": guard}
    write_checkpoint(content, part / "checkpoints/step-000003.ckpt")
    recwarn.clear()
    command(
        "fit", *options, "--ckpt_path=last", "--checkpoint.every_n_train_steps=1", folder="part"
    )
    assert not any("callbacks used to create" in str(each.message) for each in recwarn)
    assert_same(whole, checkpoint(part))
    assert checkpoint(part)["callbacks"]["Run"]["guard"] == whole["callbacks"]["Run"]["guard"]
    assert checkpoint(part, "step-000004")["callbacks"]["Run"]["samples"] == skipped


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ["--trainer.val_check_interval=3", "--trainer.accumulate_grad_batches=1"],
        ["--trainer.val_check_interval=4", "--trainer.accumulate_grad_batches=2"],
        ["--trainer.val_check_interval=1.0", "--trainer.limit_train_batches=5",
         "--trainer.check_val_every_n_epoch=1"],
    ],
)  # fmt: skip
def test_a_checkpoint_comes_before_each_evaluation(command, monkeypatch, options: list[str]):
    """When that is, is said by us and by Lightning in ways of their own."""
    saved, validated = [], []
    real, start = Checkpoints.save, Run.on_validation_start
    monkeypatch.setattr(
        Checkpoints, "save", lambda self, t, m: (saved.append(t.global_step), real(self, t, m))
    )

    def on_validation_start(self, trainer, pl_module):
        validated.append(trainer.global_step)
        start(self, trainer, pl_module)

    monkeypatch.setattr(Run, "on_validation_start", on_validation_start)
    command("fit", "--trainer.max_steps=14", "--checkpoint.every_n_train_steps=1000", *options)
    assert len(validated) > 1 and saved == [*validated, 14]


def test_a_copy_that_lost_its_times_and_links_is_in_the_order_of_steps(tmp_path: Path):
    """As `rsync -r` and object stores leave it."""
    files = {step: tmp_path / f"step-{step:06d}.ckpt" for step in (30, 200, 10, 100)}
    for path in [*files.values(), tmp_path / "mine.ckpt"]:
        write_checkpoint({}, path)
    names = ["step-000200", "step-000100", "step-000030", "step-000010", "mine"]
    assert [path.stem for path in newest_first(tmp_path)] == names
    point_to(tmp_path / "last.ckpt", files[30])  # it went back, and on from there
    names = ["step-000030", "step-000010", "mine", "step-000200", "step-000100"]
    assert [path.stem for path in newest_first(tmp_path)] == names
    files[30].unlink()
    assert [path.stem for path in newest_first(tmp_path)] == names[1:]
    (tmp_path / "last.ckpt").unlink()
    write_checkpoint({}, tmp_path / "last.ckpt")  # a copy of what the link meant
    assert newest_first(tmp_path)[0].name == "last.ckpt"
