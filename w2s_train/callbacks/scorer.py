"""Callbacks that turn the generated images of a validation into scores."""

import abc
from typing import Any, TypeVar

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from w2s_train.callbacks.run_record import git_commit
from w2s_train.plan import GenerationPlan
from w2s_train.scores import SCHEMA

Kind = TypeVar("Kind", bound=Callback)


def callbacks_of(trainer: Trainer, kind: type[Kind]) -> list[Kind]:
    """The callbacks of a trainer that are of one kind, in their order."""
    return [each for each in trainer.callbacks if isinstance(each, kind)]  # type: ignore[attr-defined]


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


class Scorer(Callback, abc.ABC):
    """Takes in images group by group (a setting and a range of seeds), then scores each group."""

    plans: list[GenerationPlan]  # one a group

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
            group: Of the plans; the first one's names are plain.
            scores: By name.
            n: Number of images behind them.
            module: What generated them.
            about: What the protocol holds beside how images were generated.
        """
        plan = self.plans[group]
        tag = "" if group == 0 else f" ({module.settings[plan.setting].name}, {plan.seeds[0]})"
        module.record({f"val/{name}{tag}": value for name, value in scores.items()})
        made = {"n": n, "seeds": [plan.seeds[0], plan.seeds[-1]], "git_commit": git_commit()}
        protocol = module.protocol(plan.setting) | about | made
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
