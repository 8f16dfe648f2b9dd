"""Averages that are made after training: the reference's numbers, and those of runs."""

import errno
import json
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT
from faulty import bad_loss
from PIL import Image
from safetensors.torch import load_file
from test_compile import waits
from test_resume import assert_same, checkpoint, equal
from torch import nn

from w2s_train.callbacks import PowerAverages
from w2s_train.cli import main
from w2s_train.errors import PREEMPTED, UserError
from w2s_train.evaluation.fid import FID
from w2s_train.models import saved_network
from w2s_train.posthoc.power import WIDEST, exponent_of, mix, products, share
from w2s_train.posthoc.snapshots import combined
from w2s_train.posthoc.weights import Kept
from w2s_train.scores import read_scores
from w2s_train.signals import REQUESTS
from w2s_train.tune.space import Space

CALLBACK = "{class_path: w2s_train.callbacks.PowerAverages, init_args: {every: 2}}"
OPTIONS = [f"--trainer.callbacks+={CALLBACK}", "--trainer.val_check_interval=1000"]
OVERLAY = ["-c", "configs/ema/posthoc.yaml", "--trainer.val_check_interval=1000"]


@pytest.fixture(scope="module")
def golden(pytestconfig: pytest.Config) -> Any:
    """`phema.npz`: Karras et al.'s own code on a toy sequence; see its README.md."""
    return np.load(pytestconfig.getoption("--golden") / "phema.npz")


class Toy(nn.Module):
    """Weights (D,), as a network has them."""

    def __init__(self, weights: Any) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.tensor(weights))


def test_exponents(golden: Any):
    found = [exponent_of(std) for std in golden["std_to_exp/std"]]
    np.testing.assert_allclose(found, golden["std_to_exp/exp"], rtol=1e-12)
    found = [exponent_of(std) for std in golden["exp_to_std/std"]]
    np.testing.assert_allclose(found, golden["exp_to_std/exp"], rtol=1e-9, atol=1e-12)
    assert exponent_of(WIDEST) == pytest.approx(0, abs=1e-9)
    assert exponent_of(0.2887) == pytest.approx(0, abs=1e-9)  # as it is printed
    for std in (0.0, 0.3, math.nan):
        with pytest.raises(UserError, match=r"std=\S+: must be above 0 and at most 0.2887"):
            exponent_of(std)


def test_shares_and_products(golden: Any):
    pairs = zip(*(golden[f"beta/{name}"] for name in ("std", "t_delta", "t_next")), strict=True)
    found = [1 - share(exponent_of(std), delta, seen) for std, delta, seen in pairs]
    np.testing.assert_allclose(found, golden["beta/beta"], rtol=1e-12, atol=1e-15)
    a, b = ([exponent_of(std) for std in golden[f"correlation/{x}_std"]] for x in "ab")
    times = (golden[f"correlation/{x}_ofs"] for x in "ab")
    found = [products(*each) for each in zip(a, next(times), b, next(times), strict=True)]
    np.testing.assert_allclose(found, golden["correlation/value"], rtol=1e-12)


@pytest.mark.parametrize("run", ["even", "uneven"])
def test_averages_and_what_is_made_of_them(golden: Any, run: str):
    """Followed in float32, as runs do; put together in float64, as files are."""
    about = json.loads(str(golden["runs_json"]))[run]
    callback, network = PowerAverages(about["tracked_std"]), Toy(golden["init"])
    callback.averages = [[network.weights.data.float()] for _ in about["tracked_std"]]
    kept = []
    for step, (w, images) in enumerate(
        zip(golden["walk"], golden[f"run/{run}/batch"], strict=True), 1
    ):
        network.weights.data = torch.tensor(w)
        callback.update(network, int(images))
        if step in about["snapshot_step"]:
            kept.append([each[0].numpy().copy() for each in callback.averages])
    np.testing.assert_allclose(kept, golden[f"run/{run}/ema"], rtol=1e-4, atol=1e-5)
    for end, number in (("end", len(kept)), ("earlier", about["earlier"])):
        names = ("in_nimg", "in_std", "coefficients", "reconstructed")
        images, stds, expected, result = (golden[f"run/{run}/{end}/{name}"] for name in names)
        inputs = golden[f"run/{run}/ema"][:number].reshape(2 * number, -1)
        for i, std in enumerate(about["target_std"]):
            made = mix(stds, images, std, images[-1])
            np.testing.assert_allclose(made.coefficients, expected[:, i], rtol=1e-9, atol=1e-12)
            reads = [lambda name, x=x: torch.tensor(x) for x in inputs]
            parts = list(zip(made.coefficients, reads, strict=True))
            np.testing.assert_allclose(combined(parts, ["w"])["w"], result[i], rtol=1e-6)


