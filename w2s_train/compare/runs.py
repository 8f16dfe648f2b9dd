"""Run folders: find them, and read what a comparison needs."""

import glob
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from w2s_train.errors import UserError
from w2s_train.scores import Fault, Score, grid_name, read_record

# What may differ between the seeds of one arm.
SEEDS_AND_PLACES = frozenset(
    {"seed_everything", "data.seed", "trainer.default_root_dir", "checkpoint.dirpath"}
    | {"ckpt_path", "weights_only"}
)
# So may this: it changes no training, and what it changes in scores is checked by their protocols.
EVALUATION = re.compile(
    r"data\.(generation_batch_size|num_generated|sampling_seeds|first_seed|num_workers|dataset"
    r"|train_urls|images|made_by|labels_as_in_training|batch_timeout_minutes|held_out_urls)$"
    r"|trainer\.(callbacks|logger|log_every_n_steps|enable_|val_check_interval)|checkpoint\."
    r"|model\.(scored_weights|generation_block|guidance|sampler|objective\.segments\.\d+\.name$)"
)
DIT = "w2s_train.models.DiT"
# Its arguments that came later, and what runs before them had.
LATER = {"shift": True, "class_tokens": 0, "scales_from": 0}
LOOK_ON = "w2s_train.look_on.LookOn"
PNG_START, PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"


@dataclass(frozen=True)
class Run:
    """What a run folder says.

    Args:
        folder: The folder.
        seed: ``seed_everything``.
        settings: The config by dotted key, without seeds and places.
        scores: Oldest first.
        faults: Entries of ``scores.json`` that cannot be used.
        machine: Where it ran, as far as times are concerned; None if not recorded.
        notes: What else could not be read.
        guidance: While sampling, of the scores that it stands for, where each guidance of a run is
            an arm; None is what the comparison is about.
    """

    folder: Path
    seed: int
    settings: dict[str, Any]
    scores: list[Score]
    faults: list[Fault]
    machine: str | None
    notes: list[str]
    guidance: str | None = None

    @property
    def recipe(self) -> dict[str, Any]:
        """The settings of the training; absent, null and false are the same."""
        return {
            key: value
            for key, value in self.acting.items()
            if value is not None and value is not False and not EVALUATION.match(key)
        }

    @property
    def training_samples(self) -> int | None:
        """Of an epoch, as a score of the fit says it; None if none does."""
        return next((n for s in self.scores if (n := s.protocol.training_samples)), None)

    @property
    def acting(self) -> dict[str, Any]:
        """The settings without those of segments that only look on, which change no training."""
        looks = [f"{key}." for key, value in self.settings.items() if value == LOOK_ON]
        return {
            key: value
            for key, value in self.settings.items()
            if not f"{key}.".startswith(tuple(looks))
        }

    @property
    def is_plain(self) -> bool:
        """The objective has no segments, but such as only look on."""
        return not any(key.startswith("model.objective.segments.") for key in self.acting)

    @property
    def dataset(self) -> str | None:
        """The name of the data: without ``data.dataset`` that of the shards' folder."""
        urls = self.settings.get("data.train_urls")
        return self.settings.get("data.dataset") or (urls and Path(str(urls)).parent.name)

    @property
    def stem(self) -> str:
        """The folder's name without its seed: none-10 and none_seed10 are both "none".

        Where it stands for one guidance of several, that comes behind it.
        """
        name = self.folder.resolve().name
        name = re.sub(rf"([-_]|[-_.+]?seed[-_=]?){self.seed}$", "", name) or name
        if self.guidance is None or len({score.guidance for score in self.scores}) == 1:
            return name
        how = re.sub(r"^inbuilt\((.*)\)$", r"\1", self.guidance)
        return f"{name}: {'unguided' if how == 'none' else how}"

    @property
    def where(self) -> str:
        """The folder, and the guidance that it stands for."""
        return f"{self.folder}" + (f" ({self.guidance})" if self.guidance else "")

    def by_guidance(self, weights: str) -> list["Run"]:
        """One for each guidance that such weights were scored with, the first scored first."""
        found = dict.fromkeys(score.guidance for score in self.scores if score.weights == weights)
        return [
            replace(self, guidance=each, settings=self.settings | {"guidance": each})
            for each in found
        ]

    def grid(self, step: int, weights: str, guidance: str) -> bytes | None:
        """The sample grid of a step, a PNG file; None if there is none of these weights, so guided.

        The file without a setting in its name belongs to the last scored one without a file.
        """
        folder = self.folder / "grids"
        path = folder / grid_name(step, weights, guidance)
        if not path.is_file():
            scored = [(s.weights, s.guidance) for s in self.scores if s.step == step]
            main = [s for s in scored if not (folder / grid_name(step, *s)).is_file()]
            path = folder / grid_name(step)
            if main[-1:] != [(weights, guidance)] or not path.is_file():
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
    """The folders that a path or a glob names; a glob leaves out files and earlier comparisons."""
    paths = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern))
    folders = [Path(path) for path in paths if os.path.isdir(path)]
    if not folders:
        raise UserError(f"run={pattern}: must be a run folder, or a glob of some")
    return [folder for folder in folders if str(folder) == pattern or not _is_output(folder)]


