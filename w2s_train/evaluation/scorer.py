"""Scores of the generated images of a validation, also of one that is stopped and goes on."""

import abc
import hashlib
import json
import operator
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from w2s_train.checkpoint_file import read_file
from w2s_train.errors import UserError, require
from w2s_train.guidance import Guidance
from w2s_train.scores import SCHEMA, git_commit
from w2s_train.shards.order import GenerationPlan, Shares


def validation_loaders(trainer: Trainer) -> list[Any]:
    """The loaders of the plans that are validated or tested, one a group."""
    loaders = trainer.test_dataloaders if trainer.testing else trainer.val_dataloaders
    return list(loaders) if isinstance(loaders, list | tuple) else [loaders]


def gather(shares: Any, trainer: Trainer) -> list[Any]:
    """What every process has, in the order of ranks."""
    if trainer.world_size == 1:
        return [shares]
    everything: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(everything, shares)
    return everything


def protocol_of(module: Any, setting: int = 0) -> dict[str, Any]:
    """How the images of one of a module's settings are generated, for the record of a score."""
    order = getattr(getattr(module.trainer, "datamodule", None), "order", None)  # of a fit
    return module.settings[setting].describe() | {
        "sampler": module.sampler.describe(),
        "steps": module.sampler.steps,
        "autoencoder": module.autoencoder.describe(),
        "precision": str(module.trainer.precision),
        "step": module.steps_taken,
        "images_seen": module.images_seen,
        "training_samples": None if order is None else order.samples,
        "wall_clock_seconds": round(module.clock.wall_clock, 3),
        "training_seconds": round(module.clock.training_seconds, 3),
    }


