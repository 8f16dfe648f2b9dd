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
        series: Of its runs, by training seed.
    """

    name: str
    series: list[Series]

    @property
    def runs(self) -> list[Run]:
        """Its runs, by seed."""
        return [one.run for one in self.series]


def group(series: Sequence[Series], refused: list[str]) -> list[Arm]:
    """Put runs of the same config together, in the order given.

    The same config and seed is the same experiment, no further evidence: ``refused`` says which.
    """
    groups: dict[str, dict[int, Series]] = {}
    for one in series:
        run = one.run
        same = groups.setdefault(json.dumps(run.recipe, sort_keys=True), {})
        if same.setdefault(run.seed, one) is not one:
            refused.append(
                f"{run.folder}: seed_everything={run.seed}: must differ from that of "
                f"{same[run.seed].run.folder}, which has the same config"
            )
    together = [[same[seed] for seed in sorted(same)] for same in groups.values()]
    names = _names([some[0].run for some in together])
    return [Arm(name, some) for name, some in zip(names, together, strict=True)]


def _names(runs: Sequence[Run]) -> list[str]:
    """The folders' names without seeds; where two agree, with what differs in their configs."""
    names: list[str] = []
    for run in runs:
        keys = _differing([other.recipe for other in runs if other.stem == run.stem])
        values = [
            f"{key.rpartition('.')[2]}={short(run.settings.get(key))}"
            for key in keys[:SHOWN_IN_NAME]
        ]
        name = unique = f"{run.stem} ({', '.join(values)})" if values else run.stem
        number = 1
        while unique in names:
            number += 1
            unique = f"{name} #{number}"
        names.append(unique)
    return names


def _differing(all_settings: Sequence[dict[str, Any]]) -> list[str]:
    """Keys whose values differ, in the configs' order; absent, null and false are the same."""
    keys = dict.fromkeys(key for settings in all_settings for key in settings)
    return [
        key for key in keys if len({_plain(settings.get(key)) for settings in all_settings}) > 1
    ]


def _plain(value: Any) -> str:
    return json.dumps(None if value is False else value)


def short(value: Any) -> str:
    """A setting for people: classes without their module."""
    text = value if isinstance(value, str) else json.dumps(value)
    is_class = "/" not in text and " " not in text and text.rpartition(".")[2][:1].isupper()
    return text.rpartition(".")[2] if is_class else text


def differences(arms: Sequence[Arm]) -> dict[str, dict[str, Any]]:
    """Settings that differ by key and arm; arms that do not have a setting are left out of it.

    The commit of the code and the machine are among them.
    """
    settings = {arm.name: arm.runs[0].settings for arm in arms}
    found = {
        key: {name: had[key] for name, had in settings.items() if had.get(key) is not None}
        for key in _differing(list(settings.values()))
    }
    commits = {arm.name: {commit_name(c) for s in arm.series for c in s.commits} for arm in arms}
    machines = {arm.name: {run.machine or "unknown" for run in arm.runs} for arm in arms}
    for key, values in (("git_commit", commits), ("machine", machines)):
        if len(set(map(frozenset, values.values()))) > 1:
            found[key] = {name: ", ".join(sorted(had)) for name, had in values.items()}
    return found


def commit_name(name: str) -> str:
    """A commit for people, with what says that the files differed from it."""
    return name[:7] + ("-dirty" if name.endswith("-dirty") else "")


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
