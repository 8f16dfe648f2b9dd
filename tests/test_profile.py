"""``lightning fit --profile``."""

import json
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from w2s_train.running.profile import NEEDED, RECORDED, ROWS, Profile
from w2s_train.running.run import Run

TINY = ["-c", "configs/digits_w2s.yaml", "-c", "tests/tiny.yaml"]


@pytest.mark.slow
@pytest.mark.parametrize("place", [0, 2, len(TINY)])
def test_the_switch_stands_anywhere(place: int, digits: None):
    from w2s_train.command.run import compose

    for switch in ([], ["--profile"]):
        composed = compose(["fit", *TINY[:place], *switch, *TINY[place:]], run=False)
        found = [type(each) for each in composed.trainer.callbacks]
        assert found.count(Profile) == len(switch)
        assert found[-1] is Run and ModelCheckpoint not in found
        assert "profile" not in composed.config.fit


@pytest.mark.slow
def test_only_fit_is_profiled(command):
    with pytest.raises(SystemExit, match="error: --profile: must stand with fit; validate takes"):
        command("validate", "--profile", "--ckpt_path=none.ckpt")


@pytest.mark.slow
def test_short_runs_are_refused(command, tmp_path: Path):
    with pytest.raises(SystemExit, match=rf"error: trainer.max_steps=6: .* {NEEDED} to profile"):
        command("fit", "--profile")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_trace_and_table(command):
    """Both have our operations, and the run is what it would have been."""
    options = [f"--trainer.max_steps={NEEDED + 2}", "--trainer.callbacks=[]"]
    plain, profiled = (
        command("fit", *options, *switch, folder=folder)
        for folder, switch in (("plain", []), ("profiled", ["--profile"]))
    )
    assert not (plain / "profile").exists()
    assert {path.name for path in (profiled / "profile").iterdir()} == {"trace.json", "table.txt"}
    events = json.loads((profiled / "profile/trace.json").read_text())["traceEvents"]
    names = [event["name"] for event in events]
    assert sum(name.startswith("ProfilerStep#") for name in names) == RECORDED
    assert {"aten::linear", "aten::scaled_dot_product_attention"} <= set(names)
    rows = (profiled / "profile/table.txt").read_text().splitlines()[1:]
    assert len(rows) == ROWS
    times = [float(row.split()[0]) for row in rows]
    assert times == sorted(times, reverse=True)
    assert any("aten::" in row for row in rows)
    assert not any("ProfilerStep" in row for row in rows)
    weights = [
        torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
        for folder in (plain, profiled)
    ]
    for name, value in weights[0].items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, weights[1][name]), name


@pytest.mark.slow
def test_a_start_near_the_end_is_not_profiled(command):
    """A job that is requeued with its options ends in good order."""
    options = [f"--trainer.max_steps={NEEDED + 2}", "--trainer.callbacks=[]"]
    command("fit", f"--trainer.max_steps={NEEDED}", *options[1:])
    folder = command("fit", *options, "--profile", "--ckpt_path=last")
    assert (folder / f"checkpoints/step-{NEEDED + 2:06d}.ckpt").exists()
    assert not (folder / "profile").exists()
