"""One guidance at a time, scored as the run scores itself: by the same features and reference."""

import argparse
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.utils.data import default_collate

from w2s_train.datamodule import ShardDataModule
from w2s_train.errors import UserError
from w2s_train.evaluation.fid import FID
from w2s_train.guidance import Guidance
from w2s_train.imports import trusted
from w2s_train.loading import instantiate
from w2s_train.module import DiffusionModule
from w2s_train.shards.order import GenerationPlan, Remaining


class Scored(NamedTuple):
    """The Fréchet distance of some images, its name, and the seconds that they took."""

    metric: str
    value: float
    seconds: float


class Candidate:
    """What a config's ``guidance`` is parsed for."""

    def __init__(self, guidance: Guidance) -> None:
        self.guidance = guidance


def build(spec: dict[str, Any], module: DiffusionModule) -> Guidance:
    """The guidance that a config spells, bound to a module.

    Raises:
        UserError: Its arguments do not fit, or it does not fit the module.
    """
    try:
        guidance = instantiate(Candidate, {"guidance": spec}, list(trusted)).guidance
    except (argparse.ArgumentError, TypeError, ValueError) as error:
        raise UserError(
            f"guidance={spec['class_path']}: must take its arguments; {_reason(error)}"
        ) from error
    guidance.bind(module.network, module.objective)
    if module.unconditional and guidance.needs_label:
        raise UserError(
            f"guidance={guidance.describe()}: must do without labels, as the run has none"
        )
    return guidance


def _reason(error: BaseException) -> str:
    """What the innermost error that names an argument says; parsers wrap it many times."""
    chain: list[BaseException] = [error]
    while cause := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(cause)
    for each in reversed(chain):
        text = " ".join(str(each).split())
        if isinstance(each, UserError) or text.startswith(("Parser key", "the following")):
            return text
    return " ".join(str(error).split())[:300]


class Evaluator:
    """Scores guidances of one module by the distance of a FID callback, without its other metrics.

    Args:
        trainer: Whose processes share the images.
        module: What generates; its main weights count.
        data: Says which classes, and how many images at a time.
        fid: A callback that has loaded its files.
        after_batch: Called with whether it was the last one; all processes meet in the last one.
    """

    def __init__(
        self,
        trainer: Any,
        module: DiffusionModule,
        data: ShardDataModule,
        fid: FID,
        after_batch: Callable[[bool], None],
    ) -> None:
        self.trainer, self.module, self.data, self.after_batch = trainer, module, data, after_batch
        self.fid = FID(str(fid.reference_path), fid.extractor)
        self.fid.reference = fid.reference
        self.labels = data.generated_labels()

    @torch.no_grad()
    def score(self, guidance: Guidance, seeds: range) -> Scored:
        """Generate the images of some seeds and score them, on all processes alike."""
        began, trainer, size = time.monotonic(), self.trainer, self.data.generation_batch_size
        plan = GenerationPlan(seeds, self.labels)
        mine = list(Remaining(plan, trainer.global_rank, trainer.world_size))
        self.module.eval()
        self.module.guidances = [guidance]
        self.fid.plans = [plan]
        self.fid.begin(trainer, self.module)
        for first in range(0, len(mine), size):
            batch = default_collate([plan[i] for i in mine[first : first + size]])
            with trainer.precision_plugin.val_step_context():
                images = self.module.validation_step(batch, 0)
            self.fid.take(0, images, batch)
            self.after_batch(first + size >= len(mine))
        [(metric, value)] = self.fid.found(0, trainer)[0].items()
        value, seconds = trainer.strategy.broadcast((value, time.monotonic() - began))
        return Scored(metric, value, seconds)
