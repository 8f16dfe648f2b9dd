"""The Lightning module: wires network, objective, sampler, optimizer and weight average."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from lightning import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from w2s_train.autoencoder import Autoencoder, PixelSpace
from w2s_train.clock import FitClock, memory
from w2s_train.errors import UserError, require
from w2s_train.generation import Setting, all_settings, generate
from w2s_train.guidance import Guidance, Unguided
from w2s_train.guideability.ratio import finish
from w2s_train.loading import check_optimizer, load_module, optimizer_over
from w2s_train.log import Log
from w2s_train.models import Network, WeightAverage, check_network, made_of, offered
from w2s_train.models.saved import check_scales
from w2s_train.objective import Objective
from w2s_train.optim import clip, keep_fused, norm_of, step_only_if, unscale
from w2s_train.sampler import Sampler
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
        network: Network,
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
        lists = dict(guidance=guidance, ema_decay=ema_decay, scored_weights=scored_weights)
        for name, given in lists.items():
            if given == []:
                raise UserError(f"{name}=[]: must name at least one")
        self.network, self.objective, self.sampler = check_network(network), objective, sampler
        self.optimizer, self.scheduler = optimizer, scheduler
        self.autoencoder = autoencoder or PixelSpace()
        self.label_dropout = require("label_dropout", label_dropout, "[0, 1]")
        self.unconditional = label_dropout == 1
        self.generation_block = require("generation_block", generation_block, "[1, inf)")
        self.how_compiled, self.scored_weights = compile, scored_weights or ["ema"]
        self.objective.bind(network, label_dropout)
        self.guidances = guidance if isinstance(guidance, list) else [guidance or Unguided()]
        for each in self.guidances:
            each.bind(network, objective)
            if self.unconditional and each.needs_label:
                rule = f"below 1 for {type(each).__name__}, which compares with and without a label"
                raise UserError(f"label_dropout={label_dropout}: must be {rule}")
        decays = ema_decay if isinstance(ema_decay, list) else [ema_decay]
        first, *more = (require("ema_decay", decay, "[0, 1)") for decay in decays)
        self.ema = WeightAverage(network, first)
        self.more_ema = nn.ModuleList(WeightAverage(network, decay) for decay in more)
        self.training_log, self.last_metrics = Log(), dict[str, float]()
        self.learning_rate = 0.0  # of the last step
        self.last_logged = dict[str, float]()  # the last entry of `training_log`
        # Of the optimizer step under way; whether it is good may be known on the device only.
        self.losses, self.good = list[Tensor](), cast(bool | Tensor, True)
        self.gradient_norm: Tensor | None = None
        self.images_seen, self.loaded_step, self.clock = 0, 0, FitClock()
        check_optimizer(optimizer)

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls,
        checkpoint_path: str | Path,
        map_location: Any = None,
        weights_only: bool = True,
        allow_imports: Sequence[str] = (),
    ) -> "DiffusionModule":
        """The module of a local checkpoint, as `load_module` says; always ``weights_only``."""
        module = load_module(cls, str(checkpoint_path), allow_imports)
        return module.to(map_location or "cpu")

    # ---- training --------------------------------------------------------------------------
    def setup(self, stage: str) -> None:
        """Plan the run, and compile: each number of rows and kind of pass is a graph of its own."""
        if stage == "fit":
            self.plan(self.trainer.max_steps)
        if not self.how_compiled:
            return
        # Strong, averaged and weak networks share one forward: each is a variant of it.
        torch._dynamo.config.recompile_limit = 64
        for network in (part for part in self.modules() if hasattr(part, "null_class")):
            whole = self.how_compiled != "blocks"
            for part in [network] if whole else offered(network, "compile=blocks", "blocks"):
                part.compile(dynamic=False)  # in place, which keeps the names of parameters

    def plan(self, max_steps: int) -> None:
        """Check what happens at a step of its own; UserError: one after the last, or unknown."""
        self.objective.plan(max_steps if max_steps > 0 else None)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss () of one batch, {"image", "label"} or a pair, (B, C, H, W) and (B,)."""
        batch = batch if isinstance(batch, dict) else {"image": batch[0], "label": batch[1]}
        x, shape = self.autoencoder.encode(batch["image"]), getattr(self.network, "shape", None)
        if shape is not None and x.shape[1:] != tuple(shape):
            raise UserError(
                f"network.shape={shape}: must fit the data, whose shape is {tuple(x.shape[1:])}"
            )
        y = self.drop_labels(batch["label"])
        step = Step(self.global_step, self.ema.module, batch=batch)
        loss = self.objective(self.network, x, y, step, self.training_log).mean()
        self.losses.append(loss.detach())
        self.images_seen += len(x) * self.trainer.world_size
        return loss

    @property
    def input_shape(self) -> torch.Size:
        """(C, H, W) of what the network takes."""
        return torch.Size(offered(self.network, "sampling", "shape"))

    def drop_labels(self, y: Tensor) -> Tensor:
        """Labels (B,), each replaced by the null class with probability ``label_dropout``."""
        dropped = spread(len(y), self.label_dropout, y.device)
        return torch.where(dropped, self.network.null_class, y)

    def measure(self, optimizer: torch.optim.Optimizer) -> tuple[Tensor, Tensor]:
        """Loss () of the optimizer step under way and norm () of its gradient, before clipping."""
        unscale(optimizer, getattr(self.trainer.precision_plugin, "scaler", None))
        self.gradient_norm = norm_of(optimizer)
        return torch.stack(self.losses).mean(), self.gradient_norm

    def accept(self, good: bool | Tensor, optimizer: torch.optim.Optimizer) -> None:
        """Say, after `measure`, whether the step is to be taken; () bool if not known yet."""
        self.good = step_only_if(good, optimizer)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as the trainer says."""
        if self.gradient_norm is None:  # nobody has judged the step
            self.measure(optimizer)
            self.accept(True, optimizer)
        assert self.gradient_norm is not None
        clip(optimizer, self.gradient_norm, gradient_clip_val, gradient_clip_algorithm)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """One optimizer step; then average and weak sources follow, once per *optimizer* step.

        Within the call below, Lightning runs `training_step`, the backward pass and clipping.
        """
        super().optimizer_step(*args, **kwargs)
        norm, good, self.losses, self.gradient_norm = self.gradient_norm, self.good, [], None
        assert norm is not None, "Lightning calls `configure_gradient_clipping` at each step"
        self.training_log.add(("gradient_norm",), norm.view(1, 1))
        self.training_log.commit(good)
        for average in (self.ema, *self.more_ema):
            average.update(self.network, good)
        # The trainer counts this step when the hook has returned.
        optimizer: torch.optim.Optimizer = args[2]
        self.learning_rate = optimizer.param_groups[0]["lr"]
        step = Step(self.global_step + 1, self.ema.module, self.learning_rate, good)
        # Small networks that learn there do not scale their loss, as float16 would need.
        plugin, scaled = self.trainer.precision_plugin, self.trainer.precision == "16-mixed"
        with contextlib.nullcontext() if scaled else plugin.forward_context():
            self.objective.after_step(self.network, step)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Every ``log_every_n_steps`` optimizer steps, read the statistics and log them."""
        interval: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if self.losses or self.global_step % interval:
            return  # in the middle of a step, which an epoch's end makes shorter, or between logs
        strategy = self.trainer.strategy
        numbers = finish(self.training_log.read(lambda x, op: strategy.reduce(x, reduce_op=op)))
        metrics = {f"train/{name}": value for name, value in numbers.items()}
        metrics["train/learning_rate"] = self.learning_rate
        metrics["train/images_seen"] = self.images_seen
        self.last_logged = metrics
        loader = self.trainer.train_dataloader
        pace = self.clock.pace(self.global_step, self.images_seen, loader)
        self.record(metrics | pace | memory(self.device))

    def record(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Send metrics to the loggers at a step (the current one), and to other callbacks."""
        self.last_metrics = self.last_metrics | metrics
        for logger in self.loggers:
            logger.log_metrics(metrics, step=self.steps_taken if step is None else step)
        self.trainer.callback_metrics.update({k: torch.tensor(v) for k, v in metrics.items()})

    def configure_optimizers(self) -> Any:
        """The optimizer over everything that needs gradients, and the schedule."""
        optimizer = optimizer_over(self)
        optimizer.register_load_state_dict_pre_hook(keep_fused)
        if self.scheduler is None:
            return optimizer
        schedule = {"scheduler": self.scheduler(optimizer), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def on_fit_start(self) -> None:
        self.clock.start()
        for segment in (*self.objective.segments, *self.objective.lookers):
            rank_zero_info(segment.describe())

    @property
    def steps_taken(self) -> int:
        """Optimizer steps behind the current weights, also when only scoring a checkpoint."""
        return self.global_step or self.loaded_step

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["progress"] = {"images_seen": self.images_seen} | self.clock.state_dict()
        checkpoint["network"] = made_of(self.network)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        check_scales(checkpoint.get("network"), self.network)
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
        self.clock.start_evaluation()

    def on_validation_end(self) -> None:
        self.clock.end_evaluation()
        if self.clock.fit_began is not None:
            self.record({"val/evaluation_share": self.clock.evaluation_share})

    def validation_step(
        self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0
    ) -> Tensor:
        """Generate the images (B, C, H, W) uint8 of a batch of seeds and labels."""
        setting = int(batch["setting"][0])
        return self.generate(batch["seed"].tolist(), batch["label"].tolist(), setting)

    test_step = predict_step = validation_step

    def generate(self, seeds: list[int], labels: list[int], setting: int = 0) -> Tensor:
        """Images (B, C, H, W) uint8, each fixed by seed and label, in one of the `settings`."""
        if self.unconditional:
            labels = [self.network.null_class] * len(labels)
        how = (self.settings[setting], self.sampler, self.autoencoder, seeds, labels)
        block, device = self.generation_block, self.device
        return generate(*how, shape=self.input_shape, block=block, device=device)