def test_a_tracked_average_is_itself():
    """And more snapshots miss less."""
    misses = []
    for n in (2, 8, 32):
        stds, times = [0.05, 0.1] * n, np.repeat(np.arange(1, n + 1), 2)
        assert mix(stds, times, 0.1, n).miss < 1e-6
        misses.append(mix(stds, times, 0.2, n).miss)
    assert misses[0] > 0.4 and misses[2] < 0.01 and misses == sorted(misses, reverse=True)


def test_a_step_that_is_passed_over_changes_nothing():
    """Also if it is the first, and whoever knows of it: host or device."""
    results = []
    for bad in ([], [False], [torch.tensor(False)]):
        network, callback = Toy([1.0, 2.0]), PowerAverages()
        callback.averages = [[network.weights.detach().clone()] for _ in callback.stds]
        for good in (*bad, torch.tensor(True), True, *bad, True):
            if good is not False and bool(good):
                network.weights.data = network.weights.data + 1
            callback.update(network, 16, good)
        results.append(callback.state_dict())
    assert equal(results[0], results[1]) and equal(results[0], results[2])
    assert results[0]["time"] == 48


def test_what_is_refused():
    for bad in (dict(every=0), dict(stds=[0.1]), dict(stds=[0.1, 0.1]), dict(stds=[0.1, 0.5])):
        with pytest.raises(UserError, match="every=|stds=|std="):
            PowerAverages(**bad)  # type: ignore[arg-type]
    callback = PowerAverages()
    with pytest.raises(UserError, match=r"stds=\[0.05, 0.1\]: must be \[0.05, 0.2\], as in"):
        callback.load_state_dict(PowerAverages([0.05, 0.2]).state_dict())


def test_a_full_disk_costs_a_snapshot_and_not_the_run(tmp_path: Path, monkeypatch):
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("w2s_train.posthoc.averages.write", full)
    module: Any = SimpleNamespace(network=Toy([1.0, 2.0]), device="cpu", images_seen=0, good=True)
    trainer: Any = SimpleNamespace(global_step=0, is_global_zero=True, default_root_dir=tmp_path)
    for max_steps, expected in ((1800, 36), (-1, 1000), (8, 1)):  # also the last: every step
        trainer.max_steps, callback = max_steps, PowerAverages()
        callback.on_train_start(trainer, module)
        assert callback.apart == expected
    trainer.global_step, module.images_seen = 1, 16
    with pytest.warns(UserWarning, match="No space left.*training goes on without this snapshot"):
        callback.on_train_batch_end(trainer, module, None, None, 0)
    assert callback.time == 16


def files(folder: Path) -> dict[str, Any]:
    """All snapshots of a run, by name."""
    return {path.name: load_file(path) for path in sorted((folder / "posthoc").glob("*"))}


@pytest.mark.slow
@pytest.mark.parametrize("devices", [pytest.param(1, marks=pytest.mark.long), 2])
def test_a_run_goes_on_bit_for_bit(command, devices: int):
    """With the snapshots that it makes after."""
    options = [*OPTIONS, f"--trainer.devices={devices}", "--checkpoint.every_n_train_steps=5"]
    options += ["--trainer.strategy=ddp_fork"] * (devices > 1)
    whole = command("fit", *options, "--trainer.max_steps=8", folder="whole")
    first = command("fit", *options, "--trainer.max_steps=5", folder="first")
    start = f"--ckpt_path={first}/checkpoints/last.ckpt"
    part = command("fit", *options, "--trainer.max_steps=8", start, folder="part")
    assert_same(checkpoint(whole), checkpoint(part))
    states = [checkpoint(folder)["callbacks"]["PowerAverages"] for folder in (whole, part)]
    assert equal(*states) and states[0]["time"] == 8 * 16 * devices
    assert [*files(whole)] == [
        f"step-{k:06d}-std-{s}.safetensors" for k in (2, 4, 6, 8) for s in (0.05, 0.1)
    ]
    assert equal(files(whole), files(first) | files(part))


