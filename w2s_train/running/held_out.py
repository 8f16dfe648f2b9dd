"""Looking on at data that are not trained on: numbers under ``held_out/``."""

from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only, rank_zero_warn

from w2s_train.guideability.ratio import finish
from w2s_train.log import Log
from w2s_train.look_on import look_on, own_draws
from w2s_train.running.loggers import warned
from w2s_train.running.samples import reseed
from w2s_train.shards import ShardBatches
from w2s_train.weak.base import Step

OTHER = 1 << 40  # added to the run's seed, for draws that are not those of training


class HeldOut:
    """After steps at which segments look on, has them do so at held-out rows.

    Which rows, and what noise they get, depends on seed, process and step alone, so that it is the
    same where a run goes on. There are as many rows as in a training batch of the process.
    """

    def __init__(self) -> None:
        self.batches: ShardBatches | None = None
        self.log = Log()

    def start(self, trainer: Trainer, module: Any) -> None:
        """Look for the shards, once they are made.

        Raises:
            UserError: They cannot be used.
        """
        if not module.objective.lookers:
            return
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        self.batches = data.held_out()
        if self.batches is None:
            rank_zero_info("data.held_out_urls=null: guideability of training rows alone is logged")

    def look(self, trainer: Trainer, module: Any, seed: int, rows: int) -> None:
        """After an optimizer step; every ``log_every_n_steps`` of them, log.

        Args:
            trainer: The trainer.
            module: Whose segments they are.
            seed: Of the run.
            rows: Of a batch of this process.
        """
        step = Step(trainer.global_step - 1, module.ema.module)  # the one that was taken
        if self.batches is None:
            return
        if any(segment.looks(step) for segment in module.objective.lookers):
            self._look(trainer, module, step, seed, rows)
        if trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            strategy = trainer.strategy
            numbers = finish(self.log.read(lambda x, op: strategy.reduce(x, reduce_op=op)))
            if numbers:
                module.record({f"held_out/{name}": value for name, value in numbers.items()})

    @rank_zero_only
    def draw(self, trainer: Trainer, module: Any) -> None:
        """Guideability against time in the run folder, from ``metrics.csv``."""
        if not (module.objective.segments or module.objective.lookers):
            return
        # Late: it brings matplotlib, which a run without such numbers does not need.
        from w2s_train.compare.guideability import NAME, write

        folder = Path(trainer.default_root_dir)
        with warned(f"{folder / NAME} was"):
            write(folder)

    def _look(
        self, trainer: Trainer, module: LightningModule, step: Step, seed: int, rows: int
    ) -> None:
        assert self.batches is not None
        rank, size = trainer.global_rank, trainer.world_size
        first = (step.number * size + rank) * rows
        batch = self.batches[range(first, first + rows)]
        for each in batch["skipped"]:
            rank_zero_warn(f"held_out_urls={each.shard}: {each.key} is replaced ({each.reason})")
        either: Any = module
        with own_draws(either.network), trainer.precision_plugin.forward_context():
            reseed(OTHER + seed, rank, step.number, module.device)
            x = either.autoencoder.encode(batch["image"].to(module.device))
            y = either.drop_labels(batch["label"].to(module.device))
            look_on(either.objective, either.network, x, y, step, self.log)
        self.log.commit()
