"""What benchmarks share: arguments, networks, and what is written beside their numbers."""

import argparse
import json
import shlex
import sys
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import yaml

from w2s_train.files import atomic_write
from w2s_train.models import DiT
from w2s_train.scores import git_commit

ROOT = Path(__file__).resolve().parent.parent
# Networks for latents 4x32x32, of configs/network.
OVERLAYS = {"s2": "dit_s_2", "b2": "dit_b_2", "l2": "dit_l_2", "xl2": "dit_xl_2"}


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


def costs(entry: dict[str, Any]) -> str:
    """Memory and compilation of an entry, for the end of its line; what is none is left out."""
    memory = entry["peak_memory_bytes"]
    return (
        (f"  {memory / 2**30:5.1f} GiB" if memory else "")
        + (f"  compiled in {entry['compile_seconds']:.0f} s" if entry["compile"] else "")
        + (f"  RECOMPILED {entry['recompiles']} times" if entry["recompiles"] else "")
    )


def write_json(path: Path, entries: list[dict[str, Any]]) -> None:
    """The file has all entries, or those that it had before."""
    with atomic_write(path) as file:
        file.write((json.dumps(entries, indent=1) + "\n").encode())


def synchronize() -> None:
    """Wait for the device, if there is one beside the host."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def on_paper(name: str) -> DiT:
    """One of `OVERLAYS`, without memory for its weights."""
    text = (ROOT / "configs" / "network" / f"{OVERLAYS[name]}.yaml").read_text()
    sizes = yaml.safe_load(text)["model"]["network"]["init_args"]
    with torch.device("meta"):
        return DiT(input_size=32, in_channels=4, **sizes)


def parse(
    parser: argparse.ArgumentParser,
    lists: Mapping[str, tuple[str, Iterable[str]]],
    numbers: Mapping[str, tuple[int, int, str]],
) -> argparse.Namespace:
    """Arguments of the command line, checked before any work.

    Args:
        parser: Has what is neither of these two.
        lists: With commas: default, and what they may hold.
        numbers: Default, least value, and what they are.
    """
    for name, (default, known) in lists.items():
        parser.add_argument(f"--{name}", default=default, help=f"of {', '.join(known)}")
    for name, (number, _, text) in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=number, help=text)
    parser.add_argument("--json", type=Path, help="where to write the results")
    args = parser.parse_args()
    for name, (_, known) in lists.items():
        given = getattr(args, name).split(",")
        if unknown := [part for part in given if part not in known]:
            raise SystemExit(f"error: {name}={','.join(unknown)}: must be of {', '.join(known)}")
        setattr(args, name, list(dict.fromkeys(given)))
    for name, (_, least, _) in numbers.items():
        if (value := getattr(args, name)) < least:
            raise SystemExit(f"error: {name}={value}: must be at least {least}")
    if args.json and not args.json.resolve().parent.is_dir():
        raise SystemExit(f"error: json={args.json}: must be in a folder that exists")
    return args
