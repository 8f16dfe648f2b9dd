"""One sample grid per arm: same step, same noise and, where possible, same training seed."""

from collections.abc import Sequence
from dataclasses import dataclass

from w2s_train.compare.arms import Arm
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
        images: How many images it shows, those of the first sampling seeds; None if not known.
    """

    arm: str
    run: Run
    step: int
    png: bytes
    images: int | None


def choose(arms: Sequence[Arm], step: int, notes: list[str]) -> list[Grid]:
    """The grids of a step; says in ``notes`` which files are broken and what is not comparable."""
    there: dict[str, dict[int, Grid]] = {arm.name: {} for arm in arms}
    for arm in arms:
        for run in arm.runs:
            try:
                png = run.grid(step)
            except UserError as error:
                notes.append(str(error))
                continue
            if png is not None:
                there[arm.name][run.seed] = Grid(arm.name, run, step, png, _images(run))
    there = {name: grids for name, grids in there.items() if grids}
    if not there:
        return []
    shared = set.intersection(*(set(grids) for grids in there.values()))
    chosen = [grids[min(shared or grids)] for grids in there.values()]
    if not shared:
        notes.append("sample grids: no training seed has one in every arm; their seeds differ")
    if len({grid.images for grid in chosen}) > 1:
        notes.append("sample grids: they show different numbers of images")
    return chosen


def _images(run: Run) -> int | None:
    found = [
        run.settings.get(f"{key}.num_images")
        for key, value in run.settings.items()
        if value == "w2s_train.callbacks.SampleGrid"
    ]
    return found[0] if found else None
