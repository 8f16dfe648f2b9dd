"""One sample grid per arm: same step and setting and, where possible, same training seed."""

from collections.abc import Sequence
from dataclasses import dataclass

from w2s_train.compare.arms import Arm
from w2s_train.compare.protocol import Selection
from w2s_train.compare.runs import Run
from w2s_train.errors import UserError


@dataclass(frozen=True)
class Grid:
    """A grid of generated images.

    Args:
        arm: Name of the arm.
        run: The run that wrote it.
        step: Of the network.
        png: The file.
    """

    arm: str
    run: Run
    step: int
    png: bytes


def choose(arms: Sequence[Arm], step: int, selection: Selection, notes: list[str]) -> list[Grid]:
    """The grids of a step and setting; says in ``notes`` what is broken or not there."""
    there: dict[str, dict[int, Grid]] = {arm.name: {} for arm in arms}
    without = dict.fromkeys(there)
    for arm in arms:
        for run in arm.runs:
            try:
                png = run.grid(step, selection.weights, selection.guidance)
            except (UserError, OSError) as error:
                notes.append(str(error))
                without.pop(arm.name, None)
                continue
            if png is not None:
                there[arm.name][run.seed] = Grid(arm.name, run, step, png)
                without.pop(arm.name, None)
    there = {name: grids for name, grids in there.items() if grids}
    if without and any((run.folder / "grids").is_dir() for arm in arms for run in arm.runs):
        setting = f"weights {selection.weights}, guidance {selection.guidance}"
        notes.append(f"sample grids: none of step {step}, {setting} in {', '.join(without)}")
    if not there:
        return []
    shared = set.intersection(*(set(grids) for grids in there.values()))
    if not shared:
        notes.append("sample grids: no training seed has one in every arm; their seeds differ")
    return [grids[min(shared or grids)] for grids in there.values()]
