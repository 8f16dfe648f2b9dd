"""``lightning ema``: the run's own score over the width of an average that is made after it."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from w2s_train.datamodule import ShardDataModule
from w2s_train.errors import UserError, require
from w2s_train.evaluation.fid import FID
from w2s_train.evaluation.scorer import protocol_of
from w2s_train.files import atomic_write
from w2s_train.module import DiffusionModule
from w2s_train.posthoc.power import exponent_of
from w2s_train.scores import git_commit
from w2s_train.tune.averages import Averages
from w2s_train.tune.evaluator import Evaluator
from w2s_train.tune.ledger import Ledger, alone, check_name
from w2s_train.tune.tuning import FRESH, TIMES, TUNING


@dataclass(frozen=True)
class Widths:
    """Stds of a curve, evenly spaced in their logarithm.

    Args:
        std: LOW:HIGH, or one.
        points: Of the curve, both ends included.

    Raises:
        UserError: It is neither, or no average has such a std.
    """

    std: str
    points: int

    def __post_init__(self) -> None:
        require("points", self.points, "[2, 1000]")
        rule = f"std={self.std}: must be LOW:HIGH with LOW < HIGH, or a number, such as 0.05:0.2"
        low, colon, high = self.std.partition(":")
        try:
            ends = [float(low), float(high)] if colon else [float(low)]
        except ValueError as error:
            raise UserError(rule) from error
        if not ends[0] <= ends[-1] or (colon and ends[0] == ends[-1]):
            raise UserError(rule)
        for end in ends:
            exponent_of(end)

    @property
    def values(self) -> list[float]:
        """Of four significant digits."""
        low, _, high = self.std.partition(":")
        spaced = np.geomspace(float(low), float(high), self.points) if high else [float(low)]
        return [float(f"{value:.4g}") for value in spaced]


class Curve:
    """The course of the command.

    Args:
        widths: Where the curve is.
        images: Of a score; None is as many as the run scores.
        name: Of the folder in ema/ of the run folder; None is that of the checkpoint's step.
        fid: Whose distance is the score.
        data: Says which classes, and how many images at a time.
        after_batch: Called with whether it was the last one.

    Raises:
        UserError: A number out of its range, or a name that is no folder's.
    """

    def __init__(
        self,
        widths: Widths,
        images: int | None,
        name: str | None,
        fid: FID,
        data: ShardDataModule,
        after_batch: Callable[[bool], None],
    ) -> None:
        self.size = data.num_generated if images is None else images
        require("images", self.size, f"[2, {FRESH - TUNING}]")
        if name is not None:
            check_name(name)
        self.widths, self.name, self.fid = widths, name, fid
        self.data, self.after_batch = data, after_batch

    def __call__(self, trainer: Any, module: DiffusionModule) -> None:
        """Score, and write what was found; goes on where an earlier start was stopped."""
        if self.size < trainer.world_size:
            raise UserError(f"images={self.size}: must be at least one a process")
        self.trainer, self.metric = trainer, ""
        self.averages, self.guidance = Averages(module, trainer.ckpt_path), module.guidances[0]
        stds = self.widths.values
        misses = [self.averages.kept.mix(std).miss for std in stds]
        self.evaluator = Evaluator(trainer, module, self.data, self.fid, self.after_batch)
        name = self.name or f"step-{module.steps_taken:06d}"
        folder = Path(trainer.default_root_dir) / "ema" / name
        with alone(trainer, folder, name):
            path, writes = folder / "state.jsonl", trainer.is_global_zero
            self.ledger = Ledger(path, self._about(module), writes=writes)
            trainer.strategy.barrier("the state of the curve is read")
            tuning, fresh = (range(first, first + self.size) for first in (TUNING, FRESH))
            own, *values = [self._score(std, tuning) for std in (None, *stds)]
            best = stds[int(np.argmin(values))]
            scores = [self._score(std, fresh) for std in (best, None)]
            if writes:
                curve = list(zip(stds, values, misses, strict=True))
                self._report(folder, curve, own, best, scores)

    def _about(self, module: DiffusionModule) -> dict[str, Any]:
        """What all scores depend on."""
        protocol = protocol_of(module)
        return self.averages.describe() | {
            "images": self.size,
            "labels_as_in_training": self.data.labels_as_in_training,
            "features": self.fid.extractor.describe(),
            "reference": str(self.fid.reference_path),
            "protocol": {k: v for k, v in protocol.items() if k not in TIMES},
        }

    def _score(self, std: float | None, seeds: range) -> float:
        """Of an average on some seeds; not generated again if it is known."""
        values = None if std is None else {"std": std}
        known = self.ledger.find(values, seeds)
        if known is None:
            self.averages.use(std)
            found = self.evaluator.score(self.guidance, seeds)
            known = self.ledger.add(values, seeds, found)
            if self.trainer.is_global_zero:
                what = "own average" if std is None else f"std {std:g}"
                on = "  (fresh seeds)" if seeds[0] == FRESH else ""
                print(f"{what}  {found.metric} {found.value:.4g}{on}", flush=True)
        self.metric = known["metric"]
        return float(known["value"])

    def _report(
        self,
        folder: Path,
        curve: list[tuple[float, float, float]],
        own: float,
        best: float,
        scores: list[float],
    ) -> None:
        # Late: it brings matplotlib.
        from w2s_train.tune.figure import draw_curve

        self.averages.kept.save(best, folder / "best.ckpt")
        keys = ("std", "value", "miss")
        found = {
            "schema": 1,
            "about": self.ledger.about,
            "metric": self.metric,
            "curve": [dict(zip(keys, each, strict=True)) for each in curve],
            "own": own,
            "best": best,
            "fresh": dict(zip(("best", "own"), scores, strict=True)),
            "git_commit": git_commit(),
        }
        with atomic_write(folder / "result.json") as file:
            file.write(json.dumps(found, indent=1, allow_nan=False).encode() + b"\n")
        draw_curve(curve, own, self.metric, folder / "figure.png")
        table = Table("std", self.metric, "missed", title=folder.name, title_justify="left")
        for std, value, miss in curve:
            mark = " *" if std == best else ""
            table.add_row(f"{std:g}{mark}", f"{value:.4g}", f"{miss:.1%}")
        table.add_row("the run's own", f"{own:.4g}", "")
        Console(width=None if Console().is_terminal else 100).print(table)
        print(f"fresh seeds: std {best:g} {scores[0]:.4g}, the run's own {scores[1]:.4g}")
        print(f"written: {folder}/best.ckpt, result.json and figure.png")
        run = folder.parent.parent
        print(f"use it:  lightning sample -c {run}/config.yaml --ckpt_path {folder}/best.ckpt")