class Scorer(Callback, abc.ABC):
    """Takes in images group by group (a setting and a range of seeds), then scores each group."""

    plans: list[GenerationPlan]  # one a group
    seeds: int | None = None  # it takes in images of seeds below this; None: of all

    def check(self, module: Any, data: Any, *, made_later: bool) -> None:  # noqa: B027
        """Refuse what cannot be scored, before any work.

        Args:
            module: What generates.
            data: The data module, which says how much.
            made_later: Files that are missing are no error yet: a script may make them.

        Raises:
            UserError: It cannot.
        """

    @abc.abstractmethod
    def describe(self) -> str:
        """What is done with the images; states are shared between equal ones only."""

    @abc.abstractmethod
    def begin(self, trainer: Trainer, module: Any) -> None:
        """Start with nothing."""

    @abc.abstractmethod
    def take(self, group: int, images: Tensor, batch: dict[str, Tensor]) -> None:
        """Take in images (B, C, H, W) uint8 and the batch of the plan that they come from."""

    @abc.abstractmethod
    def state(self) -> Any:
        """What this process has taken in: tensors, numbers, lists and dicts."""

    @abc.abstractmethod
    def merge(self, state: Any) -> None:
        """Add the state that another process had, or this one before it was stopped."""

    @abc.abstractmethod
    def score(self, trainer: Trainer, module: Any) -> None:
        """Put the processes' shares together and record the scores."""

    def record(
        self, group: int, scores: dict[str, float], n: int, module: Any, about: dict[str, Any]
    ) -> list[dict[str, Any]]:
        """Log the scores of a group of ``n`` images, and return their elements of ``scores.json``.

        Args:
            group: Of the plans; the first one's names are plain, of a fit or unguided averages.
            scores: By name.
            n: Number of images behind them.
            module: What generated them.
            about: What the protocol holds beside how images were generated.
        """
        plan = self.plans[group]
        setting, fits = module.settings[plan.setting].name, module.trainer.state.fn == "fit"
        main = group == 0 and (fits or setting == "ema")  # others are not what the run has scored
        tag = "" if main else f" ({setting}, {plan.seeds[0]})"
        module.record({f"val/{name}{tag}": value for name, value in scores.items()})
        made: dict[str, Any] = {"n": n, "seeds": [plan.seeds[0], plan.seeds[n - 1]]}
        made["git_commit"] = git_commit()
        if isinstance(plan.labels, Shares):
            made["labels"] = plan.labels.describe()
        protocol = protocol_of(module, plan.setting) | about | made
        shared = {key: protocol[key] for key in ("step", "weights", "guidance")}
        return [
            {"schema": SCHEMA, "metric": name, "value": value, **shared, "protocol": {**protocol}}
            for name, value in scores.items()
        ]

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look up the plans."""
        self.plans = [loader.dataset for loader in validation_loaders(trainer)]
        self.begin(trainer, pl_module)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Take in one batch."""
        self.take(dataloader_idx, outputs, batch)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Score."""
        if not trainer.sanity_checking:
            self.score(trainer, pl_module)

    on_test_start = on_validation_start
    on_test_batch_end = on_validation_batch_end
    on_test_end = on_validation_end


def looks_at_images(callback: Callback) -> bool:
    """Whether a callback, other than a bar, takes part in evaluations."""
    hooks = [name for name in vars(Callback) if name.startswith("on_validation_")]
    own = (getattr(getattr(callback, name), "__func__", None) for name in hooks)
    others = [getattr(Callback, name) for name in hooks]
    return not isinstance(callback, ProgressBar) and any(map(operator.is_not, own, others))


class ResumableEvaluation(Callback):
    """Keeps what the scorers have so far, in ``evaluation/KEY`` of the run folder.

    The key stands for weights and protocol, so that nothing of another evaluation is ever used.
    Each process writes a file of its own, whole or not at all. The next start, on any number of
    processes, generates what is missing.

    It has the type of a callback, so that configs may list it among them; from there the command
    hands it to `Run`, which calls it after the scorers.

    Args:
        every: Seconds between two saves; 0 saves after each batch.

    Raises:
        UserError: ``every`` below 0.
    """

    def __init__(self, every: float = 60.0) -> None:
        self.every = require("every", every, "[0, inf)")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse to be the callback of a trainer, as which it would do nothing.

        Raises:
            UserError: In any case.
        """
        raise UserError("callbacks=ResumableEvaluation: must stand in a config of the command")

    def finish(self, trainer: Trainer, module: Any, scorers: Sequence[Scorer]) -> None:
        """Finish the evaluation of a fit that was stopped in the middle of it."""
        if trainer.global_step == 0 or not scorers:
            return
        loop = trainer.fit_loop.epoch_loop.val_loop
        loop.setup_data()
        if trainer.val_dataloaders is None or not self._folder(trainer, module, scorers).is_dir():
            return
        rank_zero_info("finishing the evaluation that was under way")
        trainer.validating = True
        loop.restarting = False  # its counters are those of the evaluation before
        loop.run()
        trainer.training = True

    def start(self, trainer: Trainer, module: Any, scorers: Sequence[Scorer]) -> None:
        """Leave out what earlier starts have generated."""
        self.scorers, self.folder = scorers, self._folder(trainer, module, scorers)
        if trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
        trainer.strategy.barrier("evaluation folder")
        self.earlier = sorted(self.folder.glob("*.pt"))
        attempt = 1 + max((int(path.stem.split("-")[0]) for path in self.earlier), default=0)
        self.path = self.folder / f"{attempt:06d}-{trainer.global_rank}.pt"
        trainer.strategy.barrier("evaluation files")  # before anyone writes a new one
        loaders = validation_loaders(trainer)
        for loader in loaders:
            loader.sampler.done = set()
        for path in self.earlier:
            for loader, done in zip(loaders, read_file(str(path))["done"], strict=True):
                loader.sampler.done |= set(done)
        known = sum(len(loader.sampler.done) for loader in loaders)
        if known:
            total = sum(len(loader.dataset) for loader in loaders)
            rank_zero_info(f"{known:,} of {total:,} images were taken in before")
        self.done: list[list[int]] = [[] for _ in loaders]
        self.saved = time.monotonic()

    def take(self, group: int, batch: dict[str, Tensor]) -> None:
        """The scorers have taken in a batch of a group; save now and then."""
        self.done[group] += batch["index"].tolist()
        if time.monotonic() - self.saved >= self.every:
            self.save()
            self.saved = time.monotonic()

    def merge(self, trainer: Trainer) -> None:
        """All batches are there: give the scorers what was taken in before."""
        if self.path.exists():
            self.save()
        if trainer.is_global_zero:
            for path in self.earlier:
                states = read_file(str(path))["scorers"]
                for scorer, state in zip(self.scorers, states, strict=True):
                    scorer.merge(state)

    def end(self, trainer: Trainer) -> None:
        """The scores are recorded: nothing is to be kept."""
        trainer.strategy.barrier("evaluation done")
        if trainer.is_global_zero:
            shutil.rmtree(self.folder)
            if not any(self.folder.parent.iterdir()):
                self.folder.parent.rmdir()

    def save(self) -> None:
        """Write what this process has taken in so far."""
        partial = self.path.with_suffix(".partial")
        content = {"done": self.done, "scorers": [scorer.state() for scorer in self.scorers]}
        with open(partial, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self.path)

    def _folder(self, trainer: Trainer, module: Any, scorers: Sequence[Scorer]) -> Path:
        key = evaluation_key(trainer, module, scorers) if trainer.is_global_zero else None
        key = trainer.strategy.broadcast(key)
        return Path(trainer.default_root_dir) / "evaluation" / str(key)


def weights_digest(parts: Iterable[nn.Module]) -> Any:
    """Of all tensors of some modules, as hashlib has it."""
    digest = hashlib.sha256()
    for part in parts:
        for tensor in part.state_dict().values():
            if isinstance(tensor, Tensor):
                digest.update(tensor.cpu().flatten().view(torch.uint8).numpy().data)
    return digest


def evaluation_key(trainer: Trainer, module: Any, scorers: Sequence[Scorer]) -> str:
    """A digest of everything that the images and their scores depend on."""
    digest = weights_digest([module, *_parts(module.guidances)])
    loaders = validation_loaders(trainer)
    about = {
        "config": str(module.hparams),
        "settings": [setting.describe() for setting in module.settings],
        "where": [module.steps_taken, str(trainer.precision), module.device.type],
        "plans": [_describe(loader.dataset) for loader in loaders],
        "scorers": [scorer.describe() for scorer in scorers],
    }
    digest.update(json.dumps(about).encode())
    return digest.hexdigest()[:16]


def _describe(plan: GenerationPlan) -> list[Any]:
    shares = [plan.labels.describe()] if isinstance(plan.labels, Shares) else []
    return [*plan.seeds[:1], len(plan), *shares]


def _parts(guidances: list[Guidance]) -> Iterator[nn.Module]:
    """Networks that guidances hold, such as those of files."""
    for guidance in guidances:
        for value in vars(guidance).values():
            if isinstance(value, nn.Module):
                yield value
            elif isinstance(value, Guidance):
                yield from _parts([value])