@pytest.mark.slow
@pytest.mark.long
def test_no_host_waits(command, monkeypatch):
    """And a host that learns late of bad steps changes no digit, nor does the callback one."""
    bad_loss(dict.fromkeys((0, 2, 5), math.nan), patch=monkeypatch.setattr)
    without = command("fit", OPTIONS[1], "--trainer.max_steps=6", folder="without")
    at_once = command("fit", *OPTIONS, "--trainer.max_steps=6", folder="at_once")
    monkeypatch.setattr("w2s_train.running.guard.waits_cost", lambda trainer: True)
    late = command("fit", *OPTIONS, "--trainer.max_steps=6", folder="late")
    for folder in (without, late):
        assert_same(checkpoint(at_once), checkpoint(folder))
    assert equal(*(checkpoint(each)["callbacks"]["PowerAverages"] for each in (at_once, late)))
    assert equal(files(at_once), files(late))
    never = OPTIONS[0].replace("every: 2", "every: 999")
    assert waits(command, monkeypatch, never, OPTIONS[1], "--trainer.max_steps=6") == []
    command("fit", *OVERLAY, "--trainer.max_steps=6")
    assert "PowerAverages" in checkpoint(late.parent / "run")["callbacks"]


@pytest.mark.slow
def test_a_run_that_goes_back_forgets_what_came_later(command, monkeypatch):
    bad_loss(dict.fromkeys((4, 5, 6), math.nan), patch=monkeypatch.setattr)
    options = [*OPTIONS, "--guard.patience=3", "--checkpoint.every_n_train_steps=3"]
    folder = command("fit", *options, "--trainer.max_steps=9")
    steps = sorted({int(name[5:11]) for name in files(folder)})
    assert steps == [2, 8]  # of 4 and 6 the weights were given up
    state = checkpoint(folder)["callbacks"]["PowerAverages"]
    assert state["time"] == 16 * 5  # three steps before, two after


# ---- lightning ema --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kept(fits, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with snapshots at the steps 2, 4 and 6."""
    made = fits(*OPTIONS)
    return shutil.copytree(made, tmp_path_factory.mktemp("kept") / "run", symlinks=True)


