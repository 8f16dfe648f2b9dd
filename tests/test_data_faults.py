"""Faults of the data in whole runs: rows 1, 2, 11, 12 and 13 of the faults that we survive."""

import hashlib
import os
import random
import signal
from pathlib import Path

import numpy as np
import pytest
from shard_files import overwrite, png
from test_resume import assert_same, checkpoint, launch

from w2s_train.module import DiffusionModule
from w2s_train.shards import ShardWriter, write_index

LAST = ["--ckpt_path=last"]
OPTIONS = ["--data.prepare=null", "--data.dataset=digits", "--trainer.callbacks=null"]


def write_images(folder: Path, counts: list[int]) -> str:
    """Shards of random grey 8x8 images of ten classes."""
    rng, number = np.random.default_rng(0), 0
    for shard, count in enumerate(counts):
        with ShardWriter(folder / f"train-{shard:06d}.tar") as writer:
            for _ in range(count):
                pixels = rng.integers(256, size=(8, 8)).astype(np.uint8)
                writer.write(f"{number:05d}", number % 10, png=png(pixels))
                number += 1
    write_index(folder)
    return f"--data.train_urls={folder}/train-*.tar"


@pytest.fixture
def data(tmp_path: Path) -> str:
    return write_images(tmp_path / "data", [40, 33, 47])


@pytest.mark.slow
@pytest.mark.fault("11  unreadable samples")
@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.long)])
def test_skips_are_reported_at_the_end_of_the_epoch(
    command, tmp_path: Path, data: str, caplog, processes: int
):
    """Faults row 11: three epochs of 120 samples, two of which cannot be read."""
    for shard, key in (("train-000000.tar", "00007"), ("train-000002.tar", "00100")):
        overwrite(tmp_path / "data" / shard, key, b"\0" * 1000)
    caplog.set_level("INFO")
    options = [*OPTIONS, data, "--data.max_skipped=0.02", "--data.batch_size=10"]
    options += [f"--trainer.max_steps={36 // processes}"]
    if processes == 1:
        command("fit", *options)
        said = caplog.text
    else:
        two = [f"--trainer.devices={processes}", "--trainer.strategy=ddp"]
        said, _ = launch(tmp_path / "run", *options, *two).communicate(timeout=240)
    for epoch in range(3):
        assert f"epoch {epoch} of the data: 2 samples skipped (1 of " in said
    assert "train-000002.tar, such as 00100: no image of a known type" in said


@pytest.mark.fault("11  unreadable samples")
@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--trainer.min_steps=200"]])
def test_too_many_skips_stop_the_run(command, tmp_path: Path, data: str, options: list[str]):
    """Faults row 11: the message names share, shard and key; the step that was reached is saved."""
    for key in ("00007", "00011"):
        overwrite(tmp_path / "data" / "train-000000.tar", key, b"\0" * 1000)
    with pytest.raises(SystemExit) as stop:
        command("fit", *OPTIONS, data, "--trainer.max_steps=1000", *options)
    message = str(stop.value)
    assert "data.max_skipped=0.01: 2 of 120 samples cannot be read (2 of " in message
    assert "train-000000.tar, such as 000" in message
    assert 0 < checkpoint(tmp_path / "run")["global_step"] < 10


@pytest.mark.slow
@pytest.mark.fault("11  unreadable samples")
@pytest.mark.long
def test_skips_are_counted_across_stops(command, tmp_path: Path, data: str):
    """Faults row 11: a run that stops at every step meets the limit where one start meets it.

    With the data mended it goes on, although the checkpoint has counted too many.
    """
    shard = tmp_path / "data" / "train-000000.tar"
    whole = shard.read_bytes()
    for key in ("00007", "00011"):
        overwrite(shard, key, b"\0" * 1000)
    options = [*OPTIONS, data, "--trainer.log_every_n_steps=1", "--data.batch_size=10"]

    def stopped(folder: str, *steps: int) -> int:
        with pytest.raises(SystemExit, match="2 of 120 samples cannot be read"):
            for step in steps:
                command("fit", *options, f"--trainer.max_steps={step}", *LAST, folder=folder)
        return int(checkpoint(tmp_path / folder)["global_step"])

    reached = stopped("one", 12)
    assert stopped("many", *range(1, 13)) == reached
    assert 1 < reached
    shard.write_bytes(whole)
    command("fit", *options, "--trainer.max_steps=14", *LAST, folder="many")
    assert checkpoint(tmp_path / "many")["global_step"] == 14


@pytest.mark.slow
@pytest.mark.fault("13  few shards")
@pytest.mark.parametrize(
    "counts", [[20, 20, 20], [1, 1], pytest.param([30], marks=pytest.mark.long)]
)
@pytest.mark.parametrize("processes", [1, 2])
def test_few_shards(command, tmp_path: Path, counts: list[int], processes: int):
    """Faults row 13: 3 shards on 2 ranks, 1 shard on 2 ranks x 2 workers, tiny ones: they train."""
    urls = write_images(tmp_path / "data", counts)
    options = [*OPTIONS, urls, "--data.num_workers=2", f"--trainer.devices={processes}"]
    options += ["--trainer.strategy=ddp_fork"] if processes > 1 else []
    folder = command("fit", *options)
    assert checkpoint(folder)["progress"]["images_seen"] == 6 * 16 * processes


