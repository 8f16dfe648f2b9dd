"""What earlier commits wrote is read today, or refused with the last commit that could."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import ROOT
from refusals import MINIMAL, parsed, refusal

from w2s_train.command.config import check_arguments
from w2s_train.command.run import compose
from w2s_train.errors import UserError
from w2s_train.loading import MOVED, REMOVED, without_removed
from w2s_train.module import DiffusionModule

STORED = sorted((ROOT / "experiments").glob("*/runs/*/config.yaml"))
GONE = [path for path in STORED if "share: 0.25" in path.read_text()]


def form(node: Any) -> Any:
    """A config without its values, but for the names of classes."""
    if isinstance(node, dict):
        return {key: value if key == "class_path" else form(value) for key, value in node.items()}
    return [form(value) for value in node] if isinstance(node, list) else None


def one_of_each_form(paths: list[Path]) -> list[Path]:
    forms = {json.dumps(form(yaml.safe_load(path.read_text()))): path for path in paths}
    return sorted(forms.values())


# Arguments that configs before did not have, and the values that are of no effect.
NEWER = dict(scales=None, scales_from=0, rope=False, swiglu=False, rmsnorm=False, shift=True)
NEWER |= dict(class_tokens=0, data_on=None)


def check(path: Path) -> None:
    """It is read as it was written, less what is gone."""
    check_arguments(["-c", str(path)])
    allowed = "--allow_imports=experiments"  # where classes of studies lie
    config = parsed(
        "-c", str(path), "--ckpt_path=null", allowed
    )  # where a resumed run went on from
    stated = without_removed(yaml.safe_load(path.read_text()))
    for name in ("network", "sampler"):
        found = config.model[name].as_dict()
        new = found["init_args"].keys() - stated["model"][name]["init_args"].keys()
        for key in new & NEWER.keys():
            assert found["init_args"].pop(key) == NEWER[key]
        assert found == stated["model"][name]
    segments = stated["model"]["objective"]["init_args"]["segments"]
    found = config.model.objective.init_args.segments
    for ours, theirs in zip(found or [], segments or [], strict=True):
        assert ours.class_path == theirs["class_path"]
        arguments = theirs["init_args"]
        numbers = [name for name in arguments if not isinstance(arguments[name], dict)]
        assert {"low", "high"} < set(numbers)
        assert all(ours.init_args[name] == arguments[name] for name in numbers)
        assert ours.init_args.weak.class_path == arguments["weak"]["class_path"]
    assert config.model.label_dropout == stated["model"]["label_dropout"]
    assert config.trainer.max_steps == stated["trainer"]["max_steps"]


@pytest.mark.slow
def test_stored_configs():
    assert len(STORED) > 200 and len(GONE) == 6
    for path in one_of_each_form([path for path in STORED if path not in GONE]):
        check(path)


@pytest.mark.slow
@pytest.mark.long
def test_all_stored_configs():
    for path in STORED:
        if path not in GONE:
            check(path)


def test_stored_configs_of_what_is_gone(tmp_path: Path):
    message = refusal(tmp_path / "run", "-c", str(GONE[0]))
    key = "model.objective.init_args.segments[1].init_args.share=0.25"
    assert f"error: {key}: is gone, must be 1.0 or left out; commit b8536ed ran it last" == message


@pytest.mark.parametrize("path", MOVED)
def test_classes_that_moved(path: str, tmp_path: Path):
    for option in (path, f"{{class_path: {path}, init_args: {{num_classes: 4, depth: 1}}}}"):
        message = refusal(tmp_path / "run", f"--trainer.callbacks={option}")
        assert f"class_path={path}: must be leaves.LeavesScores" in message
        assert "commit b8536ed ran it last" in message


def test_what_is_gone_has_no_constructor():
    from w2s_train.segment import Extrapolation

    assert list(REMOVED) == ["w2s_train.segment.Extrapolation"]
    for name in REMOVED["w2s_train.segment.Extrapolation"]:
        assert name not in Extrapolation.__init__.__annotations__


@pytest.mark.slow
def test_settings_of_old_checkpoints(tmp_path: Path):
    """All of them hold ``share``, which is dropped at its default."""
    weak = "{class_path: w2s_train.weak.IntermediateHead, init_args: {block: 0}}"
    segment = f"{{low: 0.0, high: 1.0, scale: 0.3, weak: {weak}}}"
    segments = f"[{{class_path: w2s_train.segment.Extrapolation, init_args: {segment}}}]"
    option = f"--model.objective.init_args.segments={segments}"
    model = compose(["fit", "-c", str(MINIMAL), option], run=False).model
    content: dict[str, Any] = {"state_dict": model.state_dict(), "global_step": 3}
    model.on_save_checkpoint(content)
    content["hyper_parameters"] = json.loads(json.dumps(dict(model.hparams)))
    arguments = content["hyper_parameters"]["objective"]["init_args"]["segments"][0]["init_args"]
    for share in (1.0, 0.25):
        arguments["share"] = share
        torch.save(content, tmp_path / f"{share}.ckpt")
    loaded = DiffusionModule.load_from_checkpoint(tmp_path / "1.0.ckpt").state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(loaded[name], value), name
    with pytest.raises(UserError, match=r"share=0.25: is gone, .* commit b8536ed ran it last"):
        DiffusionModule.load_from_checkpoint(tmp_path / "0.25.ckpt")
