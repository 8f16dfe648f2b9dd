"""No setting is ignored: where a run goes on, and among the flags of the trainer."""

import csv
import functools
import inspect
import json
import math
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, quick
from lightning.pytorch import Trainer, callbacks
from lightning.pytorch.callbacks import ModelSummary, ProgressBar
from lightning.pytorch.strategies import DDPStrategy
from refusals import parsed, parsers_built_once, refusal
from test_resume import assert_same, checkpoint, equal

from w2s_train.checkpoint_file import write_checkpoint
from w2s_train.command.changes import FREE, REFUSED, changes, verdict
from w2s_train.command.config import walk
from w2s_train.command.flags import INSTEAD, check_callbacks, seed_of
from w2s_train.command.run import compose
from w2s_train.datamodule import ShardDataModule
from w2s_train.errors import UserError
from w2s_train.module import DiffusionModule
from w2s_train.running.checkpoint_io import CheckpointFiles
from w2s_train.running.record import STARTS, Record
from w2s_train.running.settings import Settings
from w2s_train.shards.order import StreamOrder

PAGE = (ROOT / "docs" / "settings.md").read_text()
LAST = "--ckpt_path=last"
RECORD = ("config.yaml", "environment.json")
LONG = ["--trainer.val_check_interval=1000", "--trainer.callbacks=null"]


def rows_of(section: str) -> dict[str, list[str]]:
    """The table below a heading: its first column, and what stands in backticks in the second."""
    text = PAGE.partition(f"## {section}\n")[2].partition("\n## ")[0]
    rows = [line.strip("| ").split(" | ", 1) for line in text.splitlines() if line.startswith("| ")]
    return {first.partition(":")[0]: re.findall(r"`([\w.]+)`", rest) for first, rest in rows[1:]}


def rates(folder: Path) -> list[float]:
    """The learning rate of each step."""
    table = csv.DictReader((folder / "metrics.csv").read_text().splitlines())
    return [float(row["train/learning_rate"]) for row in table if row["train/learning_rate"]]


# ---- where a fit goes on --------------------------------------------------------------------


def test_the_table_of_keys_is_the_one_in_the_code():
    table = rows_of("Where a fit goes on")
    assert table["refused, in one line with the key and both values"] == REFUSED
    assert table["free"] == FREE


def test_every_key_of_a_config_has_one_verdict():
    """None is named twice, and each that is named exists or is of a class that can be chosen."""
    assert len({*REFUSED, *FREE}) == len(REFUSED) + len(FREE)
    keys = [key for key, _ in walk(parsed("-c", "configs/digits_w2s.yaml"))]
    assert {verdict(key) for key in keys} == {"refused", "free", "applied"}
    chosen = ".init_args."
    for named in (*REFUSED, *FREE):
        assert chosen in named or any(key.startswith(named) for key in keys), named
    assert verdict("model.network.init_args.hidden_size") == "refused"
    assert verdict("model.network.init_args.gradient_checkpointing") == "free"
    assert verdict("trainer.callbacks[0].init_args.reference") == "free"
    assert verdict("data.seeds_of_something") == "applied"  # a beginning of words, not of letters


def test_changes_stand_at_the_highest_key_that_says_them():
    weak = {"class_path": "A", "init_args": {"x": 1}}
    before = {"a": 1, "b": [weak, {"c": 2}], "d": {"e": 3}}
    now = {"a": 1, "b": [{"class_path": "B", "init_args": {"y": 1}}, {"c": 5}], "d": None}
    found = [tuple(change) for change in changes(before, now)]
    assert [each.key for each in changes({"x": 1}, weak, "y")] == ["y.class_path"]
    assert found == [
        ("b[0].class_path", "A", "B"),
        ("b[1].c", 2, 5),
        ("d", {"e": 3}, None),
    ]


def refused(command, *options: str) -> str:
    with pytest.raises(SystemExit) as stop:
        command("fit", LAST, *options)
    message = str(stop.value.code)
    assert message.startswith("error: ") and "\n" not in message
    return message


CHECKPOINT = {
    "seed": (["--seed_everything=5"], "seed_everything=5: must be 0, as in "),
    "averages": (["--model.ema_decay=[0.9,0.99]"], "model.ema_decay=[0.9, 0.99]: must be 0.99, as"),
    "shuffle": (["--data.shuffle=7"], "data.shuffle=7: must be "),
    "width": (
        ["--model.network.init_args.hidden_size=32"],
        "model.network.init_args.hidden_size=32: must be 16, as in ",
    ),
    "heads": (["--model.network.init_args.num_heads=4"], "num_heads=4: must be 2, as in "),
    "optimizer": (
        ["--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=0.1"],
        "model.optimizer.class_path=torch.optim.SGD: must be torch.optim.",
    ),
    "interpolant": (
        ["--model.objective.init_args.interpolant=w2s_train.interpolant.CosineInterpolant"],
        "interpolant.class_path=w2s_train.interpolant.CosineInterpolant: must be ",
    ),
}


