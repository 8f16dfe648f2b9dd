"""What happens around a step, in the order in which it happens.

A batch comes: the watch knows, draws are seeded, the guard notes its samples, the alarm looks at
what was logged last. Then Lightning has the module compute loss and gradients. Where they complete
an optimizer step, the module measures loss and norm, the guard judges them, and in the same
collective all processes agree whether to stop and whether to save; the module is told whether the
step is good, and clips and takes it or not.

After it: what only looks on does so at held-out data, skipped samples are compared, a stop that was
agreed upon is prepared, too many bad steps lead back to a checkpoint, and last a checkpoint that is
due is written, before an evaluation that may follow. Lightning calls callbacks before the module,
which logs its numbers after all this. The end, also that of a stop, writes a checkpoint if the last
step has none. On an accelerator the host hears of each agreement one step later: see `Guard`.

After a batch of an evaluation: what the scorers have taken in is kept, and who was asked to stops.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from w2s_train.errors import Stopped
from w2s_train.evaluation.scorer import ResumableEvaluation, Scorer
from w2s_train.running.blow_up import BlowUp
from w2s_train.running.checkpoints import Checkpoints, validation_follows
from w2s_train.running.guard import Guard
from w2s_train.running.held_out import HeldOut
from w2s_train.running.record import Record
from w2s_train.running.samples import SkippedSamples, reseed
from w2s_train.running.settings import Settings
from w2s_train.running.stop import Stop
from w2s_train.running.watch import Stage, Watch
from w2s_train.shards.workers import Late


@dataclass(eq=False)
class Run(Checkpoint):
    """The one callback that keeps a run alive; Lightning calls a `Checkpoint` after the scorers."""

    guard: Guard
    checkpoints: Checkpoints
    watch: Watch
    stop: Stop
    record: Record
    evaluation: ResumableEvaluation
    scorers: Sequence[Scorer]  # of the trainer, in their order
    seed: int  # of the run

    def __post_init__(self) -> None:
        self.samples, self.blow_up, self.settings = SkippedSamples(), BlowUp(), Settings()
        self.agreement, self.held_out = self.guard.agreement, HeldOut()
        self.steps = 0  # of the optimizer, before the batch at hand

    def state_dict(self) -> dict[str, Any]:
        return {"guard": self.guard.state_dict(), "samples": self.samples.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if "guard" in state_dict:
            self.guard.load_state_dict(state_dict["guard"])
        if "samples" in state_dict:
            self.samples.load_state_dict(state_dict["samples"])

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]
    ) -> None:
        if trainer.training:
            self.settings.load(checkpoint, pl_module)

    # ---- the beginning ---------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        if stage != "predict":  # which has nothing to save, and ends at once
            self.stop.listen()
        if stage == "fit":
            self.checkpoints.clear(trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.is_global_zero:
            self.record.count_start()
            if not self.record.resumed:
                self.record.write_start(trainer)
        for term in pl_module.objective.align.terms:
            rank_zero_info(term.describe())
        self.guard.start(trainer)
        self.held_out.start(trainer, pl_module)

    def finish_evaluation(self, trainer: Trainer, module: Any) -> None:
        """Finish the evaluation that a stop has left, before training goes on."""
        self.evaluation.finish(trainer, module, self.scorers)

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.settings.apply(trainer, pl_module)
        pl_module.clock.pace(trainer.global_step, pl_module.images_seen, trainer.train_dataloader)
        if self.record.different:
            rank_zero_info(self.record.different)
        if trainer.is_global_zero and self.record.resumed:  # not before nobody can refuse it
            self.record.write_config()
            self.record.write_start(trainer)
        self.samples.start(trainer, pl_module)
        self.checkpoints.start(trainer, pl_module)

    # ---- a step ----------------------------------------------------------------------------

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        number, rows = trainer.fit_loop.total_batch_idx, len(batch["label"])
        self.watch.begin(number + 1, trainer.global_step)
        reseed(self.seed, trainer.global_rank, number, pl_module.device)
        self.stop.take_time()
        self.steps = trainer.global_step
        self.guard.note(pl_module.images_seen + trainer.global_rank * rows, rows)
        if self.guard.enabled:
            falls = getattr(pl_module.network, "data_on", None) is not None
            self.blow_up.look(pl_module.last_logged, trainer.global_step, falls)

    def on_before_backward(self, trainer: Trainer, pl_module: Any, loss: Tensor) -> None:
        self.watch.at(Stage.IN_THE_BACKWARD_PASS)

    def on_after_backward(self, trainer: Trainer, pl_module: Any) -> None:
        self.watch.at(Stage.TAKING_THE_STEP)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: Any, optimizer: torch.optim.Optimizer
    ) -> None:
        """Before gradients are clipped; of a batch that only accumulates, this is not called."""
        loss, norm = pl_module.measure(optimizer)
        self.agreement.wish(**self._asked, save=self.checkpoints.wish(trainer))
        # Terms of alignment are at least minus their weight: so the loss is judged from 0 on, as a
        # spike is so many times the average. In the same collective: what all processes wish.
        good = self.guard.judge(trainer, loss + pl_module.objective.align.weight, norm)
        pl_module.accept(good, optimizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.watch.at(Stage.BETWEEN_TWO_BATCHES)
        self.samples.note(batch["skipped"])
        if trainer.global_step == self.steps:
            return  # the gradients of half a step would be lost
        self.held_out.look(trainer, pl_module, self.seed, len(batch["label"]))
        if self.samples.too_many(trainer, pl_module):
            self.stop.end_training(trainer)
        follows = validation_follows(trainer, batch_idx)
        if self.agreement.stop:
            self.stop.decide(preempt=self.agreement.decided["preempt"])
            if not follows:  # else it is begun, and left: the next start finds it under way
                self.stop.end_training(trainer)
        if self.guard.out_of_patience(trainer):
            self.checkpoints.finish(trainer)
            self.guard.go_back(trainer, pl_module)
        self.checkpoints.report(trainer)
        due = follows or self.agreement.decided["save"]
        if due or self.checkpoints.stays(trainer.global_step):
            self.samples.merge(trainer)
            self.checkpoints.save(trainer, pl_module)
            self.agreement.saved()

    # ---- an evaluation ---------------------------------------------------------------------

    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.watch.at(Stage.VALIDATING)
        self.evaluation.start(trainer, pl_module, self.scorers)
        self.stop.forget_time()

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self.watch.at(Stage.VALIDATING)
        self.evaluation.take(dataloader_idx, batch)
        self.stop.take_time()
        if self.stop.status or any(self._asked.values()):
            self._leave_together(trainer)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.watch.at(Stage.DONE_WITH_VALIDATING)
        self._leave_together(trainer)  # first: what it saves is what this start has taken in
        self.evaluation.merge(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.evaluation.end(trainer)
        if trainer.training:
            self.held_out.draw(trainer, pl_module)
        self.checkpoints.changed()  # the next one holds what the evaluation has cost

    on_test_start = on_validation_start
    on_test_batch_end = on_validation_batch_end
    on_test_epoch_end = on_validation_epoch_end
    on_test_end = on_validation_end

    def after_tuned_batch(self, trainer: Trainer, last: bool) -> None:
        """The same for images of `lightning tune`, which keeps scores itself, and no part of one.

        Raises:
            Stopped: It is to stop, on all processes alike.
        """
        self.watch.at(Stage.VALIDATING)
        self.stop.take_time()
        if last or self.stop.status or any(self._asked.values()):
            self._agree(trainer)
            if self.stop.status:
                raise Stopped("the same command goes on after the last score", self.stop.status)

    def _leave_together(self, trainer: Trainer) -> None:
        """Leave an evaluation, if anybody was asked to."""
        self._agree(trainer)
        if self.stop.status:
            self.evaluation.save()
            self.checkpoints.finish(trainer)
            message = "in the middle of an evaluation; the next start goes on with it"
            raise Stopped(message, self.stop.status)

    def _agree(self, trainer: Trainer) -> None:
        """The first collective after the batches, for those that leave and those that do not."""
        self.agreement.wish(**self._asked)
        nothing = torch.zeros(0, device=trainer.strategy.root_device)
        self.agreement.decide(self.agreement.settle(nothing).tolist())
        if self.agreement.stop:
            self.stop.decide(preempt=self.agreement.decided["preempt"])

    @property
    def _asked(self) -> dict[str, bool]:
        return self.stop.wishes(saving=self.checkpoints.seconds)

    def on_predict_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.watch.at(Stage.VALIDATING)

    def on_predict_batch_end(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        self.watch.at(Stage.VALIDATING)

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.watch.at(Stage.DONE_WITH_VALIDATING)

    # ---- the end ---------------------------------------------------------------------------

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.samples.end(trainer)
        self.guard.hear(trainer)
        self.checkpoints.end(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.is_global_zero:
            self.record.ended()
        self.held_out.draw(trainer, pl_module)
        self.samples.check()
        if self.stop.status:
            rank_zero_info(f"stopped at step {trainer.global_step}; continue with --ckpt_path last")

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        # Between two steps, where one process can save alone; several have not agreed on the step.
        if isinstance(exception, Late) and self._can_save(trainer):
            self.on_train_end(trainer, pl_module)
        if trainer.is_global_zero:
            self.record.ended(exception)
        self.record.release()

    def _can_save(self, trainer: Trainer) -> bool:
        batches = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        whole = batches % trainer.accumulate_grad_batches == 0  # no gradients of half a step
        return trainer.world_size == 1 and trainer.global_step > 0 and whole

    def teardown(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        try:
            if stage == "fit" and trainer.is_global_zero:
                self.record.print_scores()
        finally:
            self.record.release()
