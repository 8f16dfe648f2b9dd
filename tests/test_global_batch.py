"""One config is the same run on any number of processes: `data.global_batch_size`."""

import hashlib
import itertools
import json
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from shard_files import numbers, write_numbers

from w2s_train.datamodule import ShardDataModule
from w2s_train.errors import UserError
from w2s_train.module import DiffusionModule
from w2s_train.objective import WeakToStrongObjective
from w2s_train.shards.global_batch import accumulate, divide


@pytest.mark.parametrize(
    "size, most, processes, rows, number",
    [
        (256, 256, 1, 256, 1),
        (256, 128, 1, 128, 2),
        (256, 100, 1, 64, 4),
        (256, 256, 8, 32, 1),
        (256, 24, 8, 16, 2),
        (256, 1, 64, 1, 4),
        (12, 5, 1, 4, 3),
        (7, 6, 1, 1, 7),
    ],
)
def test_the_fewest_parts_that_fit(size: int, most: int, processes: int, rows: int, number: int):
    assert divide(size, most, processes) == (rows, number)
    assert processes * rows * number == size and rows <= most


@pytest.mark.parametrize("size, processes", [(256, 3), (2, 4)])
def test_processes_have_equal_shares(size: int, processes: int):
    rule = f"global_batch_size={size}: must be a multiple of the number of processes, {processes}"
    with pytest.raises(UserError, match=rule):
        divide(size, 8, processes)


def test_intervals_that_are_no_number_of_batches_stay():
    """A share, and an interval in time, with which the trainer has no number."""
    trainer = SimpleNamespace(accumulate_grad_batches=1, limit_train_batches=1.0)
    accumulate(trainer, 2)
    assert vars(trainer) == {"accumulate_grad_batches": 2, "limit_train_batches": 1.0}


class Process:
    """As much of a trainer as the data module asks."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.global_rank, self.world_size, self.global_step = rank, world_size, 0
        self.accumulate_grad_batches, self.val_check_interval = 1, 3
        self.overfit_batches = 0.0
        self._accelerator_connector = SimpleNamespace(use_distributed_sampler=False)
        self.limit_train_batches = 1.0
        self.lightning_module = SimpleNamespace(images_seen=0)
        progress = SimpleNamespace(total=SimpleNamespace(ready=0))
        self.fit_loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress))


def steps(urls: str, processes: int, most: int, number: int, size: int = 12) -> list[list[int]]:
    """The samples of each of the first optimizer steps, in order."""
    found: list[list[int]] = [[] for _ in range(number)]
    for rank in range(processes):
        data = ShardDataModule(
            urls, num_classes=10, batch_size=most, global_batch_size=size, num_workers=0, shuffle=16
        )
        data.trainer = trainer = Process(rank, processes)
        data.setup("fit")
        data.setup("fit")  # of a second fit with this trainer
        assert data.batch_size * processes * trainer.accumulate_grad_batches == size
        assert trainer.val_check_interval == 3 * trainer.accumulate_grad_batches
        batches = iter(data.train_dataloader())
        for step in found:
            for batch in itertools.islice(batches, trainer.accumulate_grad_batches):
                step += numbers(batch)
    return [sorted(step) for step in found]


def test_steps_have_the_same_samples(tmp_path: Path):
    urls = write_numbers(tmp_path, [10, 7, 13, 10])
    whole = steps(urls, 1, 12, 7)
    assert len({tuple(step) for step in whole}) == 7
    for processes, most in ((1, 6), (1, 5), (2, 6), (2, 2), (3, 4), (12, 1)):
        assert steps(urls, processes, most, 7) == whole, (processes, most)


# ---- through the command -----------------------------------------------------------------------


@pytest.fixture
def used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Make fits write down their samples; read those of each step of a run."""
    inner = DiffusionModule.training_step

    def step(self: DiffusionModule, batch: dict, batch_idx: int) -> torch.Tensor:
        rows = [hashlib.sha256(image.numpy().tobytes()).hexdigest() for image in batch["image"]]
        path = Path(self.trainer.default_root_dir) / f"used.{self.trainer.global_rank}"
        with open(path, "a") as file:
            file.write(json.dumps([self.trainer.global_step, rows]) + "\n")
        return inner(self, batch, batch_idx)

    monkeypatch.setattr(DiffusionModule, "training_step", step)

    def read(folder: Path) -> dict[int, list[str]]:
        samples = defaultdict(list)
        for path in folder.glob("used.*"):
            for line in path.read_text().splitlines():
                step, rows = json.loads(line)
                samples[step] += rows
        return {step: sorted(rows) for step, rows in samples.items()}

    return read


