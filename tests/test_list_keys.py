"""Keys inside lists on the command line, and names of segments."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import quick, sources
from given import evaluate
from refusals import parsed, refusal
from test_objective import batch, objective
from test_settings import LAST

from w2s_train.command.config import explain
from w2s_train.command.list_keys import ListKey, options, split
from w2s_train.errors import UserError
from w2s_train.guideability.ratio import finish
from w2s_train.models import DiT
from w2s_train.segment import Consistency, Extrapolation

S = "--model.objective.segments"
DIGITS = ("-c", "configs/digits_w2s.yaml")


def segments(*given: str) -> list[dict[str, Any]]:
    """Arguments of each segment that a fit would have."""
    found = parsed(*DIGITS, *given).model.objective.init_args.segments
    return [each.as_dict()["init_args"] for each in found]


@pytest.mark.slow
def test_both_spellings_and_both_forms_set_one_item():
    """All else is as without; the index is that of the config, the weak source's key the same."""
    plain = segments()
    wanted = copy.deepcopy(plain)
    wanted[0]["scale"] = 0.4
    wanted[0]["weak"]["init_args"]["block"] = 1
    wanted[1]["scale"] = 0.25
    full = "--model.objective.init_args.segments"
    short = [f"{S}.0.scale", "0.4", f"{S}.0.weak.block=1", f"{S}.1.scale=0.25"]
    long = [f"{full}.0.init_args.scale=0.4", f"{full}.0.weak.init_args.block", "1"]
    assert segments(*short) == wanted
    assert segments(*long, f"{full}.1.init_args.scale=0.25") == wanted


@pytest.mark.slow
def test_configs_come_first_and_keys_in_their_order(tmp_path: Path):
    """A list of a later config, or of another option, is the one that the keys change."""
    overlay = "configs/weak/branch.yaml"
    assert [each["scale"] for each in segments(f"{S}.0.scale=0.1", "-c", overlay)] == [0.1]
    twice = [f"{S}.0.name=low", f"{S}.low.scale=0.1", f"{S}.0.scale=0.2"]
    assert [each["scale"] for each in segments(*twice)] == [0.2, 0.1]
    # What a config may leave to the command line.
    null = "{class_path: w2s_train.weak.NullClass}"
    segment = (
        f"{{class_path: w2s_train.segment.Extrapolation, init_args: {{low: 0, weak: {null}}}}}"
    )
    (tmp_path / "open.yaml").write_text(
        f"model: {{objective: {{init_args: {{segments: [{segment}]}}}}}}"
    )
    (found,) = segments("-c", str(tmp_path / "open.yaml"), f"{S}.0.high=1", f"{S}.0.scale=0.5")
    assert (found["low"], found["high"], found["scale"]) == (0.0, 1.0, 0.5)


CONFIG = {
    "a": {
        "class_path": "m.A",
        "init_args": {
            "items": [
                {"class_path": "m.B", "init_args": {"x": 1, "none": None, "name": "one"}},
                {"class_path": "m.C"},
            ]
        },
    },
    "plain": [1.0, 2.0],
    "none": None,
}
GIVEN = {
    "an argument": ("a.items.0.x=5", "a.init_args.items", [{"x": 5}, None]),
    "a whole item by name": (
        "a.items.one={class_path: m.B, init_args: {x: 5, none: null, name: one}}",
        "a.init_args.items",
        [{"x": 5}, None],
    ),
    "by name": ("a.items.one.x=5", "a.init_args.items", [{"x": 5}, None]),
    "a part that is not there yet": (
        "a.items.0.none.y=5",
        "a.init_args.items",
        [{"none": {"y": 5}}, None],
    ),
    "of a class without arguments": ("a.items.1.y=5", "a.init_args.items", [None, {"y": 5}]),
    "a number": ("plain.1=5", "plain", [1.0, 5]),
}


