"""The command: fast help, and one clear line for every user's error (faults row 18)."""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, sources

from w2s_train.checkpoint_file import digest_file

W = "--model.objective.init_args.segments"


def segments(*entries: str) -> str:
    null = "{class_path: w2s_train.weak.NullClass}"
    items = [
        f"{{class_path: w2s_train.segment.Extrapolation, init_args: {{{e}, weak: {null}}}}}"
        for e in entries
    ]
    return f"{W}=[{', '.join(items)}]"


def source(name: str, *options: str, scale: str = "0.3", more: str = "") -> str:
    """One segment over all timesteps with a weak source."""
    weak = f"{{class_path: w2s_train.weak.{name}, init_args: {{{', '.join(options)}}}}}"
    arguments = f"low: 0.0, high: 1.0, scale: {scale}, weak: {weak}{more}"
    segment = f"{{class_path: w2s_train.segment.Extrapolation, init_args: {{{arguments}}}}}"
    return f"{W}=[{segment}]"


def guidance(name: str, *options: str) -> str:
    arguments = f"{{{', '.join(options)}}}"
    return f"--model.guidance={{class_path: w2s_train.guidance.{name}, init_args: {arguments}}}"


# Options, and what the line must contain: the key, the value, what is allowed.
BAD = {
    "unknown key": (["--model.label_drop=0.1"], ["label_drop", "model accepts", "label_dropout"]),
    "unknown part": (["--modle.label_dropout=0.1"], ["modle", "keys are trainer, model, data"]),
    "unknown nested key": (
        ["--model.network.init_args.hiden_size=3"],
        ["hiden_size", "accepts", "hidden_size"],
    ),
    "abbreviated key": (["--trainer.max_step=3"], ["max_step"]),
    "wrong type": (["--model.label_dropout=abc"], ["model.label_dropout", "abc", "float"]),
    "wrong class": (["--model.sampler=w2s_train.weak.NullClass"], ["model.sampler"]),
    "missing class": (["--model.sampler.class_path=w2s_train.sampler.Foo"], ["Foo"]),
    "nan": (["--model.ema_decay=.nan"], ["model.ema_decay", "nan", "must be a number"]),
    "negative rate": (
        ["--model.optimizer.init_args.lr=-1"],
        ["model.optimizer.init_args.lr=-1", "at least 0"],
    ),
    "infinite rate": (["--model.optimizer.init_args.lr=.inf"], ["lr=inf", "finite"]),
    "bad betas": (["--model.optimizer.init_args.betas=[0.9, 1.5]"], ["optimizer", "1.5"]),
    "overlap": (
        [segments("low: 0.0, high: 0.5, scale: 0.1", "low: 0.4, high: 1.0, scale: 0.1")],
        ["segments=[0.0, 0.5) and [0.4, 1.0)", "must not overlap"],
    ),
    "inverted": (
        [segments("low: 0.8, high: 0.2, scale: 0.1")],
        ["segments[0].init_args.high=0.2", "(0.8, 1]"],
    ),
    "outside": ([segments("low: -0.2, high: 0.2, scale: 0.1")], ["low=-0.2", "[0, 1)"]),
    "beyond one": ([segments("low: 0.2, high: 1.2, scale: 0.1")], ["high=1.2", "1]"]),
    "scale one": ([segments("low: 0.0, high: 1.0, scale: 1.0")], ["scale=1.0", "[0, 0.9)"]),
    "scale above one": ([segments("low: 0.0, high: 1.0, scale: 1.5")], ["scale=1.5"]),
    "unstable average": ([source("EMA", scale="0.85")], ["scale=0.85", "[0, 0.8) for EMA"]),
    "missing weak checkpoint": (
        [source("Checkpoint", "path: none.ckpt")],
        ["weak.init_args.path=none.ckpt", "existing file"],
    ),
    "foreign weak checkpoint": (
        [source("Checkpoint", "path: data/digits/reference.npz")],
        ["path=data/digits/reference.npz", "cannot be read"],
    ),
    "no such block to skip": (
        [source("LayerSkip", "blocks: [0, 9]")],
        ["blocks=[0, 9]", "[0, 1]"],
    ),
    "no such block to tap": ([source("IntermediateHead", "block: 7")], ["block=7", "[0, 0]"]),
    "late snapshot": (
        [source("Snapshot", "step: 6")],
        ["weak.init_args.step=6", "before the last step, 6"],
    ),
    "half a snapshot step": ([source("Snapshot", "step: 2.5")], ["step=2.5", "share"]),
    "late start": (
        [source("NullClass", more=", schedule: {start_step: 50}")],
        ["start_step=50", "before the last step, 6"],
    ),
    "negative ramp": (
        [source("NullClass", more=", schedule: {ramp_steps: -3}")],
        ["ramp_steps=-3", "number of steps"],
    ),
    "large weak network": (
        [source("CoTrained", "network: {class_path: w2s_train.models.DiT}")],
        ["network=", "input_size 32, must have 8"],
    ),
    "no co-training": ([source("CoTrained", "every: 0")], ["every=0", "at least 1"]),
    "averaged head": (
        [source("IntermediateHead", "block: 0", more=", from_average: true")],
        ["from_average=True", "without parameters of its own"],
    ),
    "unlabelled null class": (
        ["--model.label_dropout=1.0", source("NullClass")],
        ["model.label_dropout=1.0", "NullClass"],
    ),
    "unlabelled guidance": (
        ["--model.label_dropout=1.0", "-c", "configs/weak/branch.yaml"]
        + [guidance("ClassifierFree", "scale: 2.0")],
        ["label_dropout=1.0", "ClassifierFree"],
    ),
    "guidance without a source": (
        ["-c", "configs/weak/none.yaml", guidance("Autoguidance", "scale: 1.5")],
        ["weak=None", "must be given"],
    ),
    "guidance without a state": (
        [guidance("Autoguidance", "scale: 1.5", "weak: {class_path: w2s_train.weak.Snapshot}")],
        ["weak=Snapshot", "must be null"],
    ),
    "unlearned guidance": ([guidance("Learned")], ["path=None", "GuidanceObjective"]),
    "missing learned guidance": (
        [guidance("Learned", "path: none.ckpt")],
        ["path=none.ckpt", "existing file"],
    ),
    "no such guidance": ([guidance("Magic")], ["Magic"]),
    "guidance border": (
        ["-c", "configs/guidance/segmented.yaml", "--model.guidance.init_args.border=1.5"],
        ["border=1.5", "(0, 1)"],
    ),
    "untrained null class": (
        ["--model.label_dropout=0.0", source("NullClass")],
        ["model.label_dropout=0.0", "above 0 for NullClass"],
    ),
    "no such seed": (["--seed_everything=-1"], ["seed_everything=-1", "[0, 4294967295]"]),
    "no steps": (["--trainer.max_steps=0"], ["trainer.max_steps=0", "at least 1"]),
    "no epochs": (["--trainer.check_val_every_n_epoch=0"], ["check_val_every_n_epoch=0"]),
    "no devices": (["--trainer.devices=abc"], ["trainer: `devices`"]),
    "nothing to score": (["--model.scored_weights=[]"], ["scored_weights=[]", "at least one"]),
    "not UTF-8": (["-c", "tests/golden/sit_forward.npz"], ["must be YAML"]),
    "plan": (["--model.objective.init_args.total_steps=0"], ["total_steps=0", "at least 1"]),
    "patch size": (
        ["--model.network.init_args.patch_size=3"],
        ["model.network.init_args.patch_size=3", "must divide input_size=8"],
    ),
    "heads": (["--model.network.init_args.num_heads=5"], ["num_heads=5", "hidden_size"]),
    "classes": (["--data.num_classes=9"], ["data.num_classes=9", "10"]),
    "dropout": (["--model.label_dropout=1.5"], ["model.label_dropout=1.5", "[0, 1]"]),
    "decay": (["--model.ema_decay=1.0"], ["model.ema_decay=1.0", "[0, 1)"]),
    "steps": (["--model.sampler.init_args.steps=0"], ["steps=0", "at least 1"]),
    "batch size": (["--data.batch_size=0"], ["data.batch_size=0", "at least 1"]),
    "half weights": (["--trainer.precision=bf16-true"], ["trainer.precision=bf16-true", "mixed"]),
    "no such script": (["--data.prepare=mnist5"], ["data.prepare=mnist5", "digits"]),
    "missing shards": (
        ["--data.prepare=null", "--data.train_urls=none/*.tar"],
        ["data.train_urls=none/*.tar", "existing"],
    ),
    "missing checkpoint": (["--ckpt_path=none.ckpt"], ["ckpt_path=none.ckpt", "existing file"]),
    "missing config": (["-c", "none.yaml"], ["none.yaml"]),
    "missing weights": (
        ["--trainer.callbacks.init_args.features.init_args.weights=none.safetensors"],
        ["none.safetensors"],
    ),
    "missing reference": (
        ["--data.prepare=null", "-c", "tests/missing_reference.yaml"],
        ["reference=none.npz", "existing file"],
    ),
    "no optimizer": (["--model.optimizer=null"], ["model.optimizer", "callable"]),
    "no interval": (
        ["--trainer.val_check_interval=0"],
        ["val_check_interval=0", "least 1"],
    ),
    "half an interval": (["--trainer.val_check_interval=0.5"], ["val_check_interval=0.5", "whole"]),
    "devices": (["--trainer.accelerator=tpux"], ["tpux"]),
}


