"""The run folder: where a run lives, what it goes on from, and what it writes down there."""

import contextlib
import importlib.metadata
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from filelock import Timeout
from lightning import Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from rich.console import Console
from rich.table import Table

from w2s_train import __version__
from w2s_train.checkpoint_file import check_local, damage, newest_first
from w2s_train.errors import NO_PROGRESS, PEER_LOST, Stopped, UserError, one_line
from w2s_train.files import atomic_write, expanded, locked
from w2s_train.running.loggers import log_config, run_ids
from w2s_train.scores import git_commit, read_record
from w2s_train.secrets import redacted

STARTS = "starts.json"
# What a folder that holds a run has some of, or the above.
OURS = "config.yaml environment.json metrics.csv scores.json checkpoints samples code logs".split()
PER_STEP = "images_per_step"  # of all processes: also changed by their number
PRECISION = "precision"  # in effect: also changed by a plugin
RESTARTS = 3  # without progress, before another one is refused
PACKAGES = ("torch", "torchvision", "lightning", "timm", "webdataset", "clean-fid")


def run_folder(config: Any) -> Path:
    """Where a run lives: as configured, or with its checkpoint, or ``runs/CONFIG+OVERLAY``."""
    if config.trainer.default_root_dir:
        return expanded("trainer.default_root_dir", config.trainer.default_root_dir)
    checkpoint = Path(getattr(config, "ckpt_path", None) or "")
    if checkpoint.parent.name == "checkpoints":
        return checkpoint.parent.parent
    names = [Path(str(path)).stem for path in config.config or []]
    return Path("runs") / ("+".join(names) or "unnamed")


def find_checkpoint(
    ckpt_path: str | None, folder: Path, subcommand: str, *, published: bool = False
) -> str | None:
    """The checkpoint to start from; says which it is when asked for the last one.

    A damaged last one is passed over, with a warning, for the newest that is whole. A network that
    is ``published`` has weights without one.
    """
    if ckpt_path is None:
        if subcommand != "fit" and not published:
            raise UserError(f"ckpt_path=null: {subcommand} needs a checkpoint file, or last")
        return None
    check_local(ckpt_path, "ckpt_path")
    if ckpt_path == "last":
        return _last(folder / "checkpoints", subcommand)
    if subcommand != "fit" and Path(ckpt_path).is_dir():
        return _last(Path(ckpt_path) / "checkpoints", subcommand)
    if not Path(ckpt_path).is_file():
        raise UserError(f"ckpt_path={ckpt_path}: must be an existing file, or last")
    if problem := damage(Path(ckpt_path)):
        other = next((p for p in newest_first(Path(ckpt_path).parent) if not damage(p)), None)
        whole = f"; {other} is whole" if other else ""
        raise UserError(f"ckpt_path={ckpt_path}: must be a whole checkpoint; {problem}{whole}")
    return ckpt_path


def _last(folder: Path, subcommand: str) -> str | None:
    """The newest checkpoint that is whole."""
    newest = folder / "last.ckpt"
    problems = []
    for path in newest_first(folder):
        if problem := damage(path):
            problems.append(f"{path}: {problem}")
            continue
        name = newest if newest.exists() and newest.resolve() == path.resolve() else path
        if problems:
            rank_zero_warn(f"{'; '.join(problems)}; an earlier one is used: {name}")
        goes_on = "going on from" if subcommand == "fit" else "weights of"
        rank_zero_info(f"{goes_on} {name} ({path.name})")
        return str(path)
    if problems:
        # To begin anew would overwrite what may still be of use.
        raise UserError(f"ckpt_path=last: none is whole; {'; '.join(problems)}")
    if subcommand != "fit":
        raise UserError(f"ckpt_path=last: there is no {newest}")
    rank_zero_info(f"no {newest} yet: starting from the beginning")
    return None


