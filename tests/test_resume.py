"""Stopping and going on changes nothing: faults rows 1 and 6, as far as one machine shows them."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, lightning
from recipes import OVERLAYS, every_source, sources

from w2s_train.checkpoint_file import write_checkpoint
from w2s_train.module import DiffusionModule
from w2s_train.running.record import find_checkpoint


def checkpoint(folder: Path, name: str = "last") -> dict:
    return torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True)


def equal(one: Any, other: Any) -> bool:
    """Nested values with tensors, bit for bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(v, other[k]) for k, v in one.items())
    if isinstance(one, list):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


def assert_same(one: dict, other: dict) -> None:
    """Weights, averages, weak networks, optimizers: bitwise."""
    assert one["global_step"] == other["global_step"]
    assert one["progress"]["images_seen"] == other["progress"]["images_seen"]
    assert one["state_dict"].keys() == other["state_dict"].keys()
    for name, value in one["state_dict"].items():
        assert equal(value, other["state_dict"][name]), name
    assert equal(one["optimizer_states"], other["optimizer_states"])


@pytest.fixture(scope="module")
def resumed(fits, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[str]]:
    """A run of 8 steps with every weak source, one that was stopped after 5, and its log then."""
    options = [every_source(fits() / "checkpoints" / "last.ckpt"), "--data.flip=true"]
    options += ["--trainer.accumulate_grad_batches=2", "--trainer.val_check_interval=6"]
    options += ["--model.objective.init_args.total_steps=8", "--checkpoint.every_n_train_steps=5"]
    eight, last = "--trainer.max_steps=8", "--ckpt_path=last"
    folder = tmp_path_factory.mktemp("resumed")
    with pytest.MonkeyPatch.context() as patch:  # of so many panels, a third of the time
        patch.setattr("w2s_train.running.held_out.HeldOut.draw", lambda *_: None)
        whole = lightning("fit", folder / "whole", *options, eight)
        part = lightning("fit", folder / "part", *options, "--trainer.max_steps=5", last)
        before = (part / "metrics.csv").read_text().splitlines()
        return whole, lightning("fit", part, *options, eight, last), before


@pytest.mark.fault("1   stop and resume")
def test_resumed_equals_uninterrupted(resumed):
    """Stopped between two evaluations, when every schedule has begun; with accumulation."""
    whole, part, _ = resumed
    assert checkpoint(part)["global_step"] == 8
    assert_same(checkpoint(whole), checkpoint(part))
    final = [json.loads((folder / "scores.json").read_text())[-1] for folder in (whole, part)]
    assert final[0]["value"] == final[1]["value"]


@pytest.mark.slow
@pytest.mark.fault("1   stop and resume")
def test_drawn_scales_resume(command, fits):
    """Every source at all times, each with a drawn scale; with accumulation."""
    options = [every_source(fits() / "checkpoints" / "last.ckpt", drawn=True), "--data.flip=true"]
    options += ["--trainer.accumulate_grad_batches=2", "--trainer.val_check_interval=8"]
    options += ["--model.objective.init_args.total_steps=8", "--trainer.log_every_n_steps=1"]
    whole = command("fit", *options, "--trainer.max_steps=8", folder="whole")
    part = command("fit", *options, "--trainer.max_steps=5", folder="part")
    command("fit", *options, "--trainer.max_steps=8", "--ckpt_path=last", folder="part")
    assert_same(checkpoint(whole), checkpoint(part))
    name = "network.scale_embedder.mlps.%d.2.weight"
    state = checkpoint(part)["state_dict"]
    assert all(state[name % k].abs().sum() > 0 for k in range(len(sources())))


def test_sources_had_learned_when_they_were_saved(resumed):
    """Stopped between a snapshot and its refreshes, and between two steps of a small network."""
    name = "objective.segments.%d.weak.%s"
    snapshot, small = (sources().index(each) for each in ("Snapshot", "CoTrained"))
    before, after = (checkpoint(resumed[1], f"step-00000{n}")["state_dict"] for n in (5, 8))
    assert before[name % (small, "_extra_state")]["state"][0]["step"] == 2
    assert after[name % (small, "_extra_state")]["state"][0]["step"] == 4
    weights = name % (snapshot, "network.blocks.0.attn.qkv.weight")
    assert not torch.equal(before[weights], after[weights])  # of step 4, and refreshed at 8


