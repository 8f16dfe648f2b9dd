"""Scores that do not depend on processes, batches or interruptions; several settings in one go."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT
from refusals import parsers_built_once
from torch.utils.data import Dataset

from w2s_train.clock import FitClock
from w2s_train.command.run import compose
from w2s_train.errors import PREEMPTED
from w2s_train.evaluation.scorer import Scorer
from w2s_train.features import ClassifierFeatures
from w2s_train.module import DiffusionModule
from w2s_train.shards.order import GenerationPlan, Remaining
from w2s_train.shards.workers import batches
from w2s_train.signals import REQUESTS

CALLBACKS = """
trainer:
  callbacks:
    - class_path: w2s_train.callbacks.FID
      init_args:
        reference: {reference}
        features:
          class_path: w2s_train.features.ClassifierFeatures
          init_args: {{weights: data/digits/classifier.safetensors}}
        metrics:
          - {{class_path: w2s_train.metrics.KernelDistance, init_args: {{subset_size: 40}}}}
          - {{class_path: w2s_train.metrics.PrecisionRecall}}
          - {{class_path: w2s_train.metrics.InceptionScore, init_args: {{splits: 2}}}}
          - {{class_path: w2s_train.metrics.ClassAgreement}}
    - class_path: w2s_train.callbacks.SampleGrid
      init_args: {{num_images: 20, columns: 10}}
    - {{class_path: w2s_train.callbacks.ResumableEvaluation, init_args: {{every: 0}}}}
"""
SETTINGS = """
model:
  scored_weights: [ema, raw]
  ema_decay: [0.5, 0.9]
  guidance:
    - {class_path: w2s_train.guidance.Unguided}
    - {class_path: w2s_train.guidance.ClassifierFree, init_args: {scale: 30.0}}
