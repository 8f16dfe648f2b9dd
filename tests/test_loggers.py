"""Loggers of the config: where they write, which run they go on with, and what they are given."""

import csv
import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from conftest import ROOT
from jsonargparse import Namespace
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image
from refusals import refusal
from remembering import Failing, Refusing, Remembering
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from w2s_train.errors import UserError
from w2s_train.evaluation.images import log_image
from w2s_train.running.loggers import Events, log_config, placed, run_ids, unbroken

OWN = "--trainer.logger={class_path: remembering.Remembering, init_args: {api_key: s3cret}}"


def config(kind: type, **arguments: Any) -> Namespace:
    return Namespace(
        class_path=f"{kind.__module__}.{kind.__name__}", init_args=Namespace(**arguments)
    )


FRESH: dict[str, Any] = {"save_dir": ".", "id": None, "resume": None}


def test_loggers_write_into_the_run_folder_and_go_on(tmp_path: Path):
    """Where the config says nothing; each of two of a class goes on with a run of its own."""
    before = {"Remembering": ["a", "b"]}
    first, second, third = placed([config(Remembering, **FRESH)] * 3, tmp_path, before)
    for found, known in ((first, "a"), (second, "b"), (third, None)):
        assert vars(found.init_args) == {
            "save_dir": str(tmp_path),
            "id": known,
            "resume": "allow",
        }
    said = {"save_dir": "elsewhere", "id": "mine", "resume": "must"}
    kept = placed(config(Remembering, **said), tmp_path, {"Remembering": ["a"]})
    assert vars(kept.init_args) == said
    with pytest.raises(UserError, match="^log_model=all: must be false"):
        placed(config(Remembering, **FRESH, log_model="all"), tmp_path, {})


def test_files_of_lightning_go_on_where_nothing_is_deleted(tmp_path: Path):
    """TensorBoard's adds to a version; CSVLogger would begin the file of that version anew."""
    arguments = {"save_dir": "logs", "name": "x", "version": None}
    before = {"TensorBoardLogger": [3], "CSVLogger": [3]}
    events, table = placed(
        [config(TensorBoardLogger, **arguments), config(CSVLogger, **arguments)], tmp_path, before
    )
    assert (events.init_args.version, table.init_args.version) == (3, None)
    assert events.init_args.save_dir == "logs"
    for kind in (TensorBoardLogger, CSVLogger):  # which have no folder by default
        here = placed(config(kind, save_dir="."), tmp_path, {})
        assert here.init_args.save_dir == str(tmp_path)
    first = config(TensorBoardLogger, **arguments | {"version": 0})
    assert placed(first, tmp_path, {"TensorBoardLogger": [3]}).init_args.version == 0


def test_ids_are_those_of_the_runs(tmp_path: Path):
    own = [Remembering(id="a"), Remembering(id="b"), CSVLogger(tmp_path)]
    assert run_ids(own) == {"Remembering": ["a", "b"], "CSVLogger": [0]}
    with pytest.raises(UserError, match=r"^trainer.logger=Refusing: cannot start \(Conn.*=\*\*\*"):
        run_ids([Refusing()])


def test_a_config_that_is_not_taken_ends_no_run():
    good = Remembering()
    with pytest.warns(UserWarning, match="Refusing: no config was logged .KeyError: 'max_steps'."):
        log_config([Refusing(), good], {"seed": 1})
    assert good.configs == [{"seed": 1}]


def test_numbers_that_are_not_taken_end_no_run():
    """The first error is warned about; who takes numbers gets all."""
    bad, good = unbroken(Failing()), unbroken(Remembering())
    with pytest.warns(UserWarning, match="^Failing.log_metrics: failed; the run .*at 1") as said:
        for step in (1, 2):
            for logger in (bad, good):
                logger.log_metrics({"loss": 0.5}, step=step)
    assert len(said) == 1
    assert good.metrics == [(step, {"loss": 0.5}) for step in (1, 2)]


def test_grids_reach_each_kind_of_logger(tmp_path: Path):
    """By the methods that the services have; whose files hold no images is passed over."""
    sent: list[tuple[Any, ...]] = []

    def note(*args: Any, **options: Any) -> None:
        args = tuple(each.size if isinstance(each, Image.Image) else each for each in args)
        sent.append((*args, options))

    mlflow = SimpleNamespace(run_id="r", experiment=SimpleNamespace(log_image=note))
    comet = SimpleNamespace(experiment=SimpleNamespace(log_image=note))
    own, events = Remembering(), Events(str(tmp_path), name="", version="")
    for logger in (own, events, mlflow, comet, CSVLogger(tmp_path)):
        log_image(logger, "samples (raw)", torch.rand(3, 4, 6), 7)
    assert own.images == [(7, "samples (raw)", (6, 4))]
    assert sent == [
        ("r", (6, 4), {"key": "samples raw", "step": 7}),
        ((6, 4), {"name": "samples (raw)", "step": 7}),
    ]
    events.log_hyperparams({"seed": 1})
    events.save()
    found = EventAccumulator(str(tmp_path)).Reload()
    assert [each.step for each in found.Images("samples (raw)")] == [7]
    (text,) = found.Tensors("config/text_summary")
    assert text.tensor_proto.string_val == [b"    seed: 1"]


def steps(folder: Path) -> list[int]:
    rows = csv.DictReader((folder / "metrics.csv").read_text().splitlines())
    return sorted({int(row["step"]) for row in rows})