def _is_output(folder: Path) -> bool:
    return os.path.exists(folder / "comparison.json") and not os.path.exists(folder / "config.yaml")


def _moved_aside(folder: Path) -> bool:
    """Whether a later fit has found this run in its folder, and moved it to ``FOLDER.1`` ..."""
    name, dot, number = folder.resolve().name.rpartition(".")
    if not dot or not number.isdecimal():
        return False
    try:
        trainer = _load_config(folder / "config.yaml").get("trainer")
        return Path(trainer["default_root_dir"]).name == name  # type: ignore[index]
    except (UserError, TypeError, KeyError):
        return False  # no run, as `read` says


def read_all(patterns: Sequence[str], *, unfinished: bool = False) -> Findings:
    """Read all runs that can be read, each once.

    Args:
        patterns: Paths and globs; what a later try has moved aside must be named.
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
    named = {Path(pattern).resolve() for pattern in patterns if os.path.exists(pattern)}
    aside = [path for path in folders.keys() - named if _moved_aside(path)]
    if aside:
        names = ", ".join(sorted(str(folders.pop(path)) for path in aside))
        refused.append(f"{names}: moved aside by a later try; taken if named, without a glob")
    for folder in folders.values():
        try:
            run = read(folder)
            if not unfinished:
                check_finished(run)
            runs.append(run)
        except (UserError, OSError) as error:
            refused.append(f"{folder}: {error}")
    return Findings(runs, refused)


def read(folder: Path) -> Run:
    """Read one run."""
    if not any(folder.iterdir()):
        raise UserError("the folder is empty")
    config = _load_config(folder / "config.yaml")
    seed = config.get("seed_everything") or 0
    if not isinstance(seed, int):
        raise UserError(f"config.yaml: seed_everything={seed}: must be a whole number")
    settings = {k: v for k, v in flatten(config).items() if k not in SEEDS_AND_PLACES}
    if settings.get("model.network") == DIT:
        settings = {f"model.network.{k}": v for k, v in LATER.items()} | settings
    record = read_record(folder)
    if not record.scores:
        raise UserError(record.faults[0].message)
    notes: list[str] = []
    machine = _machine(folder / "environment.json", notes)
    return Run(folder, int(seed), settings, record.scores, record.faults, machine, notes)


def check_finished(run: Run) -> None:
    """Refuse a run that would still be scored, going by the distance of its last two scores."""
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
    """The config, in what JSON can say: dates, NaN and infinities become text."""
    if not path.is_file():
        raise UserError("config.yaml: there is none; must be the folder of a run")
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        config = json.loads(json.dumps(config, default=str), parse_constant=str)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"config.yaml: cannot be read; {reason}") from error
    if not isinstance(config, dict) or not isinstance(config.get("model"), dict):
        raise UserError("config.yaml: must be a config with a model")
    return config


def _machine(path: Path, notes: list[str]) -> str | None:
    """Says in ``notes`` if the file is there and cannot be read."""
    if not path.is_file():
        return None
    try:
        last = json.loads(path.read_text(encoding="utf-8"))[-1]
        devices = sorted(set(last["devices"])) or [f"{last['threads']} of {last['cpus']} CPU cores"]
        return f"{last['host']}: {last['processes']} x {', '.join(devices)}"
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        notes.append(f"environment.json: cannot be read, the machine is unknown; {error!r}")
        return None