data: {sampling_seeds: 2, num_generated: 50}
"""


def scores(folder: Path) -> list[dict]:
    return json.loads((folder / "scores.json").read_text())


def numbers(entries: list[dict]) -> list[tuple]:
    return [
        (s["metric"], s["value"], s["weights"], s["guidance"], s["protocol"]["seeds"])
        for s in entries
    ]


def stop_at(monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """Break generation once, at its so-manieth call."""
    generate, calls = DiffusionModule.generate, []

    def broken(self, batch: list[int], *rest: Any):
        calls.append(batch)
        if len(calls) == call:
            raise RuntimeError("stopped")
        return generate(self, batch, *rest)

    monkeypatch.setattr(DiffusionModule, "generate", broken)


@pytest.fixture
def metrics(command, tmp_path: Path) -> Path:
    """An overlay with all metrics, and a reference that `lightning reference` made for it."""
    path = tmp_path / "metrics.yaml"
    path.write_text(CALLBACKS.format(reference=tmp_path / "reference.npz"))
    command("reference", "-c", str(path), "--keep_features=200")
    return path


@pytest.mark.slow
def test_all_settings_in_one_go(command, metrics: Path, tmp_path: Path):
    """Each setting and seed range scores as it does alone."""
    (tmp_path / "settings.yaml").write_text(SETTINGS)
    overlays = ["-c", str(metrics), "-c", str(tmp_path / "settings.yaml")]
    folder = command("fit", *overlays, "--model.label_dropout=0.5")
    fitted = len(scores(folder))
    assert fitted == 2 * 3 * 2 * 2 * 6  # evaluations, weights, guidances, seed ranges, metrics
    command("validate", *overlays, "--ckpt_path=last", "--data.generation_batch_size=7")
    every = numbers(scores(folder)[fitted:])
    assert every == numbers(scores(folder)[fitted // 2 : fitted])
    assert len({value for metric, value, *_ in every if metric == "fd_digits"}) == 12
    guided = (
        "--model.guidance={class_path: w2s_train.guidance.ClassifierFree, init_args: {scale: 30}}"
    )
    command("validate", *overlays, guided, "--model.scored_weights=[raw]", "--ckpt_path=last")
    alone = numbers(scores(folder)[-12:])
    assert alone == [s for s in every if s[2] == "raw" and s[3] != "none"]
    grids = sorted(path.name for path in (folder / "grids").glob("step-000006*"))
    assert len(grids) == 6 and "step-000006.png" in grids


@pytest.mark.slow
@pytest.mark.parametrize("size", ["32", "11"])
def test_an_interrupted_evaluation_goes_on(command, metrics: Path, monkeypatch, size: str):
    """The same scores and grid, and nothing is generated twice."""
    folder = command("fit", "-c", str(metrics))
    expected, grid = scores(folder)[-6:], (folder / "grids/step-000006.png").read_bytes()
    (folder / "grids/step-000006.png").unlink()
    generate, seeds = DiffusionModule.generate, []

    def watched(self, batch: list[int], *rest: Any):
        if len(seeds) >= 40 and not resumed:
            raise RuntimeError("stopped")
        seeds.extend(batch)
        return generate(self, batch, *rest)

    monkeypatch.setattr(DiffusionModule, "generate", watched)
    resumed = False
    arguments = ("validate", "-c", str(metrics), "--ckpt_path=last")
    arguments += (f"--data.generation_batch_size={size}",)
    with pytest.raises(RuntimeError, match="stopped"):
        command(*arguments)
    assert 40 <= len(seeds) < 90
    assert numbers(scores(folder)) != [] and len(list((folder / "evaluation").glob("*/*.pt"))) == 1
    resumed = True
    command(*arguments)
    assert sorted(seeds) == list(range(90))
    assert numbers(scores(folder)[-6:]) == numbers(expected)
    assert (folder / "grids/step-000006.png").read_bytes() == grid
    assert not (folder / "evaluation").exists()


@pytest.mark.slow
def test_stopped_again_where_processes_put_their_shares_together(command, metrics, monkeypatch):
    """What the first start left is not counted twice by the third."""
    folder = command("fit", "-c", str(metrics))
    expected = scores(folder)[-6:]
    arguments = ("validate", "-c", str(metrics), "--ckpt_path=last")
    stop_at(monkeypatch, call=2)
    with pytest.raises(RuntimeError, match="stopped"):
        command(*arguments)
    with monkeypatch.context() as patch:
        preempt = lambda *_: setattr(REQUESTS, "preempted", True)  # noqa: E731
        patch.setattr(Scorer, "on_validation_epoch_end", preempt)
        with pytest.raises(SystemExit) as end:
            command(*arguments)
    REQUESTS.reset()
    assert end.value.code == PREEMPTED and len(scores(folder)) == 12
    command(*arguments)
    assert numbers(scores(folder)[-6:]) == numbers(expected)
    assert scores(folder)[-1]["protocol"]["n"] == 90


@pytest.mark.slow
def test_another_checkpoint_does_not_take_over(command, metrics: Path, monkeypatch):
    """What an interrupted evaluation left belongs to its weights alone."""
    folder = command("fit", "-c", str(metrics))
    expected = numbers(scores(folder)[:6])
    generate = DiffusionModule.generate

    def broken(self, batch: list[int], *rest: Any):
        if batch[0] >= 32:
            raise RuntimeError("stopped")
        return generate(self, batch, *rest)

    monkeypatch.setattr(DiffusionModule, "generate", broken)
    with pytest.raises(RuntimeError, match="stopped"):
        command("validate", "-c", str(metrics), "--ckpt_path=last")
    monkeypatch.setattr(DiffusionModule, "generate", generate)
    command("validate", "-c", str(metrics), f"--ckpt_path={folder}/checkpoints/step-000003.ckpt")
    assert numbers(scores(folder)[-6:]) == expected


@pytest.mark.slow
@pytest.mark.parametrize("call", [2, 5])  # in the first evaluation, and in that of the last step
def test_a_fit_finishes_the_evaluation_it_was_stopped_in(
    command, metrics: Path, monkeypatch: pytest.MonkeyPatch, call: int
):
    """Lightning alone would go on with training, and the score would be missing."""
    whole = command("fit", "-c", str(metrics), folder="whole")
    stop_at(monkeypatch, call=call)
    with pytest.raises(RuntimeError, match="stopped"):
        command("fit", "-c", str(metrics))
    part = command("fit", "-c", str(metrics), "--ckpt_path=last")
    assert numbers(scores(part)) == numbers(scores(whole))
    assert [s["step"] for s in scores(part)] == [3] * 6 + [6] * 6
    states = [
        torch.load(f / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
        for f in (part, whole)
    ]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[1])


@pytest.mark.slow
@pytest.mark.long
def test_killed_in_the_middle_and_resumed_on_two_processes(command, metrics: Path):
    """SIGKILL, then two processes go on: the same scores."""
    folder = command("fit", "-c", str(metrics))
    expected = numbers(scores(folder)[-6:])
    arguments = ["-c", "configs/digits_w2s.yaml", "-c", "tests/tiny.yaml", "-c", str(metrics)]
    arguments += ["--ckpt_path", "last", "--trainer.default_root_dir", str(folder)]
    start = [sys.executable, "-m", "w2s_train", "validate", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    small = ["--data.generation_batch_size=1", "--model.sampler.init_args.steps=2"]
    process = subprocess.Popen([*start, *small], cwd=ROOT, env=environment)
    deadline = time.monotonic() + 120
    while not list((folder / "evaluation").glob("*/*.pt")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(scores(folder)) == 12
    two = ["--trainer.devices=2", "--trainer.strategy=ddp"]
    done = subprocess.run([*start, *two], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "of 90 images were taken in before" in done.stdout + done.stderr
    assert numbers(scores(folder)[-6:]) == expected


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.long)])
def test_processes_do_not_change_scores(command, metrics: Path, processes: int):
    """Faults row 17: every metric to the last digit, and the grid byte for byte."""
    folder = command("fit", "-c", str(metrics))
    grid = folder / "grids/step-000006.png"
    before = grid.read_bytes()
    grid.unlink()
    several = ["--trainer.strategy=ddp_fork", f"--trainer.devices={processes}"]
    several.append("--data.generation_batch_size=13")
    command("validate", "-c", str(metrics), "--ckpt_path=last", *several)
    assert len(scores(folder)) == 18
    assert numbers(scores(folder)[-6:]) == numbers(scores(folder)[-12:-6])
    assert grid.read_bytes() == before


@pytest.mark.slow
def test_resumable_evaluation_may_stand_anywhere(command, metrics: Path, monkeypatch):
    """Before the scorers it would mark images as done that they have not seen."""
    *head, last = metrics.read_text().rstrip().splitlines()
    metrics.write_text("\n".join([*head[:3], last, *head[3:]]))
    folder = command("fit", "-c", str(metrics))
    stop_at(monkeypatch, call=3)
    with pytest.raises(RuntimeError, match="stopped"):
        command("validate", "-c", str(metrics), "--ckpt_path=last")
    command("validate", "-c", str(metrics), "--ckpt_path=last")
    assert numbers(scores(folder)[-6:]) == numbers(scores(folder)[-12:-6])


@pytest.mark.slow
def test_a_learned_scale_belongs_to_the_key(command, metrics: Path, monkeypatch):
    """Checkpoints of one frozen network that differ in the guidance alone do not share images."""
    network = command("fit", folder="base") / "checkpoints/last.ckpt"
    options = ["-c", str(metrics), "-c", "configs/guidance/learned_fit.yaml"]
    options.append(f"--model.network.init_args.path={network}")
    folder = command("fit", *options)
    stop_at(monkeypatch, call=2)
    with pytest.raises(RuntimeError, match="stopped"):
        command("validate", *options, f"--ckpt_path={folder}/checkpoints/step-000003.ckpt")
    (left,) = (folder / "evaluation").iterdir()
    command("validate", *options, "--ckpt_path=last")
    assert list((folder / "evaluation").iterdir()) == [left]


@pytest.mark.slow
def test_a_part_of_the_images_is_counted_as_such(command, metrics: Path):
    """Lightning's own limit leaves batches out; the record must say so."""
    folder = command("fit", "-c", str(metrics))
    command("validate", "-c", str(metrics), "--ckpt_path=last", "--trainer.limit_val_batches=2")
    assert {s["protocol"]["n"] for s in scores(folder)[-6:]} == {64}
    assert scores(folder)[-1]["protocol"]["seeds"] == [0, 63]


