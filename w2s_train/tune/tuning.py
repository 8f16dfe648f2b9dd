"""The course of a tuning: the search on tuning seeds, then the scores on fresh ones."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from rich.console import Console
from torch import nn

from w2s_train.datamodule import ShardDataModule
from w2s_train.errors import UserError, needed, require
from w2s_train.evaluation.fid import FID
from w2s_train.evaluation.scorer import protocol_of, weights_digest
from w2s_train.guidance import Guidance, Unguided
from w2s_train.module import DiffusionModule
from w2s_train.scores import git_commit
from w2s_train.tune.averages import Averages
from w2s_train.tune.evaluator import Evaluator, build
from w2s_train.tune.ledger import Ledger, alone, check_name
from w2s_train.tune.outcome import Fresh, Images, Outcome
from w2s_train.tune.search import Proposals, plan, search
from w2s_train.tune.space import EMA_STD, Space, Values

TUNING, FRESH = 10**9, 2 * 10**9  # the first seeds; a run's own scores begin at 0
IMAGES = 40_000
PARTS = 40  # a set has at least that part of the budget, up to what the run scores
TIMES = ("wall_clock_seconds", "training_seconds", "training_samples")  # of the fit, not of scores


@dataclass(frozen=True)
class Budget:
    """What a search may cost.

    Args:
        images: Of all candidates together; None is `IMAGES`, or what ``minutes`` suffice for.
        minutes: For all candidates together, by the pace of the first one.
        sets: Of tuning seeds, and of fresh ones.
        set_images: Images of a set of tuning seeds; None is a fortieth of ``images``, but more than
            there are features, and at most as many as the run's own scores are made of.

    Raises:
        UserError: A number out of its range, or both limits.
    """

    images: int | None = None
    minutes: float | None = None
    sets: int = 3
    set_images: int | None = None

    def __post_init__(self) -> None:
        require("sets", self.sets, "[3, 1000]")
        if self.images is not None and self.minutes is not None:
            raise UserError(f"minutes={self.minutes}: must come without images={self.images}")
        if self.images is not None:
            require("images", self.images, f"[1, {FRESH - TUNING}]")
        if self.minutes is not None:
            require("minutes", self.minutes, "(0, inf)")
        if self.set_images is not None:
            require("set_images", self.set_images, "[2, inf)")

    def size_of_a_set(self, features: int, scored: int) -> int:
        """Images of a set of tuning seeds.

        Args:
            features: Of the extractor.
            scored: Images of one of the run's own scores.
        """
        if self.set_images is not None:
            return self.set_images
        return min(max((self.images or IMAGES) // PARTS, features + 1), scored)


class Tuning:
    """``lightning tune``, on all processes of a trainer alike.

    Args:
        name: Of the folder in ``tune/`` of the run folder.
        space: What is searched.
        budget: What it may cost.
        fid: The callback of the run whose distance is the score.
        data: Says which classes, and how many images the run's own scores are made of.
        after_batch: See `Evaluator`.

    Raises:
        UserError: A name that is no folder's, or there is no Optuna.
    """

    def __init__(
        self,
        name: str,
        space: Space,
        budget: Budget,
        fid: FID,
        data: ShardDataModule,
        after_batch: Callable[[bool], None],
    ) -> None:
        check_name(name)
        if data.first_seed + data.num_generated * data.sampling_seeds > TUNING:
            raise UserError(f"data.first_seed={data.first_seed}: must leave seeds from {TUNING} on")
        with needed("optuna", "tune"):
            import optuna
        self.optuna = optuna.__version__
        self.name, self.space, self.budget = name, space, budget
        self.fid, self.data, self.after_batch = fid, data, after_batch
        self.last: tuple[Values, Guidance] | None = None  # that was built

    def __call__(self, trainer: Any, module: DiffusionModule) -> None:
        """Search, score, and write what was found; goes on where an earlier start was stopped."""
        folder = Path(trainer.default_root_dir) / "tune" / self.name
        self.trainer, self.module, self.metric = trainer, module, ""
        searched = any(each.name == EMA_STD for each in self.space.parameters)
        self.averages = Averages(module, trainer.ckpt_path) if searched else None
        self.size = self.budget.size_of_a_set(
            self.fid.extractor.num_features, self.data.num_generated
        )
        if self.size < max(2, trainer.world_size):
            raise UserError(f"set_images={self.size}: must be at least one a process")
        self._check(self.budget.images or IMAGES, "images")
        self.evaluator = Evaluator(trainer, module, self.data, self.fid, self.after_batch)
        with alone(trainer, folder, self.name):
            self.ledger = Ledger(
                folder / "state.jsonl", self._about(), writes=trainer.is_global_zero
            )
            trainer.strategy.barrier("the state of the tuning is read")
            outcome = self._tune()
            if trainer.is_global_zero:
                self._report(outcome, folder)

    def _check(self, images: int, limit: str) -> None:
        least = self.budget.sets * self.size
        if images < least:
            raise UserError(
                f"{limit}={getattr(self.budget, limit)}: must be enough for one candidate on "
                f"{self.budget.sets} sets of {self.size:,}, {least:,} images; here it is {images:,}"
            )

    def _about(self) -> dict[str, Any]:
        """What all scores depend on; another one is another search."""
        protocol, network = protocol_of(self.module), self.module.settings[0].network
        return (self.averages.describe() if self.averages else {}) | {
            "weights_sha256": weights_digest([cast(nn.Module, network)]).hexdigest()[:16],
            "guidance": self.space.guidance,
            "search": [str(each) for each in self.space.parameters],
            "optuna": self.optuna,
            "images": self.budget.images,
            "minutes": self.budget.minutes,
            "sets": self.budget.sets,
            "set_images": self.size,
            "num_generated": self.data.num_generated,
            "labels_as_in_training": self.data.labels_as_in_training,
            "features": self.fid.extractor.describe(),
            "reference": str(self.fid.reference_path),
            "protocol": {k: v for k, v in protocol.items() if k not in (*TIMES, "guidance")},
        }

    # ---- the search ------------------------------------------------------------------------

    def _tune(self) -> Outcome:
        sets = [
            range(TUNING + k * self.size, TUNING + (k + 1) * self.size)
            for k in range(self.budget.sets)
        ]
        self.images = self._images(sets[0])
        number, _ = plan(self.images // self.size, len(sets))
        trials = search(
            Proposals(self.space, self._refusal),
            number,
            len(sets),
            lambda values, k: self._score(values, sets[k]),
        )
        metric = self.metric
        used = self.size * sum(len(each.scores) for each in trials)
        n, winner = self.data.num_generated, trials[0].values
        fresh = [range(FRESH + k * n, FRESH + (k + 1) * n) for k in range(len(sets))]
        scores = [[self._score(each, seeds) for seeds in fresh] for each in (winner, None)]
        return Outcome(
            self.name,
            self.ledger.about,
            metric,
            self._guidance(winner).describe(),
            self.space.settings(winner),
            trials,
            Images(self.images, used, 2 * n * len(fresh)),
            {"tuning": _ends(sets), "fresh": _ends(fresh)},
            Fresh(self.metric, *scores),
            git_commit(),
        )

    def _images(self, seeds: range) -> int:
        """The budget; of minutes it is known when the first candidate was scored."""
        if self.budget.minutes is None:
            return self.budget.images or IMAGES
        self.images = self.size
        first = Proposals(self.space, self._refusal).next()
        assert first is not None
        self._score(first, seeds)
        line = self.ledger.find(first, seeds)
        assert line is not None
        images = int(60 * self.budget.minutes / line["seconds"] * self.size)
        self._check(images, "minutes")
        return min(images, FRESH - TUNING)

    def _guidance(self, values: Values | None) -> Guidance:
        """Of a candidate; the last one is not built, and its files are not read, twice."""
        if values is None:
            return Unguided()
        if self.last is None or self.last[0] != values:
            self.last = values, build(self.space.settings(values), self.module)
        return self.last[1]

    def _refusal(self, values: Values) -> str | None:
        try:
            self._guidance(values)
            if self.averages is not None:
                self.averages.kept.mix(values[EMA_STD])
        except UserError as error:
            return str(error)
        return None

    def _score(self, values: Values | None, seeds: range) -> float:
        """Of a candidate, or unguided; not generated again if it is known."""
        known = self.ledger.find(values, seeds)
        if known is None:
            guidance = self._guidance(values)
            if self.averages is not None:
                self.averages.use(values[EMA_STD] if values else None)
            found = self.evaluator.score(guidance, seeds)
            known = self.ledger.add(values, seeds, found)
            if self.trainer.is_global_zero:
                what = f"{guidance.describe()}  {found.metric} {found.value:.4g}"
                print(f"{self._progress(seeds)}  {what}  ({found.seconds:.1f} s)", flush=True)
        self.metric = known["metric"]
        return float(known["value"])

    def _progress(self, seeds: range) -> str:
        if seeds[0] >= FRESH:
            return "fresh seeds"
        used = sum(1 for line in self.ledger.lines if line["seeds"][0] < FRESH) * self.size
        return f"{used:,} of {self.images:,} images"

    # ---- the end ---------------------------------------------------------------------------

    def _report(self, outcome: Outcome, folder: Path) -> None:
        # Late: it brings matplotlib, for which no other command need wait.
        from w2s_train.tune.figure import draw

        outcome.write(folder)
        draw(outcome, folder / "figure.png")
        Console(width=None if Console().is_terminal else 140).print(outcome.table())
        print(*outcome.summary(), sep="\n")
        run = folder.parent.parent
        print(f"written: {folder}/winner.yaml, result.json and figure.png")
        path = self.trainer.ckpt_path
        if self.averages is not None:
            path = folder / "best.ckpt"
            self.averages.kept.save(outcome.trials[0].values[EMA_STD], path)
        print(
            f"use it:  lightning sample -c {run}/config.yaml -c {folder}/winner.yaml --ckpt_path "
            f"{path}"
        )


def _ends(ranges: Sequence[range]) -> list[list[int]]:
    return [[each[0], each[-1]] for each in ranges]
