"""What ``lightning tune`` has left in run folders: which guidance was tuned, and how hard."""

import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from w2s_train.compare.protocol import Arm, clashes
from w2s_train.errors import UserError

RESULT = "result.json"
SCHEMA = 1
COLUMNS = ["arm", "run", "guidance", "candidates", "images", "fresh seeds", "unguided", "verdict"]
NOT_TUNED = "not tuned"


@dataclass(frozen=True)
class Tuned:
    """One tuning of a run.

    Args:
        guidance: The winner, as scores name it.
        candidates: How many were tried.
        images: Generated for that.
        metric: Of the next three.
        tuning: Mean on tuning seeds, of the winner.
        fresh: Mean on fresh seeds, guided.
        unguided: On the same seeds.
        verdict: Of the difference.
        about: What all of that depends on: weights, step, sampler, extractor.
        n: Images of a fresh set.
        size: Of a tuning set.
        name: Of the tuning.
    """

    guidance: str
    candidates: int
    images: int
    metric: str
    tuning: float
    fresh: float
    unguided: float
    verdict: str
    about: dict[str, Any]
    n: int
    size: int
    name: str

    @classmethod
    def read(cls, path: Path) -> "Tuned":
        """Of a ``result.json``.

        Raises:
            UserError: It cannot be read.
        """
        try:
            found = json.loads(path.read_text("utf-8"), parse_constant=str)
            if found["schema"] != SCHEMA:
                raise UserError(f"{path}: schema={found['schema']}: must be {SCHEMA}")
            fresh, about = found["fresh"], found["about"]
            numbers = [found["candidates"][0]["mean"], *fresh["winner"], *fresh["unguided"]]
            if not all(map(math.isfinite, numbers)):
                raise ValueError("scores must be finite")
            return cls(
                str(found["guidance"]),
                len(found["candidates"]),
                int(found["images"]["used"]),
                str(fresh["metric"]),
                float(numbers[0]),
                statistics.fmean(fresh["winner"]),
                statistics.fmean(fresh["unguided"]),
                str(fresh["verdict"]),
                about["protocol"] | {"extractor": about["features"]},
                int(about["num_generated"]),
                int(about["set_images"]),
                path.parent.name,
            )
        except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{path}: cannot be read; {error!r}") from error


@dataclass(frozen=True)
class Line:
    """A tuning of a run of an arm; of an arm that has none, a line without."""

    arm: str
    run: str
    guidance: str  # what was tuned, or with which it is compared
    tuned: Tuned | None

    def cells(self, number: Callable[[float], str]) -> list[str]:
        """In the columns of `COLUMNS`."""
        found = self.tuned
        if found is None:
            return [self.arm, self.run, self.guidance, *[NOT_TUNED] * 2, "–", "–", "–"]
        scores = [f"{found.metric} {number(found.fresh)}", number(found.unguided)]
        numbers = [str(found.candidates), f"{found.images:,}"]
        return [self.arm, self.run, found.guidance, *numbers, *scores, found.verdict]


def tunings(arms: Sequence[Arm], guidance: str, notes: list[str]) -> list[Line]:
    """Lines per arm, where any run was tuned or the comparison is of guided samples.

    ``notes`` gets what cannot be read, and that arms were not tuned alike. Where each arm has a
    guidance of its own, that is what counts, and unguided arms have no line.

    Args:
        arms: Of the comparison.
        guidance: That it is about; one that was tuned says so in its line.
        notes: Lines about what else is worth knowing.
    """
    lines, effort = list[Line](), dict[str, tuple[tuple[int, int], ...]]()
    for arm in arms:
        if arm.runs[0].guidance == "none":
            continue
        known = list[Line]()
        for run in arm.runs:
            found, wanted = _read(run.folder, notes), run.guidance or guidance
            if wanted != "none":  # the others are of other scores
                found = [each for each in found if each.guidance == wanted]
            known += [Line(arm.name, str(run.folder), each.guidance, each) for each in found]
            if not found:
                known.append(Line(arm.name, str(run.folder), wanted, None))
        lines += known
        effort[arm.name] = tuple(
            sorted({(t.candidates, t.images) if (t := each.tuned) else (0, 0) for each in known})
        )
    if guidance == "none" and not any(line.tuned for line in lines):
        return []
    if len(set(effort.values())) > 1:
        plain = {name: len(tried) > 1 for name, tried in effort.items() if (0, 0) in tried}
        named = ", ".join(name + " in part" * partly for name, partly in plain.items())
        which = f"; {NOT_TUNED}: {named}" if plain else ""
        notes.append(f"tuning: guidance of the arms was not tuned equally hard{which}")
    return lines


@dataclass(frozen=True)
class Guided:
    """What tuning has found for some runs of an arm, on fresh seeds; ``runs`` are all.

    Of several tunings of a run it is the one that is best on tuning seeds, among those with the
    largest sets, since distances fall with their size: the best on fresh ones would be ahead by
    chance.
    """

    scores: list[float]
    runs: int


def guided(
    lines: Sequence[Line], metric: str, wanted: dict[str, Any], notes: list[str]
) -> dict[str, Guided]:
    """What arms score guided, by their names.

    Args:
        lines: Of the comparison.
        metric: That it is about.
        wanted: What a tuning must agree with as far as it says it: step, weights, and the facts of
            the comparison.
        notes: Lines about what else is worth knowing.
    """
    best: dict[str, dict[str, Tuned]] = {}
    runs: dict[str, set[str]] = {}
    for line in lines:
        runs.setdefault(line.arm, set()).add(line.run)
        if line.tuned is None or line.tuned.metric != metric:
            continue
        has = line.tuned.about | {"n": line.tuned.n}
        if other := [f"{key} {has[key]}" for key in clashes(has, wanted)]:
            notes.append(f"{line.run}: tuning {line.tuned.name} is of {', '.join(other)}, left out")
            continue
        of_arm = best.setdefault(line.arm, {})
        rivals = [line.tuned, *filter(None, [of_arm.get(line.run)])]
        of_arm[line.run] = min(rivals, key=lambda each: (-each.size, each.tuning))
    return {
        arm: Guided([each.fresh for each in found.values()], len(runs[arm]))
        for arm, found in best.items()
    }


def as_json(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """For ``comparison.json``."""
    return [
        {"arm": each.arm, "run": each.run, "guidance": each.guidance}
        | {key: getattr(each.tuned, key, None) for key in ("candidates", "images", "metric")}
        | {key: getattr(each.tuned, key, None) for key in ("fresh", "unguided", "verdict")}
        for each in lines
    ]


def _read(folder: Path, notes: list[str]) -> list[Tuned]:
    found = []
    for path in sorted(folder.glob(f"tune/*/{RESULT}")):
        try:
            found.append(Tuned.read(path))
        except UserError as error:
            notes.append(str(error))
    return found
