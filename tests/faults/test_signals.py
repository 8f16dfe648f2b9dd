"""Preemption, time limits and crash loops: rows 6 and 7."""

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
from ranks import fork, start_ranks, wait
from test_resume import assert_same, checkpoint

from w2s_train.errors import INTERRUPTED, NO_PROGRESS, PREEMPTED
from w2s_train.module import DiffusionModule

pytestmark = [pytest.mark.slow, pytest.mark.fault]
TWO = ["--trainer.devices=2", "--trainer.strategy=ddp"]


def slowly(folder: Path, rank: int = 0, seconds: float = 0.02) -> None:
    """Have steps take a while, and each process write down where it is."""
    real = DiffusionModule.training_step

    def training_step(self, batch, batch_idx):
        now = folder / f"now.{rank}"
        now.write_text(f"{self.global_step}\n")
        now.replace(folder / f"at.{rank}")  # whoever reads it finds all or nothing of it
        time.sleep(seconds * (1 + rank))
        return real(self, batch, batch_idx)

    DiffusionModule.training_step = training_step


def evaluate_slowly(folder: Path, seconds: float) -> None:
    """Have batches of an evaluation take a while, and leave a file each when they begin."""
    real = DiffusionModule.validation_step

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        (folder / f"at.{batch_idx}").touch()
        time.sleep(seconds)
        return real(self, batch, batch_idx, dataloader_idx)

    DiffusionModule.validation_step = validation_step


def position(folder: Path, rank: int = 0) -> int:
    """The optimizer steps behind a process."""
    text = (folder / f"at.{rank}").read_text() if (folder / f"at.{rank}").exists() else ""
    return int(text) if text.endswith("\n") else -1


def optimizer_steps(content: dict) -> set[int]:
    """The steps that the optimizer itself has counted, over all parameters."""
    return {int(state["step"]) for state in content["optimizer_states"][0]["state"].values()}


@pytest.mark.parametrize("trials", [6, pytest.param(12, marks=pytest.mark.long)])
def test_signals_to_any_process(command, tmp_path: Path, tally, trials: int):
    """Row 6: SIGUSR1 and SIGTERM, to one of two processes or both, in turn at random moments.

    All end with status 75, at the same step, one step after the signal; the file holds the step
    that it says; and in the end the weights are those of a run that nobody disturbed.
    """
    steps, rng = 20 * trials, random.Random(0)
    options = [f"--trainer.max_steps={steps}", "--trainer.val_check_interval=1000", *TWO]
    options += [f"--model.objective.init_args.total_steps={steps}", "--data.num_workers=1"]
    options += ["--trainer.log_every_n_steps=50", "--checkpoint.every_n_train_steps=1000"]
    log = tmp_path / "log"

    def text() -> str:
        return "".join(path.read_text() for path in tmp_path.glob("log.*"))

    whole = start_ranks(lambda rank: command("fit", *options, folder="whole"), 2, log)
    assert wait(whole) == [0, 0], text()

    def work(rank: int) -> None:
        slowly(tmp_path, rank)
        command("fit", *options, "--ckpt_path=last", folder="part")

    before = 0
    for trial in range(trials):
        number = (signal.SIGUSR1, signal.SIGTERM)[trial % 2]
        for path in tmp_path.glob("at.*"):
            path.unlink()
        ranks = start_ranks(work, 2, log)
        deadline = time.monotonic() + 120
        while position(tmp_path) < before + 1:  # this start has taken a step
            assert time.monotonic() < deadline, text()
            time.sleep(0.005)
        time.sleep(rng.random() * 0.2)
        for rank in ([0], [1], [0, 1])[trial // 2 % 3]:
            os.kill(ranks[rank], number)
        seen = position(tmp_path)
        with tally(f"6   {number.name} to one or two of two processes"):
            assert wait(ranks) == [PREEMPTED, PREEMPTED], text()
            content = checkpoint(tmp_path / "part")
            before = content["global_step"]
            assert optimizer_steps(content) == {before}
            assert content["progress"]["images_seen"] == 2 * 16 * before
            assert before <= seen + 2  # the one under way, or one more where that had been settled
    assert before < steps - 20, "every signal met a run that was under way"
    rest = start_ranks(
        lambda rank: command("fit", *options, "--ckpt_path=last", folder="part"), 2, log
    )
    assert wait(rest) == [0, 0], text()
    assert_same(checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "part"))