def test_the_record_survives_a_resume(resumed):
    """metrics.csv and scores.json go on; nothing logged before is lost."""
    _, part, before = resumed
    after = (part / "metrics.csv").read_text().splitlines()
    for old, new in zip(csv.DictReader(before), csv.DictReader(after), strict=False):
        assert old.items() <= new.items()  # in a table that may have more columns by now
    assert {line.split(",")[0] for line in before[1:]} == set("12345")
    assert {line.split(",")[0] for line in after[1:]} == set("12345678")
    assert [s["step"] for s in json.loads((part / "scores.json").read_text())] == [3, 6]
    assert len(json.loads((part / "environment.json").read_text())) == 2


def test_last_says_what_it_found(tiny_run: Path, caplog):
    caplog.set_level("INFO")
    assert find_checkpoint("last", tiny_run / "none", "fit") is None
    assert (
        f"no {tiny_run}/none/checkpoints/last.ckpt yet: starting from the beginning" in caplog.text
    )
    assert find_checkpoint("last", tiny_run, "fit") == str(
        tiny_run / "checkpoints/step-000006.ckpt"
    )
    assert f"going on from {tiny_run}/checkpoints/last.ckpt (step-000006.ckpt)" in caplog.text


@pytest.mark.slow
@pytest.mark.fault("1   stop and resume")
@pytest.mark.parametrize("stop", [2, 3, pytest.param(5, marks=pytest.mark.long)])
@pytest.mark.parametrize("overlay", ["sgg_reversed", "separate"])
def test_resumed_anywhere(command, overlay: str, stop: int):
    """Stop between two evaluations, at one, and after one; with accumulation."""
    options = ["-c", f"configs/weak/{overlay}.yaml", "--trainer.accumulate_grad_batches=2"]
    options += ["--trainer.val_check_interval=6", "--data.flip=true"]
    whole = command("fit", *options, folder="whole")
    part = command("fit", *options, f"--trainer.max_steps={stop}", folder="part")
    assert checkpoint(part)["global_step"] == stop
    command("fit", *options, "--ckpt_path=last", folder="part")
    assert_same(checkpoint(whole), checkpoint(part))
    final = [json.loads((f / "scores.json").read_text())[-1] for f in (whole, part)]
    assert final[0]["value"] == final[1]["value"]
    assert [s["step"] for s in final] == [6, 6]


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.fault("1   stop and resume")
@pytest.mark.parametrize("recipe", OVERLAYS)
def test_every_recipe_resumes(command, recipe: str):
    """Stopped at step 5 of 8: every schedule has begun, and a co-trained network has learned."""
    options = ["-c", f"configs/weak/{recipe}.yaml", "--trainer.val_check_interval=8"]
    options += ["--model.objective.init_args.total_steps=8", "--data.num_generated=8"]
    whole = command("fit", *options, "--trainer.max_steps=8", folder="whole")
    command("fit", *options, "--trainer.max_steps=5", folder="part")
    part = command("fit", *options, "--trainer.max_steps=8", "--ckpt_path=last", folder="part")
    assert_same(checkpoint(whole), checkpoint(part))


@pytest.mark.slow
def test_a_file_does_not_say_whether_steps_are_fused(command):
    """Those of before they were resume, and go on fused: the host waits for nothing."""
    options = ["-c", "configs/weak/separate.yaml", "--trainer.val_check_interval=1000"]
    whole = command("fit", *options, "--trainer.max_steps=8", folder="whole")
    part = command("fit", *options, "--trainer.max_steps=5", folder="part")
    content = checkpoint(part)
    weak = [v for k, v in content["state_dict"].items() if k.endswith("weak._extra_state")]
    states = [*content["optimizer_states"], *(state for state in weak if state)]
    assert len(states) == 2
    for state in states:
        state["param_groups"][0]["fused"] = None
    write_checkpoint(content, part / "checkpoints/step-000005.ckpt")
    command("fit", *options, "--trainer.max_steps=8", "--ckpt_path=last", folder="part")
    assert_same(checkpoint(whole), checkpoint(part))


@pytest.mark.slow
def test_a_fresh_fit_moves_the_earlier_run_aside(command, tiny_run: Path, capsys):
    first = (tiny_run / "scores.json").read_text()
    folder = command("fit", "--seed_everything=1")
    assert (folder.with_name("run.1") / "scores.json").read_text() == first
    assert (folder / "scores.json").read_text() != first
    assert "it is now" in capsys.readouterr().out


