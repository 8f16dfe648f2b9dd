"""The command: fast answers, and one clear line for every user's error (faults row 18)."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, quick, sources
from filelock import FileLock
from refusals import PARSERS, refusal

from w2s_train.checkpoint_file import digest_file
from w2s_train.cli import EXPORT_HELP, HELP, main
from w2s_train.command.config import KEYS, PARTS
from w2s_train.command.run import CLASSES, Command, run_folder

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


def fid(weights: str, reference: str) -> list[str]:
    """Scores of the digits, whose files must be there at once."""
    features = f"{{class_path: w2s_train.features.ClassifierFeatures, init_args: {{{weights}}}}}"
    arguments = f"{{reference: {reference}, features: {features}}}"
    callback = f"{{class_path: w2s_train.callbacks.FID, init_args: {arguments}}}"
    return ["--data.prepare=null", f"--trainer.callbacks={callback}"]


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
    "no network": (
        ["--model.network=w2s_train.models.FinalLayer"],
        ["class_path=w2s_train.models.FinalLayer: must be a network, with null_class and forward("],
    ),
    "short name": (
        ["--model.network=DiT"],
        ["model.network=DiT: must have its module, such as w2s_train.models.DiT"],
    ),
    "misspelt class": (
        ["--model.objective.init_args.interpolant=w2s_train.interpolant.Linear"],
        ["class_path=w2s_train.interpolant.Linear: there is no such class", "LinearInterpolant"],
    ),
    "misspelt segment": (
        [segments("low: 0.0, high: 1.0, scale: 0.1").replace("Extrapolation", "Extrapolatoin")],
        ["class_path=w2s_train.segment.Extrapolatoin: there is no", "has Extrapolation"],
    ),
    "misspelt law": (
        [segments("low: 0.0, high: 1.0, scale: {class_path: w2s_train.inbuilt.OmegaPowering}")],
        ["w2s_train.inbuilt has OmegaPower, IMeanFlow, UniformScale"],
    ),
    "misspelt optimizer": (["--model.optimizer=torch.optim.Adamm"], ["torch.optim has Adam"]),
    "nan": (["--model.ema_decay=.nan"], ["model.ema_decay", "nan", "must be a number"]),
    "negative rate": (
        ["--model.optimizer.init_args.lr=-1"],
        ["model.optimizer.init_args.lr=-1", "at least 0"],
    ),
    "two evaluations that resume": (
        ["--trainer.callbacks=[w2s_train.callbacks.ResumableEvaluation]"]
        + ["--trainer.callbacks+=w2s_train.callbacks.ResumableEvaluation"],
        ["trainer.callbacks", "ResumableEvaluation once, not 2 times"],
    ),
    "endless interval": (
        ["--trainer.callbacks=w2s_train.callbacks.ResumableEvaluation"]
        + ["--trainer.callbacks.every=.inf"],
        ["every=inf", "finite"],
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
        [source("CoTrained", "network: {class_path: w2s_train.models.DiT, init_args: {depth: 1}}")],
        ["network=", "shape (4, 32, 32), must have (1, 8, 8)"],
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
    "a callback that moved": (
        [
            "--trainer.callbacks={class_path: w2s_train.callbacks.LeavesScores, "
            "init_args: {num_classes: 4, depth: 1}}"
        ],
        ["class_path=w2s_train.callbacks.LeavesScores: must be leaves.LeavesScores", "b8536ed"],
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
        fid("weights: none.safetensors", "data/digits/reference.npz"),
        ["weights=none.safetensors", "existing file"],
    ),
    "missing reference": (
        fid("weights: data/digits/classifier.safetensors", "none.npz"),
        ["reference=none.npz", "existing file"],
    ),
    "no optimizer": (["--model.optimizer=null"], ["model.optimizer", "callable"]),
    "no interval": (
        ["--trainer.val_check_interval=0"],
        ["val_check_interval=0", "least 1"],
    ),
    "half an interval": (["--trainer.val_check_interval=0.5"], ["val_check_interval=0.5", "whole"]),
    "devices": (["--trainer.accelerator=tpux"], ["tpux"]),
    # What is gone, but for what it was by default.
    "a share of the rows": (
        [source("NullClass", more=", share: 0.25")],
        ["[0].init_args.share=0.25: is gone, must be 1.0", "commit b8536ed ran it last"],
    ),
    "key twice in a value": (
        ["--model.sampler={class_path: w2s_train.sampler.Euler, class_path: w2s_train.weak.EMA}"],
        ["model.sampler", "class_path: stands twice"],
    ),
}


@pytest.mark.fault("18  bad configuration")
@pytest.mark.parametrize("case", quick(BAD, *list(BAD)[::6]))
def test_bad_input(case: str, digits: None, tmp_path: Path):
    options, expected = BAD[case]
    for name in re.findall(r"w2s_train\.weak\.(\w+)", " ".join(options)):
        getattr(sources, name)  # skips where its file is gone
    message = refusal(tmp_path / "run", *options)
    for part in expected:
        assert part in message, message
    assert not (tmp_path / "run").exists()


YAML = {
    "unknown part": ("modle: {x: 3}", ["bad.yaml", "option 'modle'", "keys are trainer, model"]),
    "unknown key": ("data: {batchsize: 3}", ["data.batchsize", "data accepts", "batch_size"]),
    "wrong type": ("data: {batch_size: many}", ["data.batch_size", "int", "many"]),
    "key twice": (
        "trainer:\n  max_steps: 3\n  max_steps: 4\n",
        ["bad.yaml: max_steps: stands twice, again in line 3"],
    ),
    "key twice in a nested file": (
        "data: nested.yaml",
        ["nested.yaml: batch_size: stands twice, again in line 2"],
    ),
    "key twice in a file of a file": ("model: deeper.yaml", ["batch_size: stands twice"]),
    "bomb": (f"a: &a [1]\nb: [{', '.join(['*a'] * 21)}]", ["bad.yaml: *: must stand at most 20"]),
    "contains itself": ("model: &a {network: *a}", ["must be YAML", "Circular"]),
    "list as key": ("? [1, 2]\n: 3\n", ["must be YAML"]),
    "too deep": ("[" * 3000, ["must be YAML"]),
    "no yaml": ("trainer: [", ["bad.yaml: must be YAML", "line"]),
    "no mapping": ("- 1", ["bad.yaml: must hold keys with values"]),
    "nan": ("model: {label_dropout: .nan}", ["model.label_dropout=nan: must be a number"]),
}


@pytest.mark.fault("18  bad configuration")
@pytest.mark.parametrize("case", YAML)
def test_bad_yaml(case: str, tmp_path: Path):
    text, expected = YAML[case]
    (tmp_path / "nested.yaml").write_text("batch_size: 3\nbatch_size: 4\n")
    (tmp_path / "deeper.yaml").write_text("network: nested.yaml\n")
    (tmp_path / "bad.yaml").write_text(text)
    message = refusal(tmp_path / "run", f"--config={tmp_path / 'bad.yaml'}")
    for part in expected:
        assert part in message, message


def test_a_bad_file_for_a_part(tmp_path: Path):
    (tmp_path / "data.yaml").write_text("batch_size: 3\nbatch_size: 4\n")
    for option in (["--data", str(tmp_path / "data.yaml")], [f"--data={tmp_path / 'data.yaml'}"]):
        message = refusal(tmp_path / "run", *option)
        assert f"{tmp_path / 'data.yaml'}: batch_size: stands twice, again in line 2" in message


def test_scoring_needs_a_checkpoint(tmp_path: Path):
    missing = refusal(tmp_path / "run", name="validate")
    assert missing.startswith("error: ckpt_path=null: validate needs")
    last = refusal(tmp_path / "run", "--ckpt_path=last", name="validate")
    assert last.startswith("error: ckpt_path=last: there is no")


@pytest.mark.slow
@pytest.mark.parametrize("key, value", [("in_channels", 3), ("input_size", 16)])
def test_data_of_another_shape(command, key: str, value: int):
    with pytest.raises(SystemExit, match=r"must fit the data, whose shape is \(1, 8, 8\)"):
        command("fit", f"--model.network.init_args.{key}={value}", "--trainer.callbacks=[]")


@pytest.mark.slow
def test_the_first_words_of_keys(tmp_path: Path):
    """What is checked before anything is imported is what the parsers accept."""
    words = {"allow_imports", "profile", "$schema"}  # the parser sees none of these
    for name in Command.subcommands():
        refusal(tmp_path / "run", "--data.batch_size=0", name=name)
        parser = PARSERS[name]["_subcommand_parsers"][name]
        words |= {action.dest.partition(".")[0] for action in parser._actions}
    assert words == {*PARTS, *KEYS}
    assert list(CLASSES) == PARTS


FAST = """
import json, sys
from w2s_train.cli import main
for args in json.loads(sys.argv[1]):
    try:
        main(args)
    except SystemExit as end:
        print(end.code)
