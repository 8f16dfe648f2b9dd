"""What the guard takes for a bad step and where it goes back to; slow faults are in faults/."""

import errno
import math
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from faulty import bad_loss
from test_resume import assert_same, checkpoint
from torch.utils.tensorboard.writer import FileWriter as EventFileWriter

from w2s_train.checkpoint_file import point_to, write_checkpoint
from w2s_train.errors import DIVERGED, Stopped
from w2s_train.module import DiffusionModule
from w2s_train.running.blow_up import BlowUp
from w2s_train.running.guard import WINDOW, Guard
from w2s_train.running.loggers import MetricsCSV


class Recorded(Guard):
    """Remembers reasons."""

    def _record(self, trainer: Any, judged: Any, reason: str, *rest: Any) -> None:
        self.in_a_row, self.reasons = self.in_a_row + 1, [*vars(self).get("reasons", []), reason]


def judged(guard: Guard, losses: list[float]) -> list[bool]:
    trainer: Any = SimpleNamespace(world_size=1, global_step=0, precision="32-true")
    return [guard.judge(trainer, torch.tensor(x), torch.tensor(1.0)) for x in losses]


def test_a_spike_among_the_first_steps_hides_no_later_one():
    guard = Recorded()
    first = [0.0, *[1.0] * 50, 1e9, *[1.0] * WINDOW]
    assert all(judged(guard, first))
    assert guard.spikes.state[0].item() == pytest.approx(1, abs=0.1)
    assert judged(guard, [5.0, 1.0]) == [False, True]


def test_losses_on_both_sides_of_zero_are_no_spikes():
    """An energy distance is one; what is as large below zero is."""
    guard, draws = Recorded(), torch.randn(1000).tolist()
    assert judged(guard, draws).count(False) < 10
    assert judged(guard, [-50.0, 50.0, 0.0]) == [False, False, True]


def test_nothing_is_a_spike_where_everything_was_zero():
    assert all(judged(Recorded(), [0.0] * (WINDOW + 2) + [1.0]))