def test_signals_in_an_evaluation(command, tmp_path: Path, tally, caplog):
    """Row 6: the evaluation is left after a batch, and the next start scores what is missing."""
    options = ["--trainer.max_steps=3", "--data.num_generated=400", "--model.generation_block=8"]
    options += ["--data.generation_batch_size=8"]
    caplog.set_level("INFO")
    whole = command("fit", *options, folder="whole")

    def work() -> None:
        evaluate_slowly(tmp_path, 0.02)
        command("fit", *options, "--ckpt_path=last", folder="part")

    for trial in range(4):
        for path in tmp_path.glob("at.*"):
            path.unlink()
        child = fork(work, tmp_path / "log")
        while not (tmp_path / f"at.{3 + trial}").exists():
            time.sleep(0.01)
        os.kill(child, (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)[trial % 3])
        with tally("6   signal in an evaluation"):
            status = INTERRUPTED if trial % 3 == 2 else PREEMPTED
            assert wait([child]) == [status], (tmp_path / "log").read_text()
            assert list((tmp_path / "part" / "evaluation").rglob("*.pt"))
    part = command("fit", *options, "--ckpt_path=last", folder="part")
    scores = [json.loads((folder / "scores.json").read_text()) for folder in (whole, part)]
    assert [s["value"] for s in scores[0]] == [s["value"] for s in scores[1]]
    assert "of 400 images were taken in before" in caplog.text


def test_a_signal_to_one_process_in_an_evaluation(command, tmp_path: Path, tally):
    """Row 6: the other one, which has many batches left, learns of it within two seconds."""
    options = ["--trainer.max_steps=3", "--data.num_generated=4000", *TWO]
    options += ["--data.generation_batch_size=8"]

    def work(rank: int) -> None:
        evaluate_slowly(tmp_path, 0.1)
        command("fit", *options, "--ckpt_path=last")

    for rank in (0, 1):
        for path in tmp_path.glob("at.*"):
            path.unlink()
        ranks = start_ranks(work, 2, tmp_path / "log")
        while not (tmp_path / "at.3").exists():
            time.sleep(0.01)
        os.kill(ranks[rank], signal.SIGTERM)
        begun = time.monotonic()
        with tally("6   signal to one of two processes in an evaluation"):
            assert wait(ranks) == [PREEMPTED, PREEMPTED], (tmp_path / "log.0").read_text()
            assert time.monotonic() - begun < 15
            assert len(list((tmp_path / "run" / "evaluation").rglob("*.pt"))) == 2 * (rank + 1)


def test_a_signal_before_the_first_step(command, tmp_path: Path, tally):
    """Row 6: while everything is being set up: one step is taken and saved."""

    def work() -> None:
        real = DiffusionModule.setup

        def setup(self, stage):
            os.kill(os.getpid(), signal.SIGUSR1)
            return real(self, stage)

        DiffusionModule.setup = setup
        command("fit", "--trainer.max_steps=1000")

    with tally("6   signal before the first step"):
        assert wait([fork(work, tmp_path / "log")]) == [PREEMPTED]
        assert checkpoint(tmp_path / "run")["global_step"] == 1