def progress(folder: Path) -> tuple:
    """Steps, images, and which steps were logged, scored and saved."""
    last = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    logged = [line.split(",")[0] for line in (folder / "metrics.csv").read_text().splitlines()]
    scored = [score["step"] for score in json.loads((folder / "scores.json").read_text())]
    saved = sorted(path.name for path in (folder / "checkpoints").iterdir())
    return last["global_step"], last["progress"]["images_seen"], logged, scored, saved


def fixed_noise(self: WeakToStrongObjective, x: torch.Tensor):
    """Noise and timestep of a sample that depend on it alone."""
    t = (x.flatten(1).double().sum(1) * 7.3).sin().abs().float()
    return self.interpolant.corrupt(x, (100 * x + torch.arange(64.0).view(8, 8)).sin(), t)


BATCH = ("--data.global_batch_size=16", "--trainer.val_check_interval=2", "--data.num_generated=8")
ONE_SETTING = ("-c", "configs/weak/none.yaml", "--model.label_dropout=0", *BATCH)
DDP = ("--trainer.devices=2", "--trainer.strategy=ddp_fork")


@pytest.mark.slow
def test_one_run_on_one_and_two_processes(command, used, monkeypatch, caplog):
    """Samples, steps and records are equal; with fixed noise weights are, but for rounding."""
    caplog.set_level("INFO")
    monkeypatch.setattr(WeakToStrongObjective, "draw", fixed_noise)
    whole = command("fit", *ONE_SETTING, folder="whole")
    parts = command("fit", *ONE_SETTING, "--data.batch_size=9", folder="parts")
    assert "global batch 16: 1 processes x 2 parts x 8 rows" in caplog.text
    two = command("fit", *ONE_SETTING, "--data.batch_size=4", *DDP, folder="two")
    first = torch.load(whole / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    for folder in (parts, two):
        assert used(folder) == used(whole) and len(used(folder)) == 6
        assert progress(folder) == progress(whole)
        state = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for name, value in state.items():
            torch.testing.assert_close(value, first[name], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_going_on_with_other_parts(command, used):
    """Stopped at step 3 of 6, inside an interval of 2; then on in 4 parts, and in 1."""
    whole = command("fit", *BATCH, folder="whole")
    for most in (4, 16):
        folder = f"part{most}"
        command("fit", *BATCH, "--data.batch_size=8", "--trainer.max_steps=3", folder=folder)
        part = command(
            "fit", *BATCH, f"--data.batch_size={most}", "--ckpt_path=last", folder=folder
        )
        assert used(part) == used(whole)
        assert progress(part)[:4] == progress(whole)[:4]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options, message",
    [
        (["--data.global_batch_size=0"], "data.global_batch_size=0: must be at least 1"),
        (
            ["--data.global_batch_size=15", "--trainer.devices=2", "--trainer.strategy=ddp"],
            "data.global_batch_size=15: must be a multiple of the number of processes, 2",
        ),
        (
            ["--data.global_batch_size=16", "--trainer.accumulate_grad_batches=2"],
            "trainer.accumulate_grad_batches=2: must be left out beside data.global_batch_size=16",
        ),
    ],
)
def test_a_global_batch_that_cannot_be(command, tmp_path, options: list[str], message: str):
    with pytest.raises(SystemExit) as end:
        command("fit", *options)
    assert str(end.value).startswith(f"error: {message}") and "\n" not in str(end.value)
    assert not (tmp_path / "run").exists()