@pytest.mark.fault("18  bad configuration")
@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, command, capsys, tmp_path: Path):
    options, expected = BAD[case]
    for name in re.findall(r"w2s_train\.weak\.(\w+)", " ".join(options)):
        getattr(sources, name)  # skips where its file is gone
    with pytest.raises(SystemExit) as stop:
        command("fit", *options)
    message = str(stop.value.code)
    assert message.startswith("error: ")
    assert "\n" not in message
    for part in expected:
        assert part in message, message
    assert not (tmp_path / "run").exists()


def test_scoring_needs_a_checkpoint(command):
    for options, expected in (
        ([], "ckpt_path=null: validate needs"),
        (["--ckpt_path=last"], "ckpt_path=last: there is no"),
    ):
        with pytest.raises(SystemExit, match=re.escape(f"error: {expected}")):
            command("validate", *options)


def test_two_fits_in_one_folder(command):
    """A lock keeps a second fit out, and goes when the first one ends."""
    from filelock import FileLock

    folder = command("fit")
    with FileLock(folder.parent / ".run.lock"):
        with pytest.raises(SystemExit, match="another fit is writing there"):
            command("fit")
    command("fit")


def test_help_is_fast():
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "w2s_train", "--help"], capture_output=True, text=True, cwd=ROOT
    )
    assert time.monotonic() - began < 2
    assert done.returncode == 0
    for word in ("fit", "validate", "test", "predict", "configs/digits_w2s.yaml"):
        assert word in done.stdout


