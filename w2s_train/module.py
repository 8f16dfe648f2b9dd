"""The Lightning module: wires network, objective, sampler, optimizer and weight average."""

import contextlib
import dataclasses
import math
from pathlib import Path
from typing import Any, Literal, cast

import torch
from lightning import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from w2s_train.autoencoder import Autoencoder, PixelSpace
from w2s_train.clock import FitClock
from w2s_train.command.config import check_label_dropout
from w2s_train.errors import UserError
from w2s_train.generation import Setting, all_settings, generate
from w2s_train.guidance import Guidance, Unguided
from w2s_train.loading import check_optimizer, load_module
from w2s_train.log import RunningStatistics
from w2s_train.models import DiT, WeightAverage, compile_networks
from w2s_train.models.average import check_decay
from w2s_train.objective import Losses, Objective
from w2s_train.optim import clip, keep_fused, norm_of, step_only_if, unscale
from w2s_train.sampler import Sampler
from w2s_train.segment import Statistic
from w2s_train.timesteps import spread
from w2s_train.weak.base import Step


class DiffusionModule(LightningModule):
    """Trains a network towards weak-to-strong targets and samples it for validation.

    Args:
        network: The network.
        objective: What it is trained towards.
        sampler: The solver for validation.
        optimizer: Called with the trainable parameters.
        scheduler: Called with the optimizer and stepped once per optimizer step; None is constant.
        autoencoder: Between stored data, network and images; None is pixel space.
        guidance: Sampling-time guidance; None is unguided. Of a list, every one is scored.
        label_dropout: Probability, in [0, 1], of replacing a training label by the null class. 1 is
            unconditional training: samples then are of the null class, too.
        ema_decay: Of the average that is sampled, per optimizer step, in [0, 1). Of a list, every
            one is scored, and the first is the main one.
        scored_weights: What is sampled for scores: averages ("ema"), live weights ("raw") or both;
            None is averages only.
        generation_block: Images per network evaluation when sampling. Batches are cut or padded to
            it, so that an image depends on its seed alone and not on its neighbours' number.
        compile: Compile networks with `torch.compile`, whole; "blocks" compiles one block for all,
            which takes much less time to do and a little more at every step.

    Raises:
        UserError: A number out of its range, an optimizer that refuses its arguments, or a weak
            source or guidance that needs labels in unconditional training.
    """

    def __init__(
        self,
        network: DiT,
        objective: Objective,
        sampler: Sampler,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        scheduler: LRSchedulerCallable | None = None,
        autoencoder: Autoencoder | None = None,
        guidance: Guidance | list[Guidance] | None = None,
        label_dropout: float = 0.1,
        ema_decay: float | list[float] = 0.9999,
        scored_weights: list[Literal["ema", "raw"]] | None = None,
        generation_block: int = 125,
        compile: bool | Literal["blocks"] = False,
    ) -> None:
        super().__init__()
        if not 0 <= label_dropout <= 1:
            raise UserError(f"label_dropout={label_dropout}: must be in [0, 1]")
        if generation_block < 1:
            raise UserError(f"generation_block={generation_block}: must be at least 1")
        self.network, self.objective, self.sampler = network, objective, sampler
        self.optimizer, self.scheduler = optimizer, scheduler
        self.autoencoder = autoencoder or PixelSpace()
        self.guidances = guidance if isinstance(guidance, list) else [guidance or Unguided()]
        lists = dict(guidance=guidance, ema_decay=ema_decay, scored_weights=scored_weights)
        for name, given in lists.items():
            if given == []:
                raise UserError(f"{name}=[]: must name at least one")
        self.label_dropout, self.generation_block = label_dropout, generation_block
        self.how_compiled = compile
        self.objective.bind(network, label_dropout)
        for each in self.guidances:
            each.bind(network, objective)
        self.unconditional = label_dropout == 1
        check_label_dropout(label_dropout, self.objective.segments, self.guidances)
        first, *more = ema_decay if isinstance(ema_decay, list) else [ema_decay]
        self.ema = WeightAverage(network, check_decay("ema_decay", first))
        self.more_ema = nn.ModuleList(
            WeightAverage(network, check_decay("ema_decay", decay)) for decay in more
        )
        self.statistics, self.last_metrics = RunningStatistics(), dict[str, float]()
        # Of the optimizer step under way; whether it is good may be known on the device only.
        self.parts, self.good = list[Losses](), cast(bool | Tensor, True)
        self.judged = False
        self.gradient_norm = torch.tensor(math.nan)
        self.images_seen, self.loaded_step = 0, 0
        self.clock, self.scored_weights = FitClock(), scored_weights or ["ema"]
        check_optimizer(optimizer)

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls, checkpoint_path: str | Path, map_location: Any = None, weights_only: bool = True
    ) -> "DiffusionModule":
        """The module of a local checkpoint of ours; always read with ``weights_only``."""
        return load_module(cls, str(checkpoint_path)).to(map_location or "cpu")

    # ---- training --------------------------------------------------------------------------
    def setup(self, stage: str) -> None:
        """Plan the run, and compile."""
        if stage == "fit":
            self.plan(self.trainer.max_steps)
        compile_networks(self, self.how_compiled)

    def plan(self, max_steps: int) -> None:
        """Check everything that happens at a step of its own.

        Raises:
            UserError: A step after the last one, or a share of a run without a length.
        """
        self.objective.plan(max_steps if max_steps > 0 else None)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The loss of one batch of images (B, C, H, W) as stored and labels (B,)."""
        x = self.autoencoder.encode(batch["image"])
        if x.shape[1:] != self.input_shape:
            ours, theirs = tuple(self.input_shape)[:2], tuple(x.shape[1:])
            raise UserError(
                f"in_channels, input_size={ours}: must fit the data, whose shape is {theirs}"
            )
        step = Step(self.global_step, self.ema.module)
        losses = self.objective(self.network, x, self.drop_labels(batch["label"]), step)
        self.parts.append(dataclasses.replace(losses, total=losses.total.detach()))
        self.images_seen += len(x) * self.trainer.world_size
        return losses.total

    @property
    def input_shape(self) -> torch.Size:
        """(C, H, W) of what the network takes."""
        network = self.network
        return torch.Size((network.in_channels, network.input_size, network.input_size))

    def drop_labels(self, y: Tensor) -> Tensor:
        """Labels (B,), each replaced by the null class with probability ``label_dropout``."""
        dropped = spread(len(y), self.label_dropout, y.device)
        return torch.where(dropped, self.network.null_class, y)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """One optimizer step; then average and weak sources follow, once per *optimizer* step."""
        super().optimizer_step(*args, **kwargs)
        parts, self.parts = self.parts, []
        one = torch.ones_like(self.gradient_norm)[None, None]
        norm = Statistic(("gradient_norm",), self.gradient_norm * one, one.bool(), "mean")
        for statistics in ([norm], *(part.statistics for part in parts)):
            self.statistics.add(statistics, self.good)
        for average in (self.ema, *self.more_ema):
            average.update(self.network, self.good)
        # The trainer counts this step when the hook has returned.
        optimizer: torch.optim.Optimizer = args[2]
        lr = optimizer.param_groups[0]["lr"]
        step = Step(self.global_step + 1, self.ema.module, lr, self.good)
        # Small networks that learn there do not scale their loss, as float16 would need.
        scaled = self.trainer.precision == "16-mixed"
        plugin = self.trainer.precision_plugin
        with contextlib.nullcontext() if scaled else plugin.forward_context():
            self.objective.after_step(self.network, step)

    def measure(self, optimizer: torch.optim.Optimizer) -> tuple[Tensor, Tensor]:
        """Loss () of the step at hand and norm () of its gradient, before clipping."""
        unscale(optimizer, getattr(self.trainer.precision_plugin, "scaler", None))
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.gradient_norm = norm_of(parameters)
        return torch.stack([part.total for part in self.parts]).mean(), self.gradient_norm

    def accept(self, good: bool | Tensor, optimizer: torch.optim.Optimizer) -> None:
        """Have the optimizer pass over the step at hand unless it is good."""
        self.good, self.judged = step_only_if(good, optimizer), True

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Without anyone who judges steps, all are good."""
        if not self.judged:
            self.measure(optimizer)
            self.accept(True, optimizer)
        self.judged = False

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as the trainer says, by the norm that was measured."""
        groups = optimizer.param_groups
        parameters = [p for group in groups for p in group["params"] if p.grad is not None]
        clip(parameters, self.gradient_norm, gradient_clip_val, gradient_clip_algorithm)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Every ``log_every_n_steps`` optimizer steps, read the statistics and log them."""
        due = self.global_step % self.trainer.log_every_n_steps == 0  # type: ignore[attr-defined]
        stepped = (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0
        if not (due and stepped):
            return
        strategy = self.trainer.strategy
        numbers = self.statistics.compute(lambda x, op: strategy.reduce(x, reduce_op=op))
        metrics = {f"train/{name}": value for name, value in numbers.items()}
        metrics["train/learning_rate"] = self.trainer.optimizers[0].param_groups[0]["lr"]
        metrics["train/images_seen"] = self.images_seen
        self.record(metrics)

    def record(self, metrics: dict[str, float]) -> None:
        """Send metrics to the loggers at the current optimizer step, and to other callbacks."""
        self.last_metrics = self.last_metrics | metrics
        for logger in self.loggers:
            logger.log_metrics(metrics, step=self.steps_taken)
        self.trainer.callback_metrics.update({k: torch.tensor(v) for k, v in metrics.items()})

    def configure_optimizers(self) -> Any:
        """The optimizer over everything that needs gradients, and the schedule."""
        optimizer = self.optimizer([p for p in self.parameters() if p.requires_grad])
        optimizer.register_load_state_dict_pre_hook(keep_fused)
        if self.scheduler is None:
            return optimizer
        schedule = {"scheduler": self.scheduler(optimizer), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def on_fit_start(self) -> None:
        """Start the clock, and say what is trained."""
        self.clock.start()
        for segment in self.objective.segments:
            rank_zero_info(segment.describe())

    @property
    def steps_taken(self) -> int:
        """Optimizer steps behind the current weights, also when only scoring a checkpoint."""
        return self.global_step or self.loaded_step

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what the state dict does not hold."""
        checkpoint["progress"] = {"images_seen": self.images_seen} | self.clock.state_dict()
        checkpoint["network"] = self.network.arguments  # rebuilds it: models/saved.py

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore it."""
        self.loaded_step = checkpoint["global_step"]
        self.images_seen = checkpoint["progress"]["images_seen"]
        self.clock.load_state_dict(checkpoint["progress"])

    # ---- validation ------------------------------------------------------------------------

    @property
    def settings(self) -> list[Setting]:
        """Everything that one evaluation samples: weights times guidances; the main one first."""
        averages = [self.ema, *self.more_ema]
        return all_settings(self.network, averages, self.scored_weights, self.guidances)

    def on_validation_start(self) -> None:
        """Start the clock of the evaluation."""
        self.clock.start_evaluation()

    def on_validation_end(self) -> None:
        """Log what evaluations cost, as a share of the fit."""
        self.clock.end_evaluation()
        if self.clock.fit_began is not None:
            self.record({"val/evaluation_share": self.clock.evaluation_share})

    def validation_step(
        self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0
    ) -> Tensor:
        """Generate the images (B, C, H, W) uint8 of a batch of seeds and labels."""
        setting = int(batch["setting"][0])
        return self.generate(batch["seed"].tolist(), batch["label"].tolist(), setting)

    test_step = validation_step
    predict_step = validation_step

    def generate(self, seeds: list[int], labels: list[int], setting: int = 0) -> Tensor:
        """Images (B, C, H, W) uint8, each fixed by seed and label, in one of the `settings`."""
        if self.unconditional:
            labels = [self.network.null_class] * len(labels)
        return generate(
            self.settings[setting],
            self.sampler,
            self.autoencoder,
            seeds,
            labels,
            shape=self.input_shape,
            block=self.generation_block,
            device=self.device,
        )

    def protocol(self, setting: int = 0) -> dict[str, Any]:
        """How the images of one of the `settings` are generated, for the record of a score."""
        return self.settings[setting].describe() | {
            "sampler": self.sampler.describe(),
            "steps": self.sampler.steps,
            "autoencoder": self.autoencoder.describe(),
            "precision": str(self.trainer.precision),
            "step": self.steps_taken,
            "images_seen": self.images_seen,
            "wall_clock_seconds": round(self.clock.wall_clock, 3),
            "training_seconds": round(self.clock.training_seconds, 3),
        }
