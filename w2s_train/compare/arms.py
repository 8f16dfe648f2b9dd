"""Arms: runs of the same config with different seeds."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from w2s_train.compare.protocol import Series
from w2s_train.compare.runs import Run
from w2s_train.errors import UserError

SHOWN_IN_NAME = 3  # settings that tell arms of one name apart


@dataclass(frozen=True)
class Arm:
    """Runs that differ in their seeds only.

    Args:
        name: As in the tables.
        runs: By seed.
    """

    name: str
    runs: list[Run]

    @property
    def settings(self) -> dict[str, Any]:
        """The config that the runs share."""
        return self.runs[0].settings


def group(runs: Sequence[Run]) -> list[Arm]:
    """Put runs of the same config together, in the order given."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(json.dumps(run.settings, sort_keys=True, default=str), []).append(run)
    together = [sorted(found, key=lambda run: run.seed) for found in groups.values()]
    return [Arm(name, runs) for name, runs in zip(_names(together), together, strict=True)]


def _names(groups: Sequence[Sequence[Run]]) -> list[str]:
    """The folders' names without seeds; where two agree, with what differs in their configs."""
    stems = [runs[0].stem for runs in groups]
    names: list[str] = []
    for stem, runs in zip(stems, groups, strict=True):
        same = [
            other[0].settings for other, name in zip(groups, stems, strict=True) if name == stem
        ]
        keys = _differing(same)[:SHOWN_IN_NAME]
        values = [f"{key.rpartition('.')[2]}={short(runs[0].settings.get(key))}" for key in keys]
        name = f"{stem} ({', '.join(values)})" if values else stem
        names.append(f"{name} #{names.count(name) + 1}" if name in names else name)
    return names


def _differing(all_settings: Sequence[dict[str, Any]]) -> list[str]:
    """Keys whose values differ, in the configs' order; absent, null and false are the same."""
    keys = dict.fromkeys(key for settings in all_settings for key in settings)
    return [
        key for key in keys if len({_plain(settings.get(key)) for settings in all_settings}) > 1
    ]


def _plain(value: Any) -> str:
    return json.dumps(None if value is False else value, default=str)


def short(value: Any) -> str:
    """A setting for people: classes without their module."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    is_class = "/" not in text and " " not in text and text.rpartition(".")[2][:1].isupper()
    return text.rpartition(".")[2] if is_class else text


def differences(arms: Sequence[Arm], series: dict[str, list[Series]]) -> dict[str, dict[str, Any]]:
    """Settings that differ by key and arm; arms that do not have a setting are left out of it.

    The commit of the code and the machine are among them.
    """
    found = {
        key: {arm.name: arm.settings[key] for arm in arms if arm.settings.get(key) is not None}
        for key in _differing([arm.settings for arm in arms])
    }
    for key in ("git_commit", "machine"):
        values = {}
        for arm in arms:
            if key == "machine":
                had = {run.machine or "unknown" for run in arm.runs}
            else:
                had = {commit[:7] for one in series[arm.name] for commit in one.commits}
            values[arm.name] = ", ".join(sorted(had))
        if len(set(values.values())) > 1:
            found[key] = values
    return found


def find_baseline(arms: Sequence[Arm], name: str | None) -> Arm:
    """The arm of that name; without one, the arm whose objective has no segments.

    Raises:
        UserError: None or several; the message lists the arms.
    """
    names = ", ".join(arm.name for arm in arms)
    if name is not None:
        named = [arm for arm in arms if arm.name == name]
        if not named:
            raise UserError(f"baseline={name}: must be one of {names}")
        return named[0]
    plain = [arm for arm in arms if arm.runs[0].is_plain]
    if len(plain) != 1:
        kind = "several arms have" if plain else "no arm has"
        raise UserError(f"baseline=null: {kind} no segments; must be one of {names}")
    return plain[0]