def test_the_time_limit_leaves_time_to_save(command, tmp_path: Path, tally):
    """The run ends before its limit, though a save takes two seconds; status 75."""
    begun = time.monotonic()

    def work() -> None:
        from w2s_train.running import checkpoint_io

        real = checkpoint_io.write_checkpoint
        checkpoint_io.write_checkpoint = lambda *args: (time.sleep(2), real(*args))
        slowly(tmp_path)
        options = ["--trainer.max_steps=100000", "--trainer.val_check_interval=50000"]
        command(
            "fit", *options, "--checkpoint.every_n_train_steps=20", "--trainer.max_time=00:00:00:16"
        )

    with tally("6   time limit"):
        assert wait([fork(work, tmp_path / "log")]) == [PREEMPTED], (tmp_path / "log").read_text()
        assert 5 < time.monotonic() - begun < 16
        assert checkpoint(tmp_path / "run")["global_step"] > 20


@pytest.mark.parametrize("first_save", [1000, pytest.param(2, marks=pytest.mark.long)])
def test_a_crash_loop_ends(command, tmp_path: Path, tally, first_save: int):
    """Row 7: after three restarts that came no further, status 78, before any work; progress and a
    good end start the count anew.
    """
    options = ["--trainer.max_steps=20", f"--checkpoint.every_n_train_steps={first_save}"]
    options += ["--trainer.val_check_interval=1000", "--ckpt_path=last"]
    crash_at = 5

    def work() -> None:
        real = DiffusionModule.training_step

        def training_step(self, batch, batch_idx):
            if self.global_step == crash_at:
                time.sleep(0.5)  # what is being written gets written
                os._exit(9)
            return real(self, batch, batch_idx)

        DiffusionModule.training_step = training_step
        command("fit", *options)

    log = tmp_path / "log"
    statuses = [wait([fork(work, log)])[0] for _ in range(6)]
    # The first start of all may have saved something: that is progress.
    expected = [9] * (4 if first_save == 1000 else 5) + [NO_PROGRESS] * 2
    with tally("7   crash loop"):
        assert statuses == expected[:6], log.read_text()
        assert "3 restarts from" in log.read_text()
        assert f"remove {tmp_path / 'run' / 'starts.json'} to try again" in log.read_text()
    (tmp_path / "run" / "starts.json").unlink()
    crash_at = -1
    assert wait([fork(work, log)]) == [0]
    assert not (tmp_path / "run" / "starts.json").exists()


@pytest.mark.parametrize(
    "options",
    [
        ["--trainer.min_steps=200"],
        ["--trainer.accumulate_grad_batches=3", "--trainer.limit_train_batches=1"],
    ],
)
def test_nothing_keeps_a_run_from_stopping(command, tmp_path: Path, tally, options: list[str]):
    """Row 6: neither a least number of steps nor epochs shorter than an accumulation."""

    def work() -> None:
        real = DiffusionModule.training_step

        def training_step(self, batch, batch_idx):
            if self.global_step == 3:
                os.kill(os.getpid(), signal.SIGUSR1)
            return real(self, batch, batch_idx)

        DiffusionModule.training_step = training_step
        command("fit", "--trainer.max_steps=300", "--trainer.val_check_interval=1000", *options)

    options = [*options, "--trainer.callbacks=null"]
    with tally("6   signal where Lightning would not stop"):
        assert wait([fork(work, tmp_path / "log")]) == [PREEMPTED], (tmp_path / "log").read_text()
        assert checkpoint(tmp_path / "run")["global_step"] <= 6


def test_signals_end_sampling(command, tmp_path: Path, tally):
    """Row 6: there is nothing to save, and a first Ctrl-C is enough."""
    folder = command("fit", "--trainer.callbacks=null")

    def work(number: signal.Signals) -> None:
        real = DiffusionModule.predict_step

        def predict_step(self, batch, batch_idx):
            os.kill(os.getpid(), number)
            time.sleep(0.1)
            return real(self, batch, batch_idx)

        DiffusionModule.predict_step = predict_step
        command("sample", "--ckpt_path=last", "--output", str(tmp_path / number.name))

    assert folder.is_dir()
    for number, status in {signal.SIGTERM: -signal.SIGTERM, signal.SIGINT: INTERRUPTED}.items():
        with tally("6   signal while images are sampled"):
            assert wait([fork(lambda n=number: work(n), tmp_path / "log")]) == [status], (
                tmp_path / "log"
            ).read_text()
