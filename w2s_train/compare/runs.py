"""Run folders: find them, and read what a comparison needs."""

import glob
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from w2s_train.errors import UserError
from w2s_train.scores import Score, read_scores

# What may differ between the seeds of one arm.
SEEDS_AND_PLACES = frozenset(
    {"seed_everything", "data.seed", "trainer.default_root_dir", "checkpoint.dirpath"}
    | {"ckpt_path", "weights_only"}
)
PNG_START, PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"


@dataclass(frozen=True)
class Run:
    """What a run folder says.

    Args:
        folder: The folder.
        seed: ``seed_everything``.
        settings: The config by dotted key, without seeds and places.
        scores: Oldest first.
        machine: Where it ran, as far as times are concerned; None if not recorded.
    """

    folder: Path
    seed: int
    settings: dict[str, Any]
    scores: list[Score]
    machine: str | None

    @property
    def is_plain(self) -> bool:
        """The objective has no segments."""
        return not any(key.startswith("model.objective.segments.") for key in self.settings)

    @property
    def stem(self) -> str:
        """The folder's name without its seed: none-10 and none_seed10 are both "none"."""
        name = self.folder.resolve().name
        return re.sub(rf"[-_.+]?(seed)?[-_=]?{self.seed}$", "", name) or name

    def grid(self, step: int) -> bytes | None:
        """The sample grid of a step, a PNG file; None if there is none.

        Raises:
            UserError: The file is not a whole PNG.
        """
        path = self.folder / "grids" / f"step-{step:06d}.png"
        if not path.is_file():
            return None
        content = path.read_bytes()
        if not content.startswith(PNG_START) or not content.endswith(PNG_END):
            raise UserError(f"{path}: must be a PNG image; it is broken and not shown")
        return content


@dataclass(frozen=True)
class Findings:
    """Runs that can be used, and a line for each one that cannot."""

    runs: list[Run]
    refused: list[str]


def find(pattern: str) -> list[Path]:
    """The folders that a path or a glob names; files in a glob are left out.

    Raises:
        UserError: There is none.
    """
    paths = [Path(pattern)] if Path(pattern).exists() else map(Path, sorted(glob.glob(pattern)))
    folders = [path for path in paths if path.is_dir()]
    if not folders:
        raise UserError(f"run={pattern}: must be a run folder, or a glob of some")
    return folders


def read_all(patterns: Sequence[str], *, unfinished: bool = False) -> Findings:
    """Read all runs that can be read, each once.

    Args:
        patterns: Paths and globs.
        unfinished: Take runs that have not reached their last step.
    """
    runs: list[Run] = []
    refused: list[str] = []
    folders: dict[Path, Path] = {}
    for pattern in patterns:
        try:
            for folder in find(pattern):
                folders.setdefault(folder.resolve(), folder)
        except UserError as error:
            refused.append(str(error))
    for folder in folders.values():
        try:
            run = read(folder)
            if not unfinished:
                check_finished(run)
            runs.append(run)
        except UserError as error:
            refused.append(f"{folder}: {error}")
    return Findings(runs, refused)


def read(folder: Path) -> Run:
    """Read one run.

    Raises:
        UserError: A file that is missing or broken.
    """
    if not any(folder.iterdir()):
        raise UserError("the folder is empty")
    config = _load_config(folder / "config.yaml")
    seed = config.get("seed_everything") or 0
    if not isinstance(seed, int):
        raise UserError(f"config.yaml: seed_everything={seed}: must be a whole number")
    settings = {k: v for k, v in flatten(config).items() if k not in SEEDS_AND_PLACES}
    machine = _machine(folder / "environment.json")
    return Run(folder, int(seed), settings, read_scores(folder), machine)


def check_finished(run: Run) -> None:
    """Refuse a run that would still be scored, going by the distance of its last two scores.

    Raises:
        UserError: It is unfinished.
    """
    last = run.settings.get("trainer.max_steps")
    steps = sorted({0} | {score.step for score in run.scores})
    if isinstance(last, int) and len(steps) > 1 and 2 * steps[-1] - steps[-2] <= last:
        raise UserError(
            f"step={steps[-1]}: unfinished, must be scored up to max_steps, {last}; "
            "--unfinished takes such runs"
        )


def flatten(value: Any, key: str = "") -> dict[str, Any]:
    """A nested config by dotted key; a class stands at the key of its object, without init_args."""
    if isinstance(value, dict) and value:
        flat: dict[str, Any] = {}
        for name, item in value.items():
            here = name in ("class_path", "init_args") and "class_path" in value
            flat |= flatten(item, key if here else f"{key}.{name}".lstrip("."))
        return flat
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        items = [flatten(item, f"{key}.{i}") for i, item in enumerate(value)]
        return {name: item for flat in items for name, item in flat.items()}
    return {} if key and value == {} else {key: value}


def _load_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError("config.yaml: there is none; must be the folder of a run")
    try:
        config = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"config.yaml: cannot be read; {reason}") from error
    if not isinstance(config, dict) or not isinstance(config.get("model"), dict):
        raise UserError("config.yaml: must be a config with a model")
    return config


def _machine(path: Path) -> str | None:
    if not path.is_file():
        return None
    try:
        last = json.loads(path.read_text())[-1]
        devices = sorted(set(last["devices"])) or [f"{last['threads']} of {last['cpus']} CPU cores"]
        return f"{last['host']}: {last['processes']} x {', '.join(devices)}"
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(f"environment.json: cannot be read; {error!r}") from error