@pytest.mark.slow
@pytest.mark.slow
def test_agreement_is_with_the_class_that_was_asked_for(command, metrics: Path, tmp_path: Path):
    """The images of `sample`, judged by hand."""
    folder = command("fit", "-c", str(metrics))
    command(
        "sample", "--ckpt_path=last", "--seeds=0:90", "--format=npz", f"--output={tmp_path}/s.npz"
    )
    judge = ClassifierFeatures("data/digits/classifier.safetensors")
    judge.load()
    with np.load(tmp_path / "s.npz") as made:
        x = torch.from_numpy(made["arr_0"][..., :1]).permute(0, 3, 1, 2)  # grey
    guesses = judge.probabilities(judge(x)).argmax(1)
    expected = (guesses == torch.arange(90) % 10).double().mean().item()
    found = {s["metric"]: s["value"] for s in scores(folder)[-6:]}
    assert found["agreement_digits"] == pytest.approx(expected, rel=1e-5)
    with pytest.raises(SystemExit, match="ClassAgreement: must know .* model.label_dropout=1 has"):
        command(
            "fit", "-c", "configs/weak/none.yaml", "-c", str(metrics), "--model.label_dropout=1"
        )


def test_unknown_metrics(command, metrics: Path):
    metrics.write_text(metrics.read_text().replace("PrecisionRecall", "Precision"))
    with pytest.raises(SystemExit, match="^error: .*w2s_train.metrics.Precision") as error:
        command("fit", "-c", str(metrics))
    assert "\n" not in str(error.value)


GRID = "{class_path: w2s_train.callbacks.SampleGrid, init_args: {num_images: 5}}"
FEW = f"--trainer.callbacks={GRID}"