@pytest.mark.slow
def test_a_logger_of_ones_own(command, tmp_path: Path):
    """Grids, config without secrets, and one run over a stop; another folder has another run."""
    Remembering.made.clear()
    options = [OWN, "--allow_imports=remembering"]
    folder = command("fit", *options, "--trainer.max_steps=3")
    command("fit", *options, "--ckpt_path=last")
    command("validate", *options, "--ckpt_path=last")
    there = f"--ckpt_path={folder}/checkpoints/step-000003.ckpt"
    both = OWN.replace("{", "[remembering.Failing, {", 1) + "]"
    with pytest.warns(UserWarning, match="^Failing: no grid was logged .ConnectionError: no image"):
        other = command("fit", both, *options[1:], there, folder="other")
    first, second, scored, new = Remembering.made
    assert [each.given for each in Remembering.made] == [None, "run1", "run1", None]
    assert new.id == "run4" and second.resume == "allow"
    assert {each.folder for each in (first, second, scored)} == {str(folder)}
    assert new.folder == str(other)
    assert [step for step, _ in first.metrics if "train/loss" in _] == [1, 2, 3]
    assert [step for step, _ in second.metrics if "train/loss" in _] == [4, 5, 6]
    assert [each[:2] for each in first.images + second.images + scored.images] == [
        (step, "samples") for step in (3, 6, 6)
    ]
    assert [each.configs[0]["trainer"]["max_steps"] for each in (first, second)] == [3, 6]
    logger = first.configs[0]["trainer"]["logger"]["init_args"]
    assert (logger["api_key"], logger["save_dir"], logger["id"]) == ("***", ".", None)
    written = yaml.safe_load((folder / "config.yaml").read_text())
    assert written["trainer"]["logger"]["init_args"]["save_dir"] == "."  # fit for another folder
    starts = json.loads((folder / "environment.json").read_text())
    assert [start["loggers"] for start in starts] == [{"Remembering": ["run1"]}] * 2
    assert steps(folder) == [1, 2, 3, 4, 5, 6]


@pytest.mark.skipif(find_spec("wandb") is not None, reason="wandb is installed")
def test_a_package_that_is_missing_is_named(tmp_path: Path):
    message = refusal(tmp_path, "--trainer.logger=lightning.pytorch.loggers.WandbLogger")
    path = "lightning.pytorch.loggers.WandbLogger"
    assert message == f"error: class_path={path}: needs a package; pip install wandb"


@pytest.mark.slow
def test_pace_and_memory_are_logged(tiny_run: Path):
    """At every entry of the log; the parts of a step's time fit into it."""
    table = csv.DictReader((tiny_run / "metrics.csv").read_text().splitlines())
    rows = [row for row in table if row["train/loss"]]
    assert len(rows) == 6
    for row in rows:
        step, data, rate, memory = (
            float(row[name])
            for name in (
                "time/step_seconds",
                "time/data_seconds",
                "time/images_per_second",
                "memory/host_gigabytes",
            )
        )
        assert 0 < data < step
        assert rate * step == pytest.approx(16)  # images of a step
        assert 0.05 < memory < 100


READ = """
import glob, json, struct, sys
from wandb.proto.wandb_internal_pb2 import Record

def records(data):  # as LevelDB logs: blocks of 32 KiB, of parts with checksum, length and kind
    place, parts = 7, b""
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole one, or the last part
            yield Record.FromString(parts)
            parts = b""

runs = []
for path in sorted(glob.glob(sys.argv[1] + "/wandb/offline-run-*/*.wandb")):
    run = {"id": "", "config": {}, "grids": [], "losses": []}
    for record in records(open(path, "rb").read()):
        run["id"] = record.run.run_id or run["id"]
        for item in [*record.config.update, *record.run.config.update]:
            run["config"][item.key or item.nested_key[0]] = json.loads(item.value_json)
        row = {i.key or i.nested_key[0]: json.loads(i.value_json) for i in record.history.item}
        for name, key in (("grids", "samples"), ("losses", "train/loss")):
            run[name] += [row["trainer/global_step"]] if key in row else []
    runs.append(run)
print(json.dumps(runs))
"""


@pytest.mark.slow
def test_weights_and_biases_offline(digits: None, tmp_path: Path):
    """Grid, config and one run over a stop, all in the run folder."""
    pytest.importorskip("wandb", reason="the extra [wandb] is not installed")
    command = [sys.executable, "-m", "w2s_train", "fit", "-c", "configs/digits_w2s.yaml"]
    command += ["-c", "tests/tiny.yaml", "--trainer.default_root_dir", str(tmp_path / "run")]
    command += ["--trainer.logger=lightning.pytorch.loggers.WandbLogger", "--ckpt_path=last"]
    command += ["--trainer.logger.init_args.offline=true"]
    before = set(ROOT.iterdir())
    for last in (3, 6):
        subprocess.run([*command, f"--trainer.max_steps={last}"], cwd=ROOT, check=True)
    read = [sys.executable, "-c", READ, str(tmp_path / "run")]
    first, second = json.loads(subprocess.run(read, capture_output=True, check=True).stdout)
    assert first["id"] == second["id"] != ""
    assert (first["grids"], second["grids"]) == ([3], [6])
    assert (first["losses"], second["losses"]) == ([1, 2, 3], [4, 5, 6])
    for found, last in ((first, 3), (second, 6)):
        assert found["config"]["trainer"]["max_steps"] == last
    assert set(ROOT.iterdir()) - before == set()  # no ./wandb
    assert steps(tmp_path / "run") == [1, 2, 3, 4, 5, 6]
