"""What every benchmark writes beside its numbers, and how."""

import json
import os
import platform
import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from w2s_train.callbacks.run_record import git_commit
from w2s_train.files import atomic_write


def about() -> dict[str, Any]:
    """Where, when, with what and of which commit."""
    cuda = torch.cuda.is_available()
    cpu = f"{platform.machine()}, {os.cpu_count()} CPUs"
    return {
        "git_commit": git_commit(),
        "machine": torch.cuda.get_device_name() if cuda else cpu,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def write_json(path: Path, entries: list[dict[str, Any]]) -> None:
    """The file has all entries, or those that it had before."""
    with atomic_write(path) as file:
        file.write((json.dumps(entries, indent=1) + "\n").encode())


def synchronize() -> None:
    """Wait for the device, if there is one beside the host."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
