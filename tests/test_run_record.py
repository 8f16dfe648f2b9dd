"""What a run folder keeps when something goes wrong: the count of starts, and whole lines."""

import errno
import io
from pathlib import Path
from typing import Any

import pytest

from w2s_train.errors import DIVERGED, NO_PROGRESS, PEER_LOST, PREEMPTED, Stopped
from w2s_train.running import loggers as metrics_csv
from w2s_train.running.loggers import MetricsCSV
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