def test_unknown_commands():
    done = subprocess.run(
        [sys.executable, "-m", "w2s_train", "train"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 1
    assert (
        done.stderr
        == "error: command=train: must be one of fit, validate, test, predict, sample, reference, "
        "export, compare\n"
    )


def test_test_scores_and_predict_writes(command):
    folder = command("fit")
    before = (folder / "config.yaml").read_text()
    command("test", "--ckpt_path=last")
    command("predict", "--ckpt_path=last", "--data.num_generated=12")
    images = sorted(path.name for path in (folder / "samples").iterdir())
    assert images == [f"{seed:06d}-{seed % 10}.png" for seed in range(12)]
    assert (folder / "config.yaml").read_text() == before
    assert not (folder / "lightning_logs").exists()


def test_the_saved_config_repeats_the_run(command, monkeypatch, tmp_path: Path):
    import torch

    from w2s_train.cli import main

    folder = command("fit", "-c", "configs/weak/sgg_reversed.yaml")
    again = tmp_path / "again"
    options = ["--trainer.default_root_dir", str(again)]
    main(["fit", "-c", str(folder / "config.yaml"), *options])
    first, second = (
        torch.load(f / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for f in (folder, again)
    )
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_the_command_line_wins_over_the_checkpoint(command):
    """Lightning's own CLI would score with the checkpoint's sampler and guidance."""
    import json

    folder = command("fit")
    guidance = "{class_path: w2s_train.guidance.ClassifierFree, init_args: {scale: 2.0}}"
    command("validate", "--ckpt_path=last", f"--model.guidance={guidance}")
    last = json.loads((folder / "scores.json").read_text())[-1]
    assert last["guidance"] == "cfg(2, [0, 1])"


def test_the_run_folder_is_named_after_the_configs(tmp_path: Path, monkeypatch):
    from types import SimpleNamespace

    from w2s_train.command.run import run_folder

    trainer = SimpleNamespace(default_root_dir=None)
    configs = ["configs/digits_w2s.yaml", "configs/weak/mg.yaml"]
    config = SimpleNamespace(trainer=trainer, ckpt_path=None, config=configs)
    assert run_folder(config) == Path("runs/digits_w2s+mg")
    config.ckpt_path = "runs/other/checkpoints/last.ckpt"
    assert run_folder(config) == Path("runs/other")


def test_logs_hold_what_people_expect(command):
    folder = command("fit", "-c", "configs/weak/sgg_reversed.yaml")
    columns = (folder / "metrics.csv").read_text().splitlines()[0].split(",")
    expected = {"step", "train/loss", "train/gradient_norm", "train/learning_rate"}
    expected |= {f"train/quarter_{q}/strong_loss" for q in ("0-0.25", "0.75-1")}
    for part in ("strong", "weak", "difference"):
        expected |= {f"train/t_0.2-1/{part}_{kind}" for kind in ("rms", "max")}
    expected |= {"train/t_0.2-1/effective_scale", "train/t_0-0.2/strong_loss", "val/fd_digits"}
    assert expected <= set(columns)
    files = {path.name.split(".")[0] for path in folder.iterdir()}
    assert {"config", "environment", "scores", "metrics", "events", "grids"} <= files


def test_checkpoints_run_no_code(command, tmp_path: Path):
    """Faults row 19: a pickled call in a checkpoint is not made."""
    import torch

    class Call:
        def __reduce__(self) -> tuple:
            return (Path(tmp_path / "sentinel").touch, ())

    folder = command("fit")
    path = folder / "checkpoints" / "last.ckpt"
    torch.save(torch.load(path, weights_only=True) | {"evil": Call()}, path)
    with pytest.warns(UserWarning, match="step-000006.ckpt: its SHA-256 is another; an earlier"):
        command("validate", "--ckpt_path=last")
    digest_file(path.resolve()).unlink()
    with pytest.raises(SystemExit, match="path=.*step-000006.ckpt: cannot be read"):
        command("validate", "--ckpt_path=last")
    assert not (tmp_path / "sentinel").exists()


def test_checkpoints_must_fit(command):
    command("fit")
    with pytest.raises(SystemExit, match="ckpt_path=.*: must fit the config; .*size mismatch"):
        command("validate", "--ckpt_path=last", "--model.network.init_args.hidden_size=24")


YAML = {
    "unknown key": ("data: {batchsize: 3}", ["data.batchsize", "data accepts", "batch_size"]),
    "wrong type": ("data: {batch_size: many}", ["data.batch_size", "int", "many"]),
    "key twice": (
        "trainer:\n  max_steps: 3\n  max_steps: 4\n",
        ["max_steps: stands twice, again in line 3"],
    ),
    "key twice in a nested file": ("data: nested.yaml", ["batch_size: stands twice"]),
    "contains itself": ("model: &a {network: *a}", ["must be YAML", "Circular"]),
    "list as key": ("? [1, 2]\n: 3\n", ["must be YAML"]),
    "too deep": ("[" * 3000, ["must be YAML"]),
    "no yaml": ("trainer: [", ["must be YAML", "line"]),
    "nan": ("model: {label_dropout: .nan}", ["model.label_dropout=nan: must be a number"]),
}


@pytest.mark.fault("18  bad configuration")
@pytest.mark.parametrize("case", YAML)
def test_bad_yaml(case: str, command, tmp_path: Path):
    text, expected = YAML[case]
    (tmp_path / "nested.yaml").write_text("batch_size: 3\nbatch_size: 4\n")
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(SystemExit) as stop:
        command("fit", f"--config={tmp_path / 'bad.yaml'}")
    message = str(stop.value.code)
    assert message.startswith("error: ")
    assert "\n" not in message
    for part in expected:
        assert part in message, message


@pytest.mark.parametrize("key, value", [("in_channels", 3), ("input_size", 16)])
def test_data_of_another_shape(command, key: str, value: int):
    with pytest.raises(SystemExit, match=r"must fit the data, whose shape is \(1, 8, 8\)"):
        command("fit", f"--model.network.init_args.{key}={value}", "--trainer.callbacks=[]")