@pytest.mark.parametrize("case", GIVEN)
def test_the_whole_list_is_an_option(case: str):
    text, key, changes = GIVEN[case]
    config = copy.deepcopy(CONFIG)
    (option,) = options(config, [ListKey(*text.split("=", 1))], yaml.safe_load)
    name, _, value = option.partition("=")
    items = yaml.safe_load(value)
    assert name == f"--{key}"
    if key == "plain":
        assert items == changes
        return
    for item, before, change in zip(items, CONFIG["a"]["init_args"]["items"], changes, strict=True):
        arguments = before.get("init_args", {}) | (change or {})
        assert item == {"class_path": before["class_path"]} | (
            {"init_args": arguments} if arguments else {}
        )


def test_another_class_begins_without_the_arguments_of_the_old_one():
    given = [("a.items.0.class_path", "m.D"), ("a.items.0.z", "3"), ("a.items.1", "m.E")]
    given.append(("a.items.1.w", "1e-5"))
    (option,) = options(copy.deepcopy(CONFIG), [ListKey(*each) for each in given], yaml.safe_load)
    items = yaml.safe_load(option.partition("=")[2])
    assert items[0] == {"class_path": "m.D", "init_args": {"z": 3}}
    assert items[1]["class_path"] == "m.E"


def test_only_keys_inside_lists_are_taken_out():
    rest = [
        "-c",
        "x.0.yaml",
        "--data.batch_size",
        "3",
        "--seeds",
        "0:3",
        "--trainer.callbacks+=A.0",
    ]
    more = [f"{S}=[1]", "--a.٠=1"]
    assert split([*rest, "--a.0=--x", *more]) == ([*rest, *more], [ListKey("a.0", "--x")])
    # A whole item by its name; what an item that is added is given is the parser's.
    assert split([f"{S}.early={{}}"]) == ([], [ListKey(f"{S}.early"[2:], "{}")])
    added = [f"{S}+=A", f"{S}.scale=1", f"{S}+=B", f"{S}.scale=2"]
    assert split(added) == (added, [])


REFUSED = {
    f"{S}.0.scale=abc": "model.objective.segments.0.scale=abc: must be a number, or a class by",
    f"{S}.0.scal=0.3": "model.objective.segments.0.scal=0.3: Option 'scal' is not accepted; "
    "Extrapolation accepts low, high, scale, weak",
    f"{S}.0.weak.blok=0": "segments.0.weak.blok=0: Option 'blok' is not accepted; IntermediateHead "
    "accepts block",
    f"{S}.2.scale=0.3": "segments.2.scale=0.3: 2 must be one of 0, 1, high, as in model.objective",
    f"{S}.lo.scale=0.3": "segments.lo.scale=0.3: lo must be one of 0, 1, high, as in",
    f"{S}.0.scale": "model.objective.segments.0.scale: must have a value",
    f"{S}.0.scale=1.5": "model.objective.init_args.segments[0].init_args.scale=1.5: must be in [0",
    f"{S}.0.name=5a": "segments[0].init_args.name=5a: must be letters, digits, _ and -",
    f"{S}.0.name=high": "segments=['high', 'high']: must have names of their own",
    f"{S}.0.weak=w2s_train.weak.NulClass": "segments.0.weak=w2s_train.weak.NulClass: there is no "
    "such class; w2s_train.weak has NullClass, ",
    f"{S}.0.weak=w2s_train.weak.Emaa": "w2s_train.weak has IntermediateHead, EMA, "
    "RandomLabel, Snapshot, NullClass, LayerSkip, CoTrained, ShiftedTime, RandomBlocks, "
    "PerturbedTime, ShuffledTokens, DroppedTokens, Checkpoint",
    f"{S}.0.scale=null": "error: model.objective.segments.0.scale=null: must have a value; there",
    f"{S}.1=null": "model.objective.segments.1=null: must be a Segment, by its class_path and",
    f"{S}.٠.scale=0.3": "٠ must be one of 0, 1, high, as in",
    "--trainer.callbacks.-1.x=1": "trainer.callbacks.-1.x=1: must name an item of a list; "
    "trainer.callbacks is null",
    "--trainer.callbacks.FID.x=1": "trainer.callbacks.FID.x=1: must name an item of a list",
    "--model.ema_decay=0.9,0.99": "error: model.ema_decay=0.9,0.99: must be a list in brackets, "
    "[0.9,0.99]",
    f"{S}.0.weak=NulClass": "must have its module, such as w2s_train.weak.NullClass",
    "--model.ema_decay.1=0.9": "model.ema_decay.1=0.9: must name an item of a list; "
    "model.ema_decay is 0.99",
    "--model.objective.0=5": "model.objective.0=5: must name an item of a list; model.objective."
    "init_args.0 is in none",
    "--model.objectiv.segments.0.scale=1": "must name an item of a list; model.objectiv is null",
}