@pytest.mark.parametrize("case", quick(CHECKPOINT))
def test_what_would_be_another_run_is_refused(command, tiny_run: Path, case: str):
    """Before any work: config.yaml, and the number of starts, are as they were."""
    options, expected = CHECKPOINT[case]
    config = (tiny_run / "config.yaml").read_bytes()
    message = refused(command, "--trainer.max_steps=8", *options)
    assert expected in message and str(tiny_run) in message
    assert (tiny_run / "config.yaml").read_bytes() == config
    assert len(json.loads((tiny_run / "environment.json").read_text())) == 1


@pytest.mark.slow
def test_another_weak_source_is_refused_by_its_key(command, tiny_run: Path):
    """Its weights are not in the checkpoint."""
    weak = "{class_path: w2s_train.weak.CoTrained}"
    segment = "{class_path: w2s_train.segment.Extrapolation, init_args: "
    segment += f"{{low: 0.0, high: 1.0, scale: 0.3, weak: {weak}}}}}"
    message = refused(command, f"--model.objective.init_args.segments=[{segment}]")
    assert "model.objective.init_args.segments=[" in message and "CoTrained" not in message[200:]
    assert "Missing key" not in message and "must be [" in message


@pytest.mark.slow
def test_other_data_are_refused(command, tiny_run: Path, tmp_path: Path):
    """The same data elsewhere are not."""
    shards, index = (sorted((ROOT / "data/digits").glob(n)) for n in ("train-*", "index.json"))
    for name, part in (("same", [*shards, *index]), ("other", shards[: len(shards) // 2])):
        (tmp_path / name).mkdir()
        for path in part:
            (tmp_path / name / path.name).symlink_to(path)
    urls = f"--data.train_urls={tmp_path}/%s/train-*.tar"
    options = ["--data.prepare=null", "--trainer.max_steps=8", *LONG]
    record = [(tiny_run / name).read_bytes() for name in RECORD]
    message = refused(command, urls % "other", *options)
    assert "data.train_urls=" in message and "must hold the data set of" in message
    assert record == [(tiny_run / name).read_bytes() for name in RECORD]  # nothing of it ran
    command("fit", LAST, urls % "same", *options)
    assert checkpoint(tiny_run)["global_step"] == 8


@pytest.mark.slow
def test_what_applies_is_announced_and_every_start_recorded(command, tiny_run: Path, caplog):
    caplog.set_level("INFO")
    options = ["--data.batch_size=8", "--model.label_dropout=0.2", "--data.num_workers=0"]
    command("fit", LAST, "--trainer.max_steps=8", *options, *LONG)
    line = next(line for line in caplog.messages if line.startswith("unlike "))
    changed = ["data.batch_size 16 -> 8", "label_dropout 0.1 -> 0.2", "max_steps 6 -> 8"]
    assert all(each in line for each in [*changed, "images_per_step 16 -> 8"]), line
    assert "num_workers" not in line and "callbacks" not in line
    starts = json.loads((tiny_run / "environment.json").read_text())
    assert [start["config"]["data"]["batch_size"] for start in starts] == [16, 8]
    assert yaml.safe_load((tiny_run / "config.yaml").read_text())["data"]["batch_size"] == 8


@pytest.mark.slow
def test_a_checkpoint_begins_another_run(command, tiny_run: Path, tmp_path: Path, caplog):
    """In a folder of its own: with another seed and scale, but not with another network."""
    caplog.set_level("INFO")
    start = f"--ckpt_path={tiny_run}/checkpoints/last.ckpt"
    options = [start, "--trainer.max_steps=8", *LONG]
    command("fit", *options, "--seed_everything=5", "--model.label_dropout=0.2", folder="new")
    assert any("unlike" in line and "label_dropout 0.1 -> 0.2" in line for line in caplog.messages)
    with pytest.raises(SystemExit, match="num_heads=4: must be 2, as in"):
        command("fit", *options, "--model.network.init_args.num_heads=4", folder="newer")


@pytest.mark.slow
def test_an_edited_config_is_compared_with_what_ran(command, tiny_run: Path, caplog):
    """Also where the network goes by another name of its class."""
    caplog.set_level("INFO")
    path = tiny_run / "config.yaml"
    path.write_text(path.read_text().replace("batch_size: 16\n", "batch_size: 8\n", 1))
    assert yaml.safe_load(path.read_text())["data"]["batch_size"] == 8
    config = path.read_text().replace("w2s_train.models.DiT", "w2s_train.models.dit.DiT")
    path.write_text(config)
    where = [f"--trainer.default_root_dir={tiny_run}", LAST]  # after the config, which has others
    command("fit", "-c", str(path), *where, "--trainer.max_steps=8", *LONG)
    assert "data.batch_size 16 -> 8" in caplog.text and "class_path" not in caplog.text
    caplog.clear()
    command("fit", LAST, "--trainer.max_steps=9", "--data.global_batch_size=16", *LONG)
    assert "images_per_step 8 -> 16" in caplog.text


@pytest.mark.slow
def test_a_run_of_an_older_version_is_compared_with_its_config(command, tiny_run: Path):
    """Its starts are written down without one."""
    path = tiny_run / "environment.json"
    starts = json.loads(path.read_text())
    del starts[0]["config"]
    path.write_text(json.dumps(starts))
    assert "seed_everything=5: must be 0, as in " in refused(command, "--seed_everything=5")
    (tiny_run / "config.yaml").write_text("a: [1,\n")
    assert "config.yaml: must be the record of a run; " in refused(command)


def test_a_seed_that_is_not_given_is_the_one_that_is_recorded(monkeypatch):
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    for given, seed in ((True, 0), (None, 0), (False, 0), (1, 1), (7, 7)):
        assert seed_of(given) == seed
    monkeypatch.setenv("PL_GLOBAL_SEED", "3")
    assert (seed_of(True), seed_of(5)) == (3, 5)


@pytest.mark.slow
def test_states_that_do_not_fit_are_refused(command, tmp_path: Path):
    """In the folder of the run, and where its checkpoint begins another."""
    rms = ["--model.optimizer=torch.optim.RMSprop", "--model.optimizer.lr=0.001", *LONG]
    folder = command("fit", "--trainer.max_steps=3", *rms)
    message = refused(command, *rms, "--model.optimizer.init_args.momentum=0.9")
    assert "model.optimizer: must find momentum_buffer in the state" in message
    start = f"--ckpt_path={folder}/checkpoints/last.ckpt"
    with pytest.raises(SystemExit, match="optimizer.class_path=torch.optim.SGD: must be torch.opt"):
        sgd = ["--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=0.1"]
        command("fit", start, *sgd, *LONG, folder="new")
    assert not (tmp_path / "new").exists()


OPTIMIZERS = {
    "by shape": ["torch.optim.Adafactor", "--model.optimizer.lr=1e-3"],
    "by closure": ["torch.optim.LBFGS", "--model.optimizer.lr=0.01"],
}


def trial(optimizer: Any, **settings: Any) -> Any:
    """A module with an optimizer, as far as its settings are looked at."""
    config = {"optimizer": {"init_args": settings}, "scheduler": None}
    built = functools.partial(optimizer, **settings)
    return SimpleNamespace(optimizer=built, scheduler=None, hparams=config)


@pytest.mark.parametrize(
    "optimizer, settings",
    [
        (torch.optim.Adafactor, {"lr": 1e-3}),
        (torch.optim.LBFGS, {"lr": 0.01}),
        (torch.optim.AdamW, {"capturable": True}),
        (torch.optim.AdamW, {"differentiable": True}),
        (torch.optim.RMSprop, {"momentum": 0.9}),
    ],
)
def test_a_state_of_the_same_settings_fits(optimizer: Any, settings: dict[str, Any]):
    """Whatever its names depend on; and after another rate and weight decay, too."""
    stored = optimizer([torch.nn.Parameter(torch.zeros(2, 3))], **settings).state_dict()
    stored["state"] = {0: {"of a matrix": torch.zeros(2)}}
    content = {"hyper_parameters": trial(optimizer, **settings).hparams}
    content["optimizer_states"] = [stored]
    Settings().load(content, trial(optimizer, **settings))
    changed = settings | {"lr": 0.1}
    if optimizer is not torch.optim.LBFGS:
        changed["weight_decay"] = 0.5
    applied = Settings()
    applied.load(content, trial(optimizer, **changed))
    assert set(applied.arguments) == set(changed) - (set(settings) - {"lr"})


@pytest.mark.slow
@pytest.mark.parametrize("case", ["by shape", "by closure"])
def test_runs_of_any_optimizer_go_on(command, case: str):
    (name, *options), end = OPTIMIZERS[case], "--trainer.max_steps=8"
    options = [f"--model.optimizer={name}", *options, *LONG]
    folder = command("fit", *options)
    command("fit", LAST, end, *options)
    assert checkpoint(folder)["global_step"] == 8


@pytest.mark.parametrize("name", ["capturable", "differentiable"])
def test_implementations_that_cannot_step(name: str, digits: None, tmp_path: Path):
    """Where the optimizer is looked at alone, and where it refuses to be built."""
    flag = f"--model.optimizer.init_args.{name}=true"
    line = refusal(tmp_path / "run", flag)
    assert f"model.optimizer.init_args.{name}=true: must be false" in line
    if name == "differentiable":
        line = refusal(tmp_path / "run", flag, "--model.optimizer.init_args.fused=true")
        assert "optimizer: `fused` does not support `differentiable`" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_precision_of_a_plugin_is_announced(command, tiny_run: Path, caplog):
    caplog.set_level("INFO")
    plugin = "{class_path: lightning.pytorch.plugins.MixedPrecision, init_args: "
    plugin += "{precision: bf16-mixed, device: cpu}}"
    command("fit", LAST, "--trainer.max_steps=8", f"--trainer.plugins={plugin}", *LONG)
    line = next(line for line in caplog.messages if line.startswith("unlike "))
    assert "; precision 32-true -> bf16-mixed" in line


@pytest.mark.slow
def test_what_is_refused_was_not_announced(command, tiny_run: Path, caplog):
    """Weights of the source that goes have no place; each source is named."""
    caplog.set_level("INFO")
    message = refused(command, "--model.objective.init_args.segments=null", *LONG)
    assert "segments=null: must be [Extrapolation(IntermediateHead), Extrapolation(Null" in message
    assert "unlike" not in caplog.text


# ---- a folder, and what failed there --------------------------------------------------------


def test_a_start_that_failed_locks_no_folder(tmp_path: Path):
    """Whatever it was: loggers write, callbacks raise; a folder of others stays refused."""
    folder = tmp_path / "run"
    for keeps, aside in ((True, 0), (True, 0), (False, 1)):
        record = Record(folder, {"a": 1}, keeps=keeps)
        record.check_progress(None)
        record.claim()
        (folder / "events.out.tfevents.1").touch()  # of a logger, and then it fails
        record.count_start()
        record.release()
        assert len(list(tmp_path.glob("run.*"))) == aside
    (folder / "config.yaml").unlink()
    with pytest.raises(UserError, match="must be the folder of a run, or empty; it holds events"):
        Record(folder, keeps=True).claim()


def test_a_start_that_failed_is_of_a_run_without_its_config(tmp_path: Path):
    """As versions before have left it."""
    for name in ("events.out.tfevents.1", "hparams.yaml", STARTS):
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / name).touch()
    record = Record(tmp_path / "run", keeps=True)
    record.claim()
    record.release()


@pytest.mark.slow
def test_a_first_start_may_fail(command, tmp_path: Path, digits: None):
    """With wrong labels, or in a callback; what is recorded last is what ran."""
    wrong = ["--data.num_classes=5", "--model.network.init_args.num_classes=5"]
    assert "label" in refused(command, *wrong, *LONG)
    folder = command("fit", LAST, *LONG)
    assert checkpoint(folder)["global_step"] == 6
    assert yaml.safe_load((folder / "config.yaml").read_text())["data"]["num_classes"] == 10
    starts = json.loads((folder / "environment.json").read_text())
    assert starts[-1]["config"]["data"]["num_classes"] == 10
    assert not (tmp_path / "run.1").exists()


@pytest.mark.parametrize("text", ["", "[]", "{"])
def test_starts_that_are_no_record(tmp_path: Path, text: str):
    (tmp_path / STARTS).write_text(text)
    with pytest.raises(UserError, match=f"{STARTS}: must hold a JSON dict of a run; remove it"):
        Record(tmp_path, keeps=True).check_progress("step-000006.ckpt")


def test_a_checkpoint_at_the_root_of_the_file_system():
    """It is not of this folder; its order of the data is another."""
    data: Any = SimpleNamespace(
        trainer=SimpleNamespace(ckpt_path="/x.ckpt", default_root_dir="/runs/a"),
        checkpoint_order={"order": "another"},
        state_dict=lambda: {"order": "ours"},
    )
    with pytest.warns(UserWarning, match="samples of the current epoch may come twice"):
        ShardDataModule._compare_order(data)


# ---- optimizer and schedule -----------------------------------------------------------------

COSINE = "--model.scheduler=torch.optim.lr_scheduler.CosineAnnealingLR"


@pytest.mark.slow
def test_another_rate_applies(command, tiny_run: Path):
    """From the first step on; moments and counters are those of the checkpoint."""
    before = checkpoint(tiny_run)["optimizer_states"][0]
    wanted = ["--model.optimizer.init_args.lr=1e-5", "--model.optimizer.init_args.weight_decay=0.5"]
    command("fit", LAST, "--trainer.max_steps=8", *wanted, *LONG)
    assert rates(tiny_run)[-2:] == [1e-5, 1e-5]
    after = checkpoint(tiny_run)["optimizer_states"][0]
    group = after["param_groups"][0]
    assert (group["lr"], group["weight_decay"]) == (1e-5, 0.5)
    assert group["betas"] == before["param_groups"][0]["betas"]
    assert {int(state["step"]) for state in after["state"].values()} == {8}


@pytest.mark.slow
def test_a_rate_that_only_the_config_had_applies(command, tiny_run: Path, caplog):
    """A start of an older version has recorded a rate, and trained on at the one before."""
    caplog.set_level("INFO")
    path = tiny_run / "checkpoints" / "step-000006.ckpt"
    content = torch.load(path, weights_only=True)
    content["hyper_parameters"]["optimizer"]["init_args"]["lr"] = 1e-5
    write_checkpoint(content, path)
    command("fit", LAST, "--trainer.max_steps=8", "--model.optimizer.init_args.lr=1e-5", *LONG)
    assert rates(tiny_run)[-2:] == [1e-5, 1e-5]
    assert "model.optimizer: lr is 1e-05, was 0.002 in effect" in caplog.text


@pytest.mark.slow
def test_a_longer_cosine_is_replayed(command, tmp_path: Path):
    """T_max 4 -> 8: the values of one cosine over eight steps, and not a rate that rises."""
    steps = ["--trainer.max_steps=4", COSINE, "--model.scheduler.T_max=4", *LONG]
    folder = command("fit", *steps)
    command("fit", LAST, "--trainer.max_steps=8", COSINE, "--model.scheduler.T_max=8", *LONG)
    found = rates(folder)
    cosine = [0.001 * (1 + math.cos(math.pi * k / 8)) for k in range(8)]
    assert found[4:] == pytest.approx(cosine[4:], rel=1e-6)
    assert found[:4] == pytest.approx([0.001 * (1 + math.cos(math.pi * k / 4)) for k in range(4)])
    last = checkpoint(folder)["optimizer_states"][0]["param_groups"][0]["lr"]
    assert last == pytest.approx(0.0, abs=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("before, now", [(False, True), (True, False)], ids=["begun", "ended"])
def test_a_schedule_may_begin_or_end(command, before: bool, now: bool):
    cosine = [COSINE, "--model.scheduler.T_max=8"]
    folder = command("fit", "--trainer.max_steps=4", *cosine * before, *LONG)
    command("fit", LAST, "--trainer.max_steps=8", *cosine * now, *LONG)
    wanted = [0.001 * (1 + math.cos(math.pi * k / 8)) if now else 0.002 for k in range(4, 8)]
    assert rates(folder)[4:] == pytest.approx(wanted, rel=1e-6)


@pytest.mark.slow
def test_an_unchanged_schedule_is_restored_bit_for_bit(command, tmp_path: Path):
    """With one that has a state of its own; another weight decay leaves it alone, too."""
    cycle = ["--model.scheduler=torch.optim.lr_scheduler.OneCycleLR", *LONG]
    cycle += ["--model.scheduler.max_lr=0.01", "--model.scheduler.total_steps=8"]
    whole = command("fit", "--trainer.max_steps=8", *cycle, folder="whole")
    part = command("fit", "--trainer.max_steps=5", *cycle, folder="part")
    command("fit", LAST, "--trainer.max_steps=8", *cycle, folder="part")
    assert_same(checkpoint(whole), checkpoint(part))
    assert equal(*(checkpoint(folder)["lr_schedulers"] for folder in (whole, part)))
    assert rates(part) == rates(whole)


SCHEDULES = {
    "too short": (
        ["OneCycleLR", "--model.scheduler.max_lr=0.01", "--model.scheduler.total_steps=4"],
        ["model.scheduler=OneCycleLR: must last trainer.max_steps=6 steps"],
    ),
    "plateau": (
        ["ReduceLROnPlateau"],
        ["model.scheduler=ReduceLROnPlateau: must depend on the step alone"],
    ),
}


@pytest.mark.parametrize("case", SCHEDULES)
def test_schedules_that_cannot_be(case: str, digits: None, tmp_path: Path):
    (name, *options), expected = SCHEDULES[case]
    scheduler = f"--model.scheduler=torch.optim.lr_scheduler.{name}"
    message = refusal(tmp_path / "run", scheduler, *options)
    for part in expected:
        assert part in message, message


def composed(*options: str) -> Any:
    grid = "--trainer.callbacks=w2s_train.callbacks.SampleGrid"  # without it, nobody validates
    words = ["fit", "-c", "tests/minimal.yaml", "--data.prepare=null", grid, *options]
    with parsers_built_once():
        return compose(words, False)


@pytest.mark.slow
def test_averages_and_cosines_that_say_little_are_warned_about(command, recwarn):
    command("fit", COSINE, "--model.scheduler.T_max=4", "--model.ema_decay=[0.9999,0.2]", *LONG)
    text = " ".join(str(each.message) for each in recwarn)
    assert "model.ema_decay=0.9999: 100% of the average is still the initial weights" in text
    assert "ema_decay=0.2" not in text
    assert "model.scheduler.init_args.T_max=4: is below trainer.max_steps=6" in text


# ---- flags of the trainer -------------------------------------------------------------------


def test_every_flag_of_the_trainer_has_its_place():
    table = rows_of("Flags of the trainer")
    named = {name for names in table.values() for name in names}
    flags = {name for name in inspect.signature(Trainer).parameters if name != "self"}
    assert flags <= named
    assert not set(table["refused"]) & set(table["honoured"])
    shown = {"callbacks", "overfit_batches"}  # by tests of their own
    assert flags == {*HONOURED, *FLAGS, *TRANSLATED, *shown}


FLAGS = {
    "fast_dev_run": ("true", "must be false; --trainer.max_steps 2"),
    "barebones": ("true", "must be false"),
    "model_registry": ("name", "must be null"),
    "num_sanity_val_steps": ("2", "must be 0"),
    "enable_checkpointing": ("false", "must be true"),
    "max_epochs": ("1", "must be left out, or be at least 1 and come with a number of"),
    "min_epochs": ("1", "must be left out"),
    "min_steps": ("7", "must be at most trainer.max_steps, 6"),
    "max_steps": ("-2", "must be at least 1, or -1 for no end"),
    "overfit_batches": ("-3", "must be a whole number of batches, at least 0, or a share"),
    "limit_train_batches": ("0.5", "must be a number of batches, at least 1"),
    "val_check_interval": ("9 --trainer.limit_train_batches=3", "must be at most the batches of"),
    "strategy": ("fsdp", "must keep whole networks"),
    "precision": ("64-true", "must keep float32 weights"),
}


RELATIVES = {
    "trainer.overfit_batches=inf: must be a whole number": ["--trainer.overfit_batches=.inf"],
    "trainer.limit_train_batches=inf: must be a number": ["--trainer.limit_train_batches=.inf"],
    "trainer.val_check_interval=inf: must be a whole number": ["--trainer.val_check_interval=.inf"],
    "trainer.min_epochs=3: must be at most trainer.max_epochs, 2": [
        "--trainer.min_epochs=3",
        "--trainer.max_epochs=2",
        "--trainer.limit_train_batches=2",
    ],
    "trainer: ": ["--trainer.strategy=xla"],
}


@pytest.mark.parametrize("line", RELATIVES)
def test_values_without_a_meaning(line: str, digits: None, tmp_path: Path):
    assert f"error: {line}" in refusal(tmp_path / "run", *RELATIVES[line])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flag", FLAGS)
def test_flags_that_are_refused(flag: str, digits: None, tmp_path: Path):
    (value, *more), rule = FLAGS[flag][0].split(), FLAGS[flag][1]
    message = refusal(tmp_path / "run", f"--trainer.{flag}={value}", *more)
    shown = value.capitalize() if value in ("true", "false") else value
    assert f"trainer.{flag}={shown}: " in message
    assert rule in message and not (tmp_path / "run").exists()


HONOURED: dict[str, tuple[str, Any]] = {
    "accelerator": ("cpu", lambda t: type(t.accelerator).__name__ == "CPUAccelerator"),
    "devices": ("2", lambda t: t.num_devices == 2),
    "num_nodes": ("1", lambda t: t.num_nodes == 1),
    "precision": ("bf16-mixed", lambda t: t.precision == "bf16-mixed"),
    "max_steps": ("7", lambda t: t.max_steps == 7),
    "min_steps": ("3", lambda t: t.min_steps == 3),
    "limit_train_batches": ("5", lambda t: t.limit_train_batches == 5),
    "limit_val_batches": ("2", lambda t: t.limit_val_batches == 2),
    "limit_test_batches": ("2", lambda t: t.limit_test_batches == 2),
    "limit_predict_batches": ("2", lambda t: t.limit_predict_batches == 2),
    "val_check_interval": ("4", lambda t: t.val_check_interval == 4),
    "check_val_every_n_epoch": ("2", lambda t: t.check_val_every_n_epoch == 2),
    "log_every_n_steps": ("3", lambda t: t.log_every_n_steps == 3),
    "enable_progress_bar": ("false", lambda t: not among(t, ProgressBar)),
    "enable_model_summary": ("true", lambda t: bool(among(t, ModelSummary))),
    "accumulate_grad_batches": ("2", lambda t: t.accumulate_grad_batches == 2),
    "gradient_clip_val": ("0.5", lambda t: t.gradient_clip_val == 0.5),
    "gradient_clip_algorithm": ("value", lambda t: t.gradient_clip_algorithm == "value"),
    "deterministic": ("true", lambda t: torch.are_deterministic_algorithms_enabled()),
    "benchmark": ("true", lambda t: torch.backends.cudnn.benchmark),
    "inference_mode": ("false", lambda t: not t.validate_loop.inference_mode),
    "profiler": ("simple", lambda t: type(t.profiler).__name__ == "SimpleProfiler"),
    "detect_anomaly": ("true", lambda t: t._detect_anomaly),
    "sync_batchnorm": ("true", lambda t: bool(t._accelerator_connector._layer_sync)),
    "reload_dataloaders_every_n_epochs": (
        "1",
        lambda t: t.reload_dataloaders_every_n_epochs == 1,
    ),
    "enable_autolog_hparams": ("false", lambda t: not t.enable_autolog_hparams),
    "strategy": ("ddp", lambda t: isinstance(t.strategy, DDPStrategy)),
}
TRANSLATED: dict[str, tuple[str, Any]] = {
    "logger": ("true", lambda c: named(c) == ["Events", "MetricsCSV"]),
    "max_time": ("00:01:00:00", lambda c: c.stop.limit == 3600),
    "plugins": ("null", lambda c: isinstance(c.trainer.strategy.checkpoint_io, CheckpointFiles)),
    "default_root_dir": ("elsewhere", lambda c: c.trainer.default_root_dir == "elsewhere"),
    "use_distributed_sampler": (
        "true",
        lambda c: not c.trainer._accelerator_connector.use_distributed_sampler,
    ),
}


def named(command: Any) -> list[str]:
    """Classes of loggers."""
    return [type(each).__name__ for each in command.trainer.loggers]


@pytest.mark.parametrize(
    "given, names",
    [("false", []), ("remembering.Remembering", ["Remembering"])],
)
def test_metrics_csv_is_there_with_any_logger(given: str, names: list[str], monkeypatch):
    monkeypatch.chdir(ROOT)
    found = composed(f"--trainer.logger={given}", "--allow_imports=remembering")
    assert named(found) == [*names, "MetricsCSV"]


def among(trainer: Trainer, kind: type) -> list[Any]:
    """Callbacks of a kind."""
    return [each for each in trainer.callbacks if isinstance(each, kind)]


@pytest.fixture
def globals_restored():
    """What flags set for the whole process."""
    benchmark = torch.backends.cudnn.benchmark
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = benchmark
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


@pytest.mark.parametrize("flag", quick(HONOURED, "devices", "enable_progress_bar"))
def test_flags_that_are_honoured(flag: str, digits: None, monkeypatch, globals_restored):
    """By the trainer that is made; a trainer without the flag has another value."""
    monkeypatch.chdir(ROOT)
    value, holds = HONOURED[flag]
    # One at a time: the second test of an accelerator or a number is the one that it has.
    if flag not in ("accelerator", "num_nodes", "enable_autolog_hparams"):
        assert not holds(composed().trainer)
    assert holds(composed(f"--trainer.{flag}={value}").trainer)


@pytest.mark.parametrize("flag", quick(TRANSLATED, "default_root_dir"))
def test_flags_that_are_translated(flag: str, digits: None, monkeypatch):
    monkeypatch.chdir(ROOT)
    value, holds = TRANSLATED[flag]
    assert holds(composed(f"--trainer.{flag}={value}"))


ALLOWED = """
    BasePredictionWriter Callback Checkpoint DeviceStatsMonitor EarlyStopping LambdaCallback
    LearningRateMonitor ModelCheckpoint ModelSummary OnExceptionCheckpoint ProgressBar
    RichModelSummary RichProgressBar SpikeDetection ThroughputMonitor Timer TQDMProgressBar
""".split()


def test_every_callback_of_lightning_is_allowed_or_refused():
    """Those that change training or weights name the key that does so, also by a subclass."""
    names = set(callbacks.__all__)
    refused = {n for n in names if issubclass(getattr(callbacks, n), tuple(INSTEAD))}
    assert refused == names - {*ALLOWED} and {*ALLOWED} < names
    keys = {key for key, _ in walk(parsed("-c", "configs/digits_w2s.yaml"))}
    for kind, instead in INSTEAD.items():
        mine = type("Mine", (kind,), {"__init__": lambda self: None})
        with pytest.raises(UserError, match="trainer.callbacks=Mine: must leave training") as told:
            check_callbacks([callbacks.Timer(), mine()])
        assert f"use {instead}" in str(told.value) and f"`{kind.__name__}`" in PAGE
        key = instead.partition(",")[0].partition(" ")[0]
        assert key in keys or key.startswith("model.network"), key
    check_callbacks([callbacks.Timer(), callbacks.EarlyStopping("val/fid")])


def test_a_callback_that_changes_training_is_refused(digits: None, tmp_path: Path):
    name = "lightning.pytorch.callbacks.GradientAccumulationScheduler"
    options = [f"--trainer.callbacks={name}", "--trainer.callbacks.scheduling={0: 2}"]
    line = refusal(tmp_path / "run", *options)
    assert "trainer.callbacks=GradientAccumulationScheduler: must leave training" in line
    assert "trainer.accumulate_grad_batches" in line and not (tmp_path / "run").exists()


def test_a_progress_bar_of_the_config_is_the_only_one(digits: None, monkeypatch):
    monkeypatch.chdir(ROOT)
    name = "lightning.pytorch.callbacks.TQDMProgressBar"
    found = among(composed(f"--trainer.callbacks={name}").trainer, ProgressBar)
    assert [type(each).__name__ for each in found] == ["TQDMProgressBar"]


@pytest.mark.slow
def test_epochs_of_a_number_of_batches_end(command, caplog):
    """Two of three steps, though no number of steps is given."""
    epochs = ["--trainer.max_steps=-1", "--trainer.max_epochs=2", "--trainer.limit_train_batches=3"]
    folder = command(
        "fit", *epochs, "--trainer.check_val_every_n_epoch=9", "--trainer.val_check_interval=3"
    )
    assert checkpoint(folder)["global_step"] == 6


def test_repeated_positions_are_those_of_the_first_batches():
    """Also across the end of an epoch, and with what replaces an unreadable sample."""
    once = StreamOrder([5, 7], seed=3, window=4)
    for repeated in (4, 12, 16):
        again = StreamOrder([5, 7], seed=3, window=4, repeated=repeated)
        first = once.at(0, repeated)
        for begin in (0, repeated, 7 * repeated):
            places = again.at(begin, begin + repeated)
            assert np.array_equal(places.rows, first.rows)
            assert np.array_equal(places.mirrored, first.mirrored)
        odd = again.at(repeated - 1, repeated + 2).rows
        assert odd.tolist() == [first.rows[-1], *first.rows[:2]]
        assert again.substitute(repeated + 2, 0) == once.substitute(2, 0)


@pytest.mark.slow
@pytest.mark.parametrize("batches, number", [("1", 1), ("3", 3), ("0.02", 1)])
def test_one_batch_is_learned_by_heart(command, monkeypatch, batches: str, number: int):
    """The same images at every step, or every third."""
    seen, real = list[torch.Tensor](), DiffusionModule.training_step

    def training_step(self, batch, batch_idx):
        seen.append(batch["image"].clone())
        return real(self, batch, batch_idx)

    monkeypatch.setattr(DiffusionModule, "training_step", training_step)
    flag = f"--trainer.overfit_batches={batches}"
    command("fit", flag, "--trainer.max_steps=7", "--data.flip=true", *LONG)
    for k, images in enumerate(seen):
        assert torch.equal(images, seen[k % number])
    assert len({tuple(x.flatten().tolist()) for x in seen}) == number