@pytest.fixture
def run(kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(ROOT)
    return shutil.copytree(kept, tmp_path / "kept", symlinks=True)


def ema(run: Path, *options: str) -> dict:
    main(["ema", str(run), "--std=0.05:0.15", "--points=3", "--images=40", *options])
    return json.loads((run / "ema" / "step-000006" / "result.json").read_text())


@pytest.mark.slow
def test_the_curve(run: Path, capsys, monkeypatch):
    """Its best weights score the same by the run's own scorer, and say what they are."""
    result = ema(run)
    assert [each["std"] for each in result["curve"]] == [0.05, 0.0866, 0.15]
    values = [each["value"] for each in result["curve"]]
    assert len({*values, result["own"]}) == 4
    assert result["best"] == result["curve"][values.index(min(values))]["std"]
    assert result["curve"][0]["miss"] < 1e-6 < result["curve"][2]["miss"]
    text = capsys.readouterr().out
    assert "own average" in text and "best.ckpt" in text
    with Image.open(run / "ema/step-000006/figure.png") as figure:
        assert figure.size[0] > 400
    # Nothing is generated twice, and more points go on.
    monkeypatch.setattr("w2s_train.tune.evaluator.Evaluator.score", None)
    assert ema(run) == result
    monkeypatch.undo()
    monkeypatch.chdir(ROOT)
    best = run / "ema/step-000006/best.ckpt"
    folder = run.parent / "scored"
    given = [f"--trainer.default_root_dir={folder}", f"--ckpt_path={best}"]
    given += ["--data.first_seed=2000000000", "--data.num_generated=40"]
    main(["validate", "-c", str(run / "config.yaml"), *given])
    score = read_scores(folder)[0]
    assert score.value == pytest.approx(result["fresh"]["best"], rel=1e-6)
    assert score.protocol.weights == f"ema std {result['best']:g}"
    assert score.protocol.ema_decay is None
    with pytest.raises(SystemExit, match="ckpt_path=.*: must be of training; use --start_from="):
        main(["fit", "-c", str(run / "config.yaml"), *given])
    start = [f"--start_from={best}", given[0] + "-new", "--trainer.max_steps=2"]
    main(["fit", "-c", str(run / "config.yaml"), *start])


@pytest.mark.slow
def test_weights_are_those_of_a_tracked_average(run: Path):
    """At a std that was followed; and those of an earlier checkpoint use no later snapshot."""
    state = checkpoint(run)
    made = Kept(run / "checkpoints/last.ckpt", saved_network(str(run / "checkpoints/last.ckpt")))
    assert [each.step for each in made.snapshots] == [2, 2, 4, 4]
    found = made.weights(0.1)
    followed = state["callbacks"]["PowerAverages"]["averages"][1]
    for value, expected in zip(found.values(), followed, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
    early = run / "checkpoints/step-000003.ckpt"
    assert [each.step for each in Kept(early, saved_network(str(early))).snapshots] == [2, 2]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options, message",
    [
        (["--std=0.3:0.1"], "std=0.3:0.1: must be LOW:HIGH with LOW < HIGH"),
        (["--std=0.1:0.4"], "std=0.4: must be above 0 and at most 0.2887"),
        (["--std=0.001"], "std=0.001: must be nearer to 0.05, 0.1, whose averages at 3 times miss"),
        (["--points=1"], "points=1: must be"),
        (["--images=1"], "images=1: must be"),
    ],
)
def test_bad_input(run: Path, options: list[str], message: str):
    with pytest.raises(SystemExit, match=re.escape(message)) as stop:
        ema(run, *options)
    assert "\n" not in str(stop.value.code) and not (run / "ema").exists()


@pytest.mark.slow
def test_snapshots_outlive_what_changes_no_weights(run: Path, command):
    """Memory was traded for time in the middle; and a kill has left half a file."""
    (run / "posthoc" / "step-000006-std-0.05.safetensors.7.partial").touch()
    folder = shutil.copytree(run, run.parent / "run", symlinks=True)
    more = ["--model.network.init_args.gradient_checkpointing=1", "--trainer.max_steps=8"]
    command("fit", *OPTIONS, *more, "--ckpt_path=last", folder=folder.name)
    assert not [*(folder / "posthoc").glob("*.partial")]
    network = saved_network(str(folder / "checkpoints/last.ckpt"))
    assert {each.step for each in Kept(folder / "checkpoints/last.ckpt", network).snapshots} == {
        2,
        4,
        6,
    }


def test_a_network_that_is_not_trained_has_no_averages():
    frozen = SimpleNamespace(network=nn.Linear(2, 2).requires_grad_(False))
    PowerAverages().setup(SimpleNamespace(), frozen, "validate")
    with pytest.raises(UserError, match="PowerAverages: must follow a network that is trained"):
        PowerAverages().setup(SimpleNamespace(), frozen, "fit")


@pytest.mark.slow
def test_runs_and_files_that_do_not_fit(run: Path, tiny_run: Path):
    with pytest.raises(SystemExit, match="must hold averages of w2s_train.callbacks.PowerAverages"):
        main(["ema", str(tiny_run)])
    path = next((run / "posthoc").iterdir())
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(SystemExit, match="must be a whole snapshot; remove it"):
        ema(run)


@pytest.mark.slow
def test_two_processes_and_a_stop_find_the_same(run: Path, monkeypatch):
    """What was stopped goes on after the last score."""
    result, calls, take = ema(run), [], FID.take

    def asked(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 4:  # of the second score
            REQUESTS.preempted = True
        take(*args)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(FID, "take", asked)
        ema(run, "--name=stopped")
    REQUESTS.reset()
    assert stop.value.code == PREEMPTED
    assert len((run / "ema/stopped/state.jsonl").read_text().splitlines()) == 2
    ema(run, "--name=stopped")
    ema(run, "--name=two", "--trainer.devices=2", "--trainer.strategy=ddp_fork")
    for name in ("stopped", "two"):
        again = json.loads((run / "ema" / name / "result.json").read_text())
        for key in ("own", "best", "fresh", "curve"):
            assert again[key] == result[key], (name, key)


@pytest.mark.slow
def test_tuning_searches_the_average_too(run: Path, capsys):
    """The winner's weights, guided by its overlay, score as it does."""
    main(["tune", str(run), "--search=scale=1:3", "--search=ema_std=0.05:0.15", "--images=540"])
    folder = run / "tune/cfg"
    result = json.loads((folder / "result.json").read_text())
    best = result["candidates"][0]["values"]
    assert {*best} == {"scale", "ema_std"} and "ema_std" not in result["settings"]["init_args"]
    assert result["about"]["stds"] == [0.05, 0.1]
    assert f"--ckpt_path {folder}/best.ckpt" in capsys.readouterr().out
    options = [f"--ckpt_path={folder}/best.ckpt", "--data.first_seed=2000000000"]
    options.append(f"--trainer.default_root_dir={run.parent / 'scored'}")
    main(["validate", "-c", f"{run}/config.yaml", "-c", f"{folder}/winner.yaml", *options])
    score = read_scores(run.parent / "scored")[0]
    assert score.value == pytest.approx(result["fresh"]["winner"][0], rel=1e-6)
    assert score.protocol.weights == f"ema std {best['ema_std']:g}"


def test_the_average_goes_with_every_guidance():
    spaces = [Space.of("cfg", [], averages=averages) for averages in (False, True)]
    names = [[each.name for each in space.parameters] for space in spaces]
    assert names[1] == [*names[0], "ema_std"]
    assert spaces[1].settings({"scale": 2.0, "ema_std": 0.1})["init_args"]["scale"] == 2.0