@pytest.mark.slow
def test_no_image_is_planned_that_nobody_takes_in(digits: None, monkeypatch):
    """A grid asks for its own, once; who else looks at evaluations for all; nobody for nothing."""
    monkeypatch.chdir(ROOT)

    def plan(*options: str) -> tuple[float, int, int]:
        words = ["fit", "-c", "configs/digits_w2s.yaml", "-c", "tests/tiny.yaml", *options]
        with parsers_built_once():
            found = compose([*words, "--data.sampling_seeds=2"], run=False)
        data = found.datamodule
        return found.trainer.limit_val_batches, data.num_generated, data.sampling_seeds

    assert plan() == (1.0, 90, 2)  # a FID
    assert plan(FEW) == (1.0, 5, 1)
    assert plan("--trainer.callbacks=null") == (0, 90, 2)
    stopping = "{class_path: lightning.pytorch.callbacks.EarlyStopping, init_args: {monitor: x}}"
    assert plan(f"--trainer.callbacks=[{GRID},{stopping}]") == (1.0, 90, 2)


@pytest.mark.slow
def test_a_run_without_scorers_generates_nothing(command, monkeypatch):
    seeds = []
    generate = DiffusionModule.generate

    def note(module: Any, numbers: list[int], *args: Any) -> Any:
        seeds.extend(numbers)
        return generate(module, numbers, *args)

    monkeypatch.setattr(DiffusionModule, "generate", note)
    folder = command("fit", "--trainer.callbacks=[]")
    assert seeds == [] and (folder / "checkpoints" / "step-000006.ckpt").is_file()
    with pytest.raises(SystemExit, match="trainer.callbacks: must hold .*SampleGrid, for validate"):
        command("validate", "--trainer.callbacks=[]", "--ckpt_path=last")
    command("validate", FEW, "--ckpt_path=last")
    assert seeds == [0, 1, 2, 3, 4]


def test_shares_of_a_plan():
    """Whatever is done already and however many processes: every index once."""
    plan = GenerationPlan(range(100, 123), [3, 5])
    assert plan[4] == {"index": 4, "seed": 104, "label": 3, "setting": 0}
    for world_size in (1, 2, 3, 5):
        for done in (set(), {0, 1, 7}, set(range(22)), set(range(23))):
            found = []
            for rank in range(world_size):
                sampler = Remaining(plan, rank, world_size)
                sampler.done = done
                found += list(sampler)
            assert sorted(found) == sorted(set(range(23)) - done)


def test_clock(monkeypatch):
    """Evaluation is part of the wall clock, over restarts; scoring a finished run is not."""
    now = [0.0]
    monkeypatch.setattr("w2s_train.clock.time.monotonic", lambda: now[0])
    clock = FitClock()
    clock.start_evaluation()
    now[0] = 5.0
    assert clock.evaluation_seconds == 0
    clock.end_evaluation()
    clock.start()
    now[0] = 15.0
    clock.start_evaluation()
    now[0] = 18.0
    assert (clock.wall_clock, clock.evaluation_seconds, clock.training_seconds) == (13, 3, 10)
    clock.end_evaluation()
    again = FitClock()
    again.load_state_dict(clock.state_dict())
    again.start()
    now[0] = 20.0
    assert (again.wall_clock, again.training_seconds) == (15, 12)
    assert again.evaluation_share == pytest.approx(3 / 15)


def test_pace(monkeypatch):
    """Of the steps since the last call; evaluation and a step back are left out."""
    now, loader = [0.0], SimpleNamespace(waited=1.0)
    monkeypatch.setattr("w2s_train.clock.time.monotonic", lambda: now[0])
    clock = FitClock()
    clock.start()
    assert clock.pace(3, 30, loader) == {}
    now[0] = 10.0
    clock.start_evaluation()
    now[0], loader.waited = 17.0, 3.0
    clock.end_evaluation()
    names = ("time/step_seconds", "time/data_seconds", "time/images_per_second")
    assert clock.pace(7, 70, loader) == dict(zip(names, (2.5, 0.5, 4.0), strict=True))
    assert clock.pace(5, 50, loader) == {}
    now[0] = 18.0
    assert clock.pace(6, 60, [])["time/step_seconds"] == 1.0  # any loader will do


def test_waiting_for_batches_is_timed():
    """In the loader, whether or not workers read; what is done with a batch is not counted."""
    loader = batches(Slow(), range(3), workers=0, minutes=1)
    began = time.monotonic()
    for _ in loader:
        time.sleep(0.05)
    assert 0.06 <= loader.waited <= time.monotonic() - began - 0.15


class Slow(Dataset):
    def __getitem__(self, place: int) -> int:
        time.sleep(0.02)
        return place