def test_the_alarm_looks_once_at_what_was_logged():
    """A warning above 1.2 times what the scale explains, the end at twice that."""

    def logged(strong: float, guides: float = 2.0) -> dict[str, float]:
        numbers = dict(strong_rms=strong, velocity_rms=0.5, effective_scale=guides)
        return {f"train/0-1/{name}": value for name, value in numbers.items()}

    alarm, metrics = BlowUp(), logged(1.21)
    alarm.look({}, step=0)
    alarm.look(logged(1.19) | {"train/1-2/effective_scale": 2.0}, step=1)  # no velocity yet
    with pytest.warns(UserWarning, match="step 2: train/0-1/strong_rms is 1.21, which is 2.42 tim"):
        alarm.look(metrics, step=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        alarm.look(metrics, step=3)
    with pytest.raises(Stopped, match="guidance by 2 explains 2 times; a smaller scale") as end:
        alarm.look(logged(2.41), step=4)
    assert end.value.status == DIVERGED
    with pytest.raises(Stopped, match="guidance by 10 explains 10 times"):
        alarm.look(logged(12.1, guides=math.inf), step=5)


def test_networks_that_say_data_come_down_first():
    """Whatever they begin with; what then doubles is judged as ever."""
    alarm = BlowUp()

    def look(strong: float) -> None:
        found = {"strong_rms": strong, "velocity_rms": 1.0, "effective_scale": 1.0}
        metrics = {f"train/head/{name}": value for name, value in found.items()}
        alarm.look(metrics, step=1, falls=True)

    for strong in (20.0, 9.0, 12.0, 1.1, 2.1):
        look(strong)
    with pytest.raises(Stopped, match="strong_rms is 2.5, which is 2.5 times"):
        look(2.5)


def test_the_alarm_uses_the_scale_of_each_row():
    """Where scales are drawn: v / (1 - W), row by row, not the mean of one source's share."""
    numbers = dict(velocity_rms=0.5, effective_scale=1.5, explained_rms=1.0)
    found = {f"train/head/{name}": value for name, value in numbers.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        BlowUp().look(found | {"train/head/strong_rms": 1.19}, step=1)
    with pytest.warns(UserWarning, match="guidance by 2 explains 2 times"):
        BlowUp().look(found | {"train/head/strong_rms": 1.21}, step=2)
    with pytest.raises(Stopped):
        BlowUp().look(found | {"train/head/strong_rms": 2.41}, step=3)


@pytest.mark.parametrize("in_a_row, expected", [(2, "step-000007"), (4, "step-000005"), (6, "")])
def test_it_goes_back_to_before_the_bad_steps(tmp_path: Path, in_a_row: int, expected: str):
    """Not to a file that was written among them, nor to one of a part that was given up."""
    for step in (5, 7, 20):
        write_checkpoint({}, tmp_path / "checkpoints" / f"step-{step:06d}.ckpt")
    point_to(tmp_path / "checkpoints/last.ckpt", tmp_path / "checkpoints/step-000020.ckpt")
    strategy = SimpleNamespace(broadcast=lambda value: value)
    trainer: Any = SimpleNamespace(default_root_dir=tmp_path, is_global_zero=True)
    trainer.strategy, trainer.global_step, guard = strategy, 9, Guard()
    guard.in_a_row = in_a_row
    found = guard._last_good(trainer)
    assert found == (f"checkpoints/{expected}.ckpt" if expected else "")


@pytest.mark.slow
def test_the_host_waits_if_the_first_bad_step_is_one_too_many(command, monkeypatch, recwarn):
    """An accelerator's host would hear of it after the next step, which is good."""
    monkeypatch.setattr("w2s_train.running.guard.waits_cost", lambda trainer: True)
    bad_loss({4: math.nan}, patch=monkeypatch.setattr)
    command("fit", "--trainer.val_check_interval=1000", "--guard.patience=1")
    text = " ".join(str(each.message) for each in recwarn)
    assert "until step 5: weights go back to those of checkpoints/step-000003.ckpt" in text


@pytest.mark.slow
def test_a_run_that_goes_back_in_its_folder_forgets_what_came_later(command, monkeypatch, recwarn):
    """Neither a roll-back nor a kill leads to the part that was given up."""
    options = ["--trainer.val_check_interval=1000", "--guard.patience=3"]
    options += ["--checkpoint.every_n_train_steps=3"]
    folder = command("fit", *options, "--trainer.max_steps=9")
    bad_loss(dict.fromkeys((4, 5, 6), math.nan), patch=monkeypatch.setattr)
    real = DiffusionModule.training_step

    def training_step(self, batch, batch_idx):
        if self.global_step == 4:
            assert checkpoint(folder)["global_step"] == 3
        return real(self, batch, batch_idx)

    monkeypatch.setattr(DiffusionModule, "training_step", training_step)
    start = f"--ckpt_path={folder}/checkpoints/step-000003.ckpt"
    command("fit", *options, "--trainer.max_steps=8", start)
    text = " ".join(str(each.message) for each in recwarn)
    assert "until step 7: weights go back to those of checkpoints/step-000003.ckpt" in text
    assert checkpoint(folder)["global_step"] == 8


@pytest.mark.slow
def test_numbers_that_cannot_be_written_end_no_run(command, monkeypatch, recwarn):
    """As while a checkpoint that is being written fills the disk."""
    real_csv, real_events, calls = MetricsCSV._append, EventFileWriter.add_event, []

    def full(real):
        def write(self, *args: Any):
            calls.append(1)
            if 30 < len(calls) < 50:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(self, *args)

        return write

    monkeypatch.setattr(MetricsCSV, "_append", full(real_csv))
    monkeypatch.setattr(EventFileWriter, "add_event", full(real_events))
    folder = command("fit", "--trainer.max_steps=30", "--trainer.val_check_interval=1000")
    assert checkpoint(folder)["global_step"] == 30
    assert "training goes on (OSError" in " ".join(str(each.message) for each in recwarn)
    rows = (folder / "metrics.csv").read_text().splitlines()
    assert rows[-1].startswith("30,") and 10 < len(rows) < 31


SOURCES = ["EMA, init_args: {decay: 0.9, lag: 3}", "CoTrained, init_args: {every: 1}"]
SOURCES += ["Snapshot, init_args: {step: 3}"]


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES)
def test_a_host_that_learns_of_a_bad_step_later_changes_nothing(command, monkeypatch, source: str):
    """As on an accelerator: the same weights, states and records, bit for bit."""
    bad_loss(dict.fromkeys((2, 3, 7), math.nan), patch=monkeypatch.setattr)
    segment = "{class_path: w2s_train.segment.Extrapolation, init_args: {low: 0.0, high: 1.0, "
    segment += "scale: 0.3, weak: {class_path: w2s_train.weak." + source + "}}}"
    options = [f"--model.objective.init_args.segments=[{segment}]", "--trainer.max_steps=8"]
    options += ["--trainer.val_check_interval=1000", "--checkpoint.every_n_train_steps=4"]
    at_once = command("fit", *options, folder="at_once")
    monkeypatch.setattr("w2s_train.running.guard.waits_cost", lambda trainer: True)
    late = command("fit", *options, folder="late")
    for name in ("step-000004", "step-000008"):
        assert_same(checkpoint(at_once, name), checkpoint(late, name))
    lines = [(folder / "bad_steps.jsonl").read_text() for folder in (at_once, late)]
    assert lines[0] == lines[1] and lines[0].count("loss and gradient not finite") == 3