heavy = {"torch", "lightning", "jsonargparse", "numpy"} & sys.modules.keys()
assert not heavy, heavy
"""


def test_answers_without_a_heavy_import(tmp_path: Path):
    """Helps, and errors that need no parser: well below a second, where torch alone takes two."""
    twice = tmp_path / "twice.yaml"
    twice.write_text("data: {batch_size: 3}\ndata: {}\n")
    names = "fit, validate, test, predict, sample, tune, ema, reference, imagine, export, compare"
    expected = {
        ("train",): f"error: command=train: must be one of {names}",
        ("fit", "-c", "none.yaml"): "error: config=none.yaml: must be an existing file",
        ("fit", "--config=none.yaml"): "error: config=none.yaml: must be an existing file",
        ("fit", "-cnone.yaml"): "error: config=none.yaml: must be an existing file",
        ("fit", "-c", f"{twice}"): f"error: {twice}: data: stands twice, again in line 2; must "
        "stand once",
        ("sample", "--data", f"{twice}"): f"error: {twice}: data: stands twice, again in line 2; "
        "must stand once",
        ("fit", "-c", "configs/digits_w2s.yaml", "--modle.x", "1"): "error: unrecognized "
        "arguments: --modle.x; keys are trainer, model, data, checkpoint, guard, watch, "
        "seed_everything, ckpt_path, those of --help",
        ("export", "--color=red"): "error: option=--color=red: must be one of --ckpt_path, "
        "--output, --allow_imports, --weights, --format",
    }
    command = [sys.executable, "-c", FAST, json.dumps([["--help"], ["export", "-h"], *expected])]
    began = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert time.monotonic() - began < 5
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(HELP + EXPORT_HELP)
    lines = [line for line in done.stdout.splitlines() if line.startswith("error: ")]
    assert lines == list(expected.values())


def test_statuses():
    """Of the command as a shell sees it."""
    for args, status in ((["--help"], 0), (["train"], 1), (["fit", "-c", "none.yaml"], 1)):
        done = subprocess.run(
            [sys.executable, "-m", "w2s_train", *args], capture_output=True, text=True, cwd=ROOT
        )
        assert done.returncode == status
        assert len(done.stderr.splitlines()) == status  # one line for an error


def test_help_of_one_command(capsys):
    """All keys of the command that is asked; its own description."""
    with pytest.raises(SystemExit) as end:
        main(["validate", "--help"])
    assert end.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "Perform one evaluation epoch over the validation set" in text
    for key in ("--trainer.max_steps", "--model.label_dropout", "--guard", "--verbose"):
        assert key in text


# ---- one fit, and what follows it ---------------------------------------------------------------


@pytest.fixture
def folder(tiny_run: Path) -> Path:
    """A fit of the tiny digits, where ``command`` runs."""
    return tiny_run


def state(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


@pytest.mark.slow
def test_the_saved_config_repeats_the_run(folder: Path, monkeypatch):
    """Under a lock, which keeps a second fit out; the earlier run is moved aside."""
    monkeypatch.chdir(ROOT)
    config = folder.with_name("config.yaml")
    shutil.copy(folder / "config.yaml", config)
    again = ["fit", "-c", str(config), "--trainer.default_root_dir", str(folder)]
    with FileLock(folder.parent / ".run.lock"):
        with pytest.raises(SystemExit, match="another fit is writing there"):
            main(again)
    main(again)
    first, second = state(folder.with_name("run.1")), state(folder)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_saved_configs_name_the_classes_as_configs_do(tiny_run: Path):
    paths = re.findall(r"class_path: (\S+)", (tiny_run / "config.yaml").read_text())
    assert paths[:3] == [
        "w2s_train.callbacks.FID",
        "w2s_train.features.ClassifierFeatures",
        "w2s_train.callbacks.SampleGrid",
    ]
    assert "w2s_train.weak.NullClass" in paths


@pytest.mark.slow
def test_test_scores_and_predict_writes(command, folder: Path):
    before = (folder / "config.yaml").read_text()
    command("test", "--ckpt_path=last")
    command("predict", "--ckpt_path=last", "--data.num_generated=12")
    images = sorted(path.name for path in (folder / "samples").iterdir())
    assert images == [f"{seed:06d}-{seed % 10}.png" for seed in range(12)]
    assert (folder / "config.yaml").read_text() == before
    assert not (folder / "lightning_logs").exists()


@pytest.mark.slow
def test_the_command_line_wins_over_the_checkpoint(command, folder: Path):
    """Lightning's own CLI would score with the checkpoint's sampler and guidance."""
    command("validate", "--ckpt_path=last", guidance("ClassifierFree", "scale: 2.0"))
    last = json.loads((folder / "scores.json").read_text())[-1]
    assert last["guidance"] == "cfg(2, [0, 1])"


def test_the_run_folder_is_named_after_the_configs():
    trainer = SimpleNamespace(default_root_dir=None)
    configs = ["configs/digits_w2s.yaml", "configs/weak/mg.yaml"]
    config = SimpleNamespace(trainer=trainer, ckpt_path=None, config=configs)
    assert run_folder(config) == Path("runs/digits_w2s+mg")
    config.ckpt_path = "runs/other/checkpoints/last.ckpt"
    assert run_folder(config) == Path("runs/other")


def test_logs_hold_what_people_expect(tiny_run: Path):
    columns = (tiny_run / "metrics.csv").read_text().splitlines()[0].split(",")
    expected = {"step", "train/loss", "train/gradient_norm", "train/learning_rate"}
    expected |= {f"train/quarter_{q}/strong_loss" for q in ("0-0.25", "0.75-1")}
    for part in ("strong", "weak", "difference"):
        expected |= {f"train/t_0.5-1/{part}_{kind}" for kind in ("rms", "max")}
    expected |= {"train/t_0.5-1/effective_scale", "train/t_0-0.5/strong_loss", "val/fd_digits"}
    assert expected <= set(columns)
    files = {path.name.split(".")[0] for path in tiny_run.iterdir()}
    assert {"config", "environment", "scores", "metrics", "events", "grids"} <= files


@pytest.mark.slow
def test_checkpoints_run_no_code(command, folder: Path, tmp_path: Path):
    """Faults row 19: a pickled call in a checkpoint is not made."""

    class Call:
        def __reduce__(self) -> tuple:
            return (Path(tmp_path / "sentinel").touch, ())

    path = folder / "checkpoints" / "last.ckpt"
    torch.save(torch.load(path, weights_only=True) | {"evil": Call()}, path)
    with pytest.warns(UserWarning, match="step-000006.ckpt: its SHA-256 is another; an earlier"):
        command("validate", "--ckpt_path=last")
    digest_file(path.resolve()).unlink()
    with pytest.raises(SystemExit, match="path=.*step-000006.ckpt: cannot be read"):
        command("validate", "--ckpt_path=last")
    assert not (tmp_path / "sentinel").exists()


@pytest.mark.slow
def test_checkpoints_must_fit(command, folder: Path):
    with pytest.raises(SystemExit, match="hidden_size=24: must be 16, as in .*step-000006.ckpt"):
        command("validate", "--ckpt_path=last", "--model.network.init_args.hidden_size=24")


@pytest.mark.slow
@pytest.mark.long
def test_no_advice_of_the_trainer_on_a_terminal(folder: Path):
    """A fit that goes on with other callbacks, and a validation: what is said is ours."""
    code = "import sys; sys.stdout.isatty = lambda: True; from w2s_train.cli import main; main()"
    tiny = ["-c", "configs/digits_w2s.yaml", "-c", "tests/tiny.yaml", "--ckpt_path=last"]
    tiny.append(f"--trainer.default_root_dir={folder}")
    monitor = "--trainer.callbacks=[lightning.pytorch.callbacks.LearningRateMonitor]"
    (folder / "srun").write_text("#!/bin/sh\n")
    (folder / "srun").chmod(0o755)
    path = {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
    for words in (
        ["fit", *tiny, monitor, "--trainer.max_steps=7"],
        ["fit", *tiny, "--trainer.max_steps=8"],
        ["validate", *tiny],
    ):
        command = [sys.executable, "-c", code, *words]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            cwd=ROOT,
            env={**os.environ, **path},
            check=True,
        )
        said = done.stdout + done.stderr
        for advice in ("litlogger", "litmodels", "add the following callbacks", "srun", "loss nan"):
            assert advice not in said, said
