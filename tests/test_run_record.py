"""What a run keeps when something goes wrong, and what it shows."""

import errno
import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from w2s_train.errors import DIVERGED, NO_PROGRESS, PEER_LOST, PREEMPTED, Stopped
from w2s_train.running import loggers as metrics_csv
from w2s_train.running.loggers import MetricsCSV
from w2s_train.running.progress import Progress
from w2s_train.running.record import STARTS, Record


@pytest.mark.parametrize(
    "error, kept",
    [
        (Stopped("", PEER_LOST), True),
        (ValueError(), True),
        *((Stopped("", status), False) for status in (PREEMPTED, DIVERGED, NO_PROGRESS)),
    ],
    ids=repr,
)
def test_which_ends_are_counted(tmp_path: Path, error: Exception, kept: bool):
    """What is started again without having been saved may loop: a lost process, or a crash."""
    (tmp_path / STARTS).touch()
    Record(tmp_path).ended(error)
    assert (tmp_path / STARTS).exists() == kept


@pytest.mark.parametrize("full", [False, True])
def test_a_short_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: bool):
    """The rest of the line follows; where there is no room for it, nothing of it stays."""
    asked = []

    class Short(io.FileIO):
        def write(self, data: Any) -> int:
            asked.append(data)
            if full and len(asked) > 1:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data[:3])

    numbers = MetricsCSV(str(tmp_path))
    numbers.path.write_bytes(b"step,loss\r\n")
    monkeypatch.setattr(
        metrics_csv, "open", lambda path, mode, **_: Short(path, mode), raising=False
    )
    if full:
        with pytest.raises(OSError, match="No space"):
            numbers._append(b"1,0\r\n")
    else:
        numbers._append(b"1,0\r\n")
    assert asked == [b"1,0\r\n", b"\r\n"]
    assert numbers.path.read_bytes() == b"step,loss\r\n" + b"1,0\r\n" * (not full)


def test_a_loss_that_was_not_logged_yet_is_not_nan(capsys):
    """A line of progress before the first entry of the log shows no number, and no nan."""
    trainer: Any = SimpleNamespace(
        global_step=0, max_steps=100, world_size=1, accumulate_grad_batches=1
    )
    module: Any = SimpleNamespace(last_metrics={})
    bar, batch = Progress(every=1, seconds=0), {"label": torch.zeros(4)}
    bar.on_train_start(trainer, module)
    for step, metrics in enumerate(({}, {"train/loss": 0.25}), 1):
        trainer.global_step, module.last_metrics = step, metrics
        bar.on_train_batch_end(trainer, module, None, batch, step)
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("step 1/100  loss –  ")
    assert second.startswith("step 2/100  loss 0.2500  ")
