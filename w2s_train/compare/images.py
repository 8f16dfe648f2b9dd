"""Folders of `lightning imagine`: read them, and say what of them may be compared."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from w2s_train.compare.runs import find, flatten
from w2s_train.errors import UserError

NAME = "imagine.json"
SCHEMA = 1
OF_THE_ARM = ("guidance", "guidance_settings")  # of the protocol, what the arms are about
# May differ, and are then listed; everything else in the protocol must agree.
LISTED = ("model.name", "git_commit", "versions")
SHORT = 100  # characters of a value in an error
Key = tuple[str, int]  # prompt and seed


@dataclass(frozen=True)
class Image:
    """What is known of one image.

    Args:
        file: Its name in the folder.
        category: Of the prompt, if its file has one.
        evaluations: Of the network, in whole networks.
        seconds: That it took.
        scores: By the judge's name; higher is better.
    """

    file: str
    category: str | None
    evaluations: float
    seconds: float
    scores: dict[str, float]


@dataclass(frozen=True)
class Folder:
    """One arm: a folder of images with one guidance.

    Args:
        name: In the tables.
        path: The folder.
        protocol: What its images depend on, as ``imagine.json`` has it.
        judges: Fingerprints of the judges' weights, by name.
        images: By prompt and seed.
        distances: Of all images together to a reference, by name.
    """

    name: str
    path: Path
    protocol: dict[str, Any]
    judges: dict[str, str]
    images: dict[Key, Image]
    distances: dict[str, dict[str, Any]]

    @property
    def guidance(self) -> str:
        """In words."""
        return str(self.protocol["guidance"])

    @property
    def facts(self) -> dict[str, Any]:
        """What must agree, by dotted key."""
        left_out = tuple(f"{key}." for key in (*OF_THE_ARM, *LISTED))
        flat = flatten(self.protocol)
        return {key: x for key, x in flat.items() if not f"{key}.".startswith(left_out)}

    @property
    def listed(self) -> dict[str, Any]:
        """What may differ, by dotted key."""
        return {key: x for key, x in flatten(self.protocol).items() if key not in self.facts}


def are_images(patterns: Sequence[str]) -> bool:
    """Whether these are folders of `lightning imagine`, and not run folders.

    Args:
        patterns: Paths and globs; what names nothing is a matter of whoever reads them.

    Raises:
        UserError: There are some of each.
    """
    folders = [path for each in patterns for path in _found(each)]
    with_images = [path for path in folders if (path / NAME).is_file()]
    runs = [
        path for path in folders if (path / "config.yaml").is_file() and path not in with_images
    ]
    if with_images and runs:
        raise UserError(
            f"run={runs[0]}: must be a folder of `lightning imagine`, as {with_images[0]} is; runs "
            "are compared by themselves"
        )
    return bool(with_images)


def _found(pattern: str) -> list[Path]:
    try:
        return find(pattern)
    except UserError:
        return []


def read_folders(patterns: Sequence[str]) -> list[Folder]:
    """Read all folders, each once, sorted by name: their order says nothing.

    Args:
        patterns: Paths and globs.

    Raises:
        UserError: One cannot be read, or differs from the others in what must agree.
    """
    paths = {path.resolve(): path for pattern in patterns for path in find(pattern)}
    names = [path.name for path in paths]
    folders = [
        _read(path, path.name if names.count(path.name) == 1 else str(given))
        for path, given in paths.items()
    ]
    if len(folders) < 2:
        raise UserError(f"run={folders[0].path}: must be at least two folders of images")
    folders.sort(key=lambda folder: folder.name)
    _check_protocols(folders)
    return folders


def _read(path: Path, name: str) -> Folder:
    file = path / NAME
    if not file.is_file():
        raise UserError(f"run={path}: must be a folder of `lightning imagine`, with {NAME}")
    try:
        content = json.loads(file.read_text("utf-8"), parse_constant=_refuse)
        if content["schema"] != SCHEMA:
            raise UserError(f"{file}: schema={content['schema']}: must be {SCHEMA}")
        protocol = content["protocol"]
        _ = protocol["guidance"], protocol["guidance_settings"]["class"], protocol["model"]
        judges = {str(key): str(value) for key, value in content["judges"].items()}
        images = {(str(e["prompt"]), int(e["seed"])): _image(e) for e in content["images"]}
        distances = dict(content.get("distances", {}))
        _ = [(float(each["value"]), each["images"]) for each in distances.values()]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file}: must be a record of `lightning imagine`; {error!r}") from error
    if not images:
        raise UserError(f"{file}: must have at least one image")
    return Folder(name, path, protocol, judges, images, distances)


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is no number")


def _image(entry: dict[str, Any]) -> Image:
    scores = {str(name): float(value) for name, value in entry["scores"].items()}
    took = float(entry["evaluations"]), float(entry["seconds"])
    return Image(os.path.basename(entry["file"]), entry["category"], *took, scores)


def _check_protocols(folders: Sequence[Folder]) -> None:
    facts = [folder.facts for folder in folders]
    for key in dict.fromkeys(key for each in facts for key in each):
        values = [_said(each.get(key)) for each in facts]
        if len({*values}) > 1:
            usual = max(sorted({*values}), key=values.count)
            odd = next(i for i, value in enumerate(values) if value != usual)
            raise UserError(
                f"run={folders[odd].path}: {key}={values[odd][:SHORT]}: must be {usual[:SHORT]}, "
                f"as in {folders[values.index(usual)].path}"
            )


def _said(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def common_scores(folders: Sequence[Folder], keys: Sequence[Key], refused: list[str]) -> list[str]:
    """Names of the scores that all folders have of these images; ``refused`` says why not others.

    Args:
        folders: Of the comparison.
        keys: Prompts and seeds that all of them have.
        refused: Gets a line for each score that is left out.
    """
    found = []
    for name in sorted({name for folder in folders for name in folder.judges}):
        lacking = {
            folder.name: sum(name not in folder.images[key].scores for key in keys)
            for folder in folders
        }
        some = {who: n for who, n in lacking.items() if n}
        prints = {folder.judges[name]: folder.name for folder in folders if name in folder.judges}
        if len(prints) > 1:
            said = " and ".join(f"{digest} ({who})" for digest, who in sorted(prints.items()))
            refused.append(f"{name}: comes from different weights, {said}")
        elif some:
            who = ", ".join(f"{who} ({n:,} of {len(keys):,} images)" for who, n in some.items())
            refused.append(f"{name}: is missing in {who}; the command with `--scores` adds it")
        else:
            found.append(name)
    return found