@pytest.mark.slow
@pytest.mark.fault("12  label that is no class")
def test_a_label_that_is_no_class(command, tmp_path: Path):
    """Faults row 12: key, shard and value, before the first step."""
    with ShardWriter(tmp_path / "data" / "train-000000.tar") as writer:
        writer.write("sample7", 999, png=png(np.zeros((8, 8), np.uint8)))
    with pytest.raises(SystemExit, match=r"label=999: must be in \[0, 9\] \(sample sample7 of "):
        command("fit", *OPTIONS, f"--data.train_urls={tmp_path}/data/train-000000.tar")
    assert not (tmp_path / "run" / "checkpoints" / "last.ckpt").exists()


@pytest.mark.slow
def test_virtual_epochs_change_nothing(command, data: str):
    """Lightning's epochs of two batches, each of which reads from the loader anew."""
    options = [*OPTIONS, data, "--data.num_workers=2"]
    whole = command("fit", *options, folder="whole")
    parts = ["--trainer.limit_train_batches=2", "--trainer.check_val_every_n_epoch=1"]
    pieces = command("fit", *options, *parts, "--trainer.val_check_interval=1.0", folder="parts")
    assert_same(checkpoint(whole), checkpoint(pieces))


@pytest.mark.slow
@pytest.mark.fault("2   resume on another number of processes")
def test_the_position_survives_another_number_of_processes(command, data: str, monkeypatch):
    """Faults row 2: one process of 16 rows, then two of 8, then one: the samples of one run."""
    seen = Path(data.partition("=")[2]).parent.parent / "seen"
    seen.mkdir()
    real = DiffusionModule.training_step

    def training_step(self, batch, batch_idx):
        rank, size = self.trainer.global_rank, len(batch["label"])
        name = f"{self.images_seen + rank * size:06d}"
        hashes = [hashlib.sha256(image.numpy().tobytes()).hexdigest() for image in batch["image"]]
        (seen / name).write_text("".join(f"{each}\n" for each in hashes))
        return real(self, batch, batch_idx)

    def everything() -> str:
        text = "".join(path.read_text() for path in sorted(seen.iterdir()))
        for path in seen.iterdir():
            path.unlink()
        return text

    monkeypatch.setattr(DiffusionModule, "training_step", training_step)
    options = [*OPTIONS, data, "--data.num_workers=1", "--data.batch_size=16"]
    command("fit", *options, "--trainer.max_steps=9", folder="whole")
    whole = everything()
    start = "--ckpt_path=last"
    for steps, number in ((3, 1), (6, 2), (9, 1)):
        split = [f"--trainer.devices={number}", f"--data.batch_size={16 // number}"]
        split += ["--trainer.strategy=ddp_fork", f"--trainer.max_steps={steps}", start]
        folder = command("fit", *options, *split, folder=f"part{steps}")
        start = f"--ckpt_path={folder}/checkpoints/last.ckpt"
    assert everything() == whole
    assert len(set(whole.splitlines()[:120])) == 120


WEAK = "{class_path: w2s_train.segment.Extrapolation, init_args: {low: %s, high: %s, scale: 0.3, "
WEAK += "weak: {class_path: w2s_train.weak.%s, init_args: {%s}}}}"


def killed(command, options: list[str], step: int) -> int:
    """Run a fit in a child process that kills itself with SIGKILL at a step; gives its status."""
    child = os.fork()
    if child == 0:
        real = DiffusionModule.training_step

        def training_step(self, batch, batch_idx):
            if self.global_step == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(self, batch, batch_idx)

        DiffusionModule.training_step = training_step
        try:
            command("fit", *options, folder="part")
        finally:
            os._exit(1)
    return os.waitpid(child, 0)[1]


@pytest.mark.fault("1   kill -9 at random steps")
@pytest.mark.slow
@pytest.mark.parametrize("kills", [8, pytest.param(20, marks=pytest.mark.long)])
def test_kills_change_nothing(command, data: str, kills: int):
    """Faults row 1: SIGKILL at random steps; weights, averages, weak networks, optimizer, data.

    A snapshot that is refreshed, a co-trained network, flips, accumulation and worker processes;
    checkpoints every second step, so that most kills lose a step that is then taken again.
    """
    segments = [WEAK % (0.0, 0.4, "Snapshot", "step: 3, refresh_every: 7")]
    segments += [WEAK % (0.4, 0.7, "CoTrained", "every: 2, lr: 0.01")]
    segments += [WEAK % (0.7, 1.0, "EMA", "decay: 0.9, lag: 2")]
    steps = 3 * kills
    options = [*OPTIONS, data, f"--trainer.max_steps={steps}", "--trainer.val_check_interval=1000"]
    options += [f"--model.objective.init_args.segments=[{', '.join(segments)}]"]
    options += [f"--model.objective.init_args.total_steps={steps}", "--data.num_workers=2"]
    options += ["--trainer.accumulate_grad_batches=2", "--checkpoint.every_n_train_steps=2"]
    options += ["--data.flip=true", "--data.in_memory=false", "--data.shuffle=60"]
    whole = command("fit", *options, folder="whole")
    for step in sorted(random.Random(0).sample(range(2, steps), kills)):
        assert killed(command, [*options, "--ckpt_path=last"], step) == signal.SIGKILL
    part = command("fit", *options, "--ckpt_path=last", folder="part")
    assert_same(checkpoint(whole), checkpoint(part))
    names = checkpoint(part)["state_dict"]
    for number in range(3):
        assert any(name.startswith(f"objective.segments.{number}.weak.") for name in names)