def environment(trainer: Trainer) -> dict[str, Any]:
    """Command, versions, machine and devices of this process."""
    cuda = torch.cuda.is_available()
    return {
        "command": redacted(sys.argv),
        "git_commit": git_commit(),
        "python": platform.python_version(),
        "packages": {"w2s_train": __version__}  # also where it runs without being installed
        | {name: importlib.metadata.version(name) for name in PACKAGES},
        "host": platform.node(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        if cuda
        else [],
        "processes": trainer.world_size,
        PRECISION: str(trainer.precision),
    }


def _content(path: Path, kind: type[dict[str, Any]] | type[list[Any]]) -> Any:
    """Of a JSON file of a run; empty where there is none."""
    try:
        found = json.loads(path.read_text()) if path.is_file() else kind()
    except ValueError:
        found = None
    if not isinstance(found, kind):
        raise UserError(f"{path}: must hold a JSON {kind.__name__} of a run; remove it")
    return found


class Record:
    """Keeps the run folder.

    A fresh fit never writes into an earlier run: it moves that run aside, to ``FOLDER.1``,
    ``FOLDER.2`` and so on. A lock keeps two fits out of one folder. ``config.yaml`` is the complete
    config, without secrets; ``environment.json`` gets one element per start; starts that come no
    further are counted in ``starts.json`` until one ends in good order; at the end a table of the
    scores is printed.

    Args:
        folder: Of the run.
        config: Of a fit: plain values.
        resumed: The fit goes on from a checkpoint of this folder.
        keeps: It keeps the folder, which may have no checkpoint yet.
    """

    def __init__(
        self, folder: Path, config: Any = None, resumed: bool = False, keeps: bool = False
    ) -> None:
        self.folder, self.config = folder, config
        self.resumed, self.keeps = resumed, keeps or resumed
        self.different = ""  # from the start before; said when nobody can refuse it any more
        self.lock = contextlib.ExitStack()
        self.starts: dict[str, Any] = {}

    def check_progress(self, start: str | None) -> None:
        """Refuse one more restart where several have come no further; on all processes alike.

        Args:
            start: The checkpoint to start from.
        """
        path, name = self.folder / STARTS, Path(start).name if start else "the beginning"
        if not self.keeps:
            return
        found = _content(path, dict)
        number = found.get("number", 0) if found.get("from") == name else 0
        if number > RESTARTS:
            raise Stopped(
                f"{RESTARTS} restarts from {name} have come no further; see what went wrong, then "
                f"remove {path} to try again",
                NO_PROGRESS,
            )
        self.starts = {"from": name, "number": number + 1}

    def last_config(self) -> dict[str, Any]:
        """The config of the start before, with its images per step; empty if it is not known.

        That of ``environment.json``, since a user may have edited ``config.yaml`` for this start;
        runs of older versions have it in the latter only.
        """
        last: dict[str, Any] = [{}, *self._earlier()][-1]
        if last.get("config"):
            measured = {name: last[name] for name in (PER_STEP, PRECISION) if name in last}
            return dict(last["config"]) | measured
        path = self.folder / "config.yaml"
        try:
            return dict(yaml.safe_load(path.read_text()) or {}) if path.is_file() else {}
        except (yaml.YAMLError, ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: must be the record of a run; {one_line(error)}") from error

    def run_ids(self) -> dict[str, list[Any]]:
        """What `w2s_train.running.loggers.run_ids` was last; empty if the run is a new one."""
        ids: dict[str, list[Any]] = {}
        for start in self._earlier() if self.resumed else []:
            ids |= start.get("loggers", {})
        return ids

    def _earlier(self) -> list[dict[str, Any]]:
        """Earlier starts, as ``environment.json`` has them."""
        path = self.folder / "environment.json"
        starts: list[Any] = _content(path, list)
        if not all(isinstance(start, dict) for start in starts):
            raise UserError(f"{path}: must be the record of a run; remove it")
        return starts

    def claim(self) -> None:
        """Make the folder this run's own; on the first process, before loggers write there."""
        folder = self.folder
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            self.lock.enter_context(locked(folder.parent / f".{folder.name}.lock", seconds=0))
        except Timeout:
            raise UserError(
                f"trainer.default_root_dir={folder}: another fit is writing there; "
                "choose another folder"
            ) from None
        except OSError as error:
            raise UserError(
                f"trainer.default_root_dir={folder}: must lie in a folder that can be written, for "
                f"a lock beside it and for earlier runs ({error.strerror}: {error.filename})"
            ) from error
        if folder.exists() and not folder.is_dir():
            raise UserError(f"trainer.default_root_dir={folder}: must be a folder, not a file")
        held = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
        if held and held.isdisjoint([*OURS, STARTS]):
            raise UserError(
                f"trainer.default_root_dir={folder}: must be the folder of a run, or empty; it "
                f"holds {sorted(held)[0]}"
            )
        if held and not self.keeps:
            names = (folder.with_name(f"{folder.name}.{i}") for i in range(1, sys.maxsize))
            aside = next(path for path in names if not path.exists())
            folder.rename(aside)
            print(f"{folder} held an earlier run; it is now {aside}")
        folder.mkdir(exist_ok=True)
        if not self.resumed:  # at once: whatever fails from here on, the folder is known as a run's
            self.write_config()

    # ---- of the first process --------------------------------------------------------------

    def write_config(self) -> None:
        """Write ``config.yaml``."""
        text = yaml.safe_dump(redacted(self.config), sort_keys=False)
        with atomic_write(self.folder / "config.yaml") as file:
            file.write(text.encode())

    def count_start(self) -> None:
        """Write down that there is one more start, as long as it comes no further."""
        if self.starts:
            with atomic_write(self.folder / STARTS) as file:
                file.write(json.dumps(self.starts).encode())

    def write_start(self, trainer: Trainer) -> None:
        """Write down the environment, the config and the loggers' runs of this start."""
        config, ids = redacted(self.config), run_ids(trainer.loggers)
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        start = environment(trainer) | {PER_STEP: data.images_per_step(trainer)}
        start |= {"loggers": ids} if ids else {}
        module: Any = trainer.lightning_module
        encoders = module.objective.align.encoders()
        start |= {"encoders": encoders} if encoders else {}
        entries = json.dumps([*self._earlier(), start | {"config": config}], indent=1)
        with atomic_write(self.folder / "environment.json") as file:
            file.write(entries.encode() + b"\n")
        log_config(trainer.loggers, config)

    def ended(self, error: BaseException | None = None) -> None:
        """It came to its end, or was stopped and saved; other errors count as no progress."""
        if error is None or isinstance(error, Stopped) and error.status != PEER_LOST:
            (self.folder / STARTS).unlink(missing_ok=True)

    def release(self) -> None:
        """Give the folder up."""
        self.lock.close()

    def print_scores(self) -> None:
        """Print the scores, oldest first, and where the run is."""
        table = Table(title="scores")
        for column in ("step", "metric", "value", "weights", "guidance", "n", "wall-clock"):
            table.add_column(column, justify="right")
        found = (self.folder / "scores.json").is_file()
        record = read_record(self.folder) if found else None
        for score in record.scores if record else ():
            table.add_row(
                str(score.step),
                score.metric,
                f"{score.value:.4f}",
                score.weights,
                score.guidance,
                str(score.protocol.n),
                f"{score.protocol.wall_clock_seconds:.0f} s",
            )
        if table.row_count:
            Console(width=None if sys.stdout.isatty() else 100).print(table)
        for fault in record.faults if record else ():
            print(f"not in the table: {fault.message}")
        print(f"run folder: {self.folder}")