@pytest.mark.slow
def test_a_checkpoint_of_another_run_starts_a_new_one(command, tiny_run: Path, tmp_path: Path):
    """It continues from there, in a folder of its own; an earlier run there is moved aside."""
    second = shutil.copytree(tiny_run, tmp_path / "second", symlinks=True)
    command("fit", f"--ckpt_path={tiny_run}/checkpoints/step-000003.ckpt", folder="second")
    assert (second.with_name("second.1") / "scores.json").is_file()
    assert [s["step"] for s in json.loads((second / "scores.json").read_text())] == [6]
    assert_same(checkpoint(tiny_run), checkpoint(second))


def test_checkpoints_rebuild_the_module(tiny_run: Path):
    """`load_from_checkpoint` needs no arguments, and generates the same images."""
    path = tiny_run / "checkpoints" / "last.ckpt"
    first = DiffusionModule.load_from_checkpoint(path, map_location="cpu", weights_only=True)
    again = DiffusionModule.load_from_checkpoint(path, map_location="cpu", weights_only=True)
    state = checkpoint(tiny_run)["state_dict"]
    for name, value in first.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert torch.equal(first.generate([5], [5]), again.generate([5], [5]))


def launch(folder: Path, *options: str, name: str = "fit") -> subprocess.Popen:
    command = [sys.executable, "-m", "w2s_train", name]
    for config in ("configs/digits_w2s.yaml", "tests/tiny.yaml"):
        command += ["-c", config]
    command += ["--trainer.default_root_dir", str(folder), *options]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # so that the signal reaches it and its children, as a terminal's
    )


def wait_for(path: Path, process: subprocess.Popen, lines: int) -> None:
    deadline = time.monotonic() + 120
    while not path.is_file() or len(path.read_text().splitlines()) < lines:
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline, "training did not start"
        time.sleep(0.05)


@pytest.mark.fault("6   SIGINT to all processes")
@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("processes", [1, 2])
def test_ctrl_c(tmp_path: Path, processes: int):
    """SIGINT: status 130, a loadable checkpoint of the step where it stopped, and it goes on."""
    options = ["--trainer.max_steps=100000", "--trainer.val_check_interval=50000"]
    options += [f"--trainer.devices={processes}", "--data.num_workers=2"]
    options += ["--trainer.strategy=ddp"] if processes > 1 else []
    process = launch(tmp_path / "run", *options)
    wait_for(tmp_path / "run" / "metrics.csv", process, lines=12)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output
    stopped = checkpoint(tmp_path / "run")["global_step"]
    assert f"stopped at step {stopped}; continue with --ckpt_path last" in output
    options[:2] = [f"--trainer.max_steps={stopped + 3}", "--checkpoint.every_n_train_steps=1"]
    process = launch(tmp_path / "run", *options, "--ckpt_path=last")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert checkpoint(tmp_path / "run")["global_step"] == stopped + 3


@pytest.mark.slow
@pytest.mark.long
def test_two_processes(tmp_path: Path):
    """DDP trains on two CPU processes; one and two of them score alike, to the last digit."""
    folder = tmp_path / "run"
    ddp = ("--trainer.devices=2", "--trainer.strategy=ddp", "--data.generation_batch_size=7")
    runs = [("fit", *ddp), ("validate", *ddp, "--ckpt_path=last"), ("validate", "--ckpt_path=last")]
    for name, *options in runs:
        output, _ = (process := launch(folder, *options, name=name)).communicate(timeout=240)
        assert process.returncode == 0, output
    scores = json.loads((folder / "scores.json").read_text())
    assert [s["step"] for s in scores] == [3, 6, 6, 6]
    assert len({s["value"] for s in scores[1:]}) == 1
    assert scores[1]["protocol"]["images_seen"] == 2 * 6 * 16


@pytest.mark.fault("1   stop and resume")
@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("recipe", OVERLAYS)
def test_every_recipe_resumes_on_two_processes(command, tmp_path: Path, recipe: str):
    """The same with DDP; the second process is a fork of this one, which spares its imports."""
    shared = ["-c", f"configs/weak/{recipe}.yaml", "--trainer.val_check_interval=8"]
    shared += ["--model.objective.init_args.total_steps=8", "--data.num_generated=8"]
    shared += ["--trainer.devices=2", "--trainer.strategy=ddp_fork"]
    shared += ["--trainer.max_steps=8", "--checkpoint.every_n_train_steps=5"]
    fifth = f"--ckpt_path={tmp_path}/whole/checkpoints/step-000005.ckpt"
    for folder, options in (("whole", []), ("part", [fifth])):
        command("fit", *shared, *options, folder=folder)
        started = json.loads((tmp_path / folder / "environment.json").read_text())[-1]
        assert started["processes"] == 2
    assert_same(checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "part"))
