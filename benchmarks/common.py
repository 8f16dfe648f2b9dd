"""What every benchmark writes beside its numbers, and how."""

import json
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
    return {
        "git_commit": git_commit(),
        "machine": machine(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def machine() -> str:
    """The GPU's name, or the CPU's."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "CPU of unknown name"


def write_json(path: Path, entries: list[dict[str, Any]]) -> None:
    """The file has all entries, or those that it had before."""
    with atomic_write(path) as file:
        file.write((json.dumps(entries, indent=1) + "\n").encode())


def synchronize() -> None:
    """Wait for the device, if there is one beside the host."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