@pytest.mark.fault("18  bad configuration")
@pytest.mark.parametrize("option", quick(REFUSED))
def test_what_cannot_be_meant_is_one_line(option: str, digits: None, tmp_path: Path):
    given = [*DIGITS, f"{S}.1.name=high", "--trainer.callbacks=null", option]
    message = refusal(tmp_path / "run", *given)
    assert REFUSED[option] in message, message
    assert not (tmp_path / "run").exists()


def test_no_segments_have_no_first_one(tmp_path: Path):
    message = refusal(tmp_path / "run", f"{S}.0.scale=0.3")
    assert message == (
        "error: model.objective.segments.0.scale=0.3: must name an item of a list; "
        "model.objective.init_args.segments is null"
    )


def test_names_stand_in_logs_and_descriptions(network: DiT):
    """And change no number."""
    noisy, y = batch()
    logs = []
    for name in (None, "high"):
        high = Extrapolation(0.2, 1.0, 0.4, sources.NullClass(), name=name)
        low = Consistency(0.0, 0.2, sources.NullClass())
        logs.append(evaluate(objective(low, high), network, noisy, y).log)
        logs[-1].commit(torch.tensor(True))
    plain, named = (finish(log.read(lambda x, _: x)) for log in logs)
    renamed = {key.replace("t_0.2-1/", "high/"): value for key, value in plain.items()}
    assert named == renamed and "high/effective_scale" in named
    assert high.describe().startswith("high, 0.2 <= t < 1: NullClass, scale 0.4, ")
    assert low.describe() == "0 <= t < 0.2: consistency with NullClass, weight 0.2"
    for name in ("0", "", "a.b", "a/b", "-a", "a b", "é"):
        with pytest.raises(UserError, match="must be letters, digits, _ and -, a letter first"):
            Extrapolation(0.2, 1.0, 0.4, sources.NullClass(), name=name)


@pytest.mark.slow
def test_a_run_records_what_it_ran_and_says_a_new_name(command, caplog):
    """By the same command line it goes on; its own config takes such keys, too."""
    keys = [f"{S}.0.scale=0.2", f"{S}.1.name=high", f"{S}.high.scale=0.05"]
    folder = command("fit", *keys, "--trainer.callbacks.1.columns=5")

    def recorded(path: Path) -> Any:
        settings = torch.load(path, weights_only=True)["hyper_parameters"]
        return settings["objective"]["init_args"]["segments"]

    config = yaml.safe_load((folder / "config.yaml").read_text())
    kept = config["model"]["objective"]["init_args"]["segments"]
    for found in (kept, recorded(folder / "checkpoints" / "last.ckpt")):
        assert [each["init_args"]["scale"] for each in found] == [0.2, 0.05]
        assert found[1]["init_args"]["name"] == "high"
    assert config["trainer"]["callbacks"][1]["init_args"]["columns"] == 5
    columns = (folder / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"train/high/effective_scale", "train/t_0-0.5/effective_scale"} <= {*columns}
    command(
        "fit", LAST, *keys[:1], f"{S}.1.name=top", f"{S}.top.scale=0.05", "--trainer.max_steps=8"
    )
    assert "segments[1].init_args.name high -> top" in caplog.text
    columns = (folder / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"train/high/effective_scale", "train/top/effective_scale"} <= {*columns}
    starts = json.loads((folder / "environment.json").read_text())
    assert len(starts) == 2


def test_a_value_that_is_no_number():
    said = "Parser key \"images\":\n  - Expected a <class '{}'>\n  Given value: nan"
    assert explain(said.format("int"), {}) == "images=nan: must be a whole number"
    assert explain(said.format("float"), {}) == "images=nan: must be a number"
