"""One recipe of one network, ready to take the optimizer steps of a run; see step.py."""

import math
import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from common import ROOT, synchronize
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from w2s_train.autoencoder import PixelSpace
from w2s_train.command.run import compose
from w2s_train.module import DiffusionModule

OWN = "w2s"  # the recipe of the segments in a network's own config
DONE = 0.9  # of a run's steps: every schedule has started, every snapshot is taken


@dataclass(frozen=True)
class Network:
    """How a network is built and timed.

    In a batch of a multiple of five, t = 0.2 and 0.8, where SGG's segments end, lie between two
    rows; of ten rows, one at least has its label dropped. The batch of the tiny network lets
    arithmetic dominate over the host's time per operation. On a GPU it is the published one.
    """

    options: list[str]
    batch: int  # rows on a CPU
    steps: int  # per timed block, on a CPU
    gpu_batch: int = 256
    gpu_steps: int = 8


def _sized(overlay: str | None = None, **sizes: int) -> list[str]:
    """Of the reference run; its data is never read, but must be named."""
    files = [f"configs/network/{overlay}.yaml"] if overlay else []
    options = [option for file in ["configs/dit_b_w2s.yaml", *files] for option in ("-c", file)]
    options += ["--data", "configs/data/digits.yaml", "--data.num_classes", "1000"]
    return options + [f"--model.network.init_args.{name}={n}" for name, n in sizes.items()]


def _study(name: str) -> Network:
    """Of a study in experiments/, at the batch of its runs."""
    files = ["-c", f"configs/{name}_w2s.yaml", "-c", f"experiments/{name}/small.yaml"]
    return Network(files, batch=64, steps=20, gpu_batch=64, gpu_steps=20)


NETWORKS = {
    "mnist": _study("mnist"),
    "cifar10": _study("cifar10"),
    "tiny_imagenet": _study("tiny_imagenet"),
    "tiny": Network(["-c", "configs/digits_w2s.yaml"], batch=320, steps=4, gpu_steps=20),
    "small": Network(
        _sized(None, input_size=16, hidden_size=192, depth=12, num_heads=6),
        batch=40,
        steps=8,
        gpu_steps=20,
    ),
    "s2": Network(_sized("dit_s_2"), batch=20, steps=1),
    "b2": Network(_sized("dit_b_2"), batch=10, steps=1),
    "l2": Network(_sized("dit_l_2"), batch=10, steps=1, gpu_steps=4),
    "xl2": Network(_sized("dit_xl_2"), batch=10, steps=1, gpu_steps=4),
}


@dataclass(frozen=True)
class Setting:
    """What all recipes of one comparison have in common."""

    network: str
    precision: str
    compile: bool | str  # see `DiffusionModule`
    batch: int  # rows
    steps: int  # per timed block; more where a recipe acts every few steps only
    options: list[str]  # of the command, for any other part of the config
    device: torch.device


class Timed:
    """One recipe.

    Args:
        recipe: Stem of a file in configs/weak, or w2s: the segments of the network's config.
        setting: Everything else.

    Raises:
        UserError: The config cannot be used.
    """

    def __init__(self, recipe: str, setting: Setting) -> None:
        options = {
            "trainer.accelerator": "gpu" if setting.device.type == "cuda" else "cpu",
            "trainer.devices": 1,
            "trainer.callbacks": "null",
            "trainer.logger": "false",
            "trainer.precision": setting.precision,
            "model.compile": str(setting.compile).lower(),
        }
        overlay = [] if recipe == OWN else ["-c", f"configs/weak/{recipe}.yaml"]
        given = ["fit", *NETWORKS[setting.network].options, *overlay]
        given = [str(ROOT / p) if p.startswith(("configs/", "experiments/")) else p for p in given]
        given += [f"--{name}={value}" for name, value in options.items()]
        command = compose([*given, *setting.options], run=False)
        self.module: DiffusionModule = command.model
        self.trainer: Any = command.trainer
        self._start()
        intervals = [getattr(s.weak, "every", 1) for s in self.module.objective.segments]
        self.steps = math.lcm(setting.steps, *intervals)  # of blocks that all cost the same
        self.device = self.module.device
        classes = self.module.network.num_classes
        images = torch.randn(setting.batch, *self.module.input_shape, device=self.device)
        if isinstance(self.module.autoencoder, PixelSpace):
            images = (64 * images + 128).clamp(0, 255).to(torch.uint8)  # as they come from shards
        self.batch = {
            "image": images,
            "label": torch.randint(classes, (setting.batch,), device=self.device),
        }

    def _start(self) -> None:
        """What ``fit`` does before its first batch, but for callbacks and data."""
        trainer, module = self.trainer, self.module
        trainer.callbacks, trainer.state.fn, trainer.training = [], TrainerFn.FITTING, True
        trainer.strategy.connect(module)
        module.trainer = trainer
        trainer.strategy.setup_environment()
        module.setup("fit")
        trainer.strategy.setup(trainer)
        module.on_fit_start()
        for segment in module.objective.segments:
            if not segment.weak.ready:  # an early state: any weights take the same time
                segment.weak.set_extra_state({"taken": True, "old_enough": True})
        self.loop = trainer.fit_loop.epoch_loop.automatic_optimization
        self.loop.optim_progress.optimizer.step.total.completed = int(DONE * trainer.max_steps)

    def share(self, other: "Timed") -> None:
        """Use the memory of another one's network and its average, so that all fit on one device.

        The time of a step does not depend on the values. What only one of them has is its own.
        """
        theirs = other._networks()
        for name, parameter in self._networks().items():
            if name in theirs:
                parameter.data = theirs[name].data

    def share_optimizer(self, other: "Timed") -> None:
        """The same for the optimizer's averages, once both have taken a step."""
        mine, theirs = self.trainer.optimizers[0].state, other.trainer.optimizers[0].state
        others = other._networks()
        for which, ours in self._networks().items():
            for name, value in theirs.get(others.get(which, ours), {}).items():
                if value.shape == ours.shape:  # and not a counter
                    mine[ours][name] = value

    def _networks(self) -> dict[str, nn.Parameter]:
        network: Any = self.module.network
        found = dict(network.named_parameters(prefix="network"))
        return found | dict(self.module.ema.named_parameters(prefix="average"))

    def step(self) -> None:
        """One optimizer step, by the trainer's own loop: its precision, closure and clipping."""
        batch = OrderedDict(batch=self.batch, batch_idx=0)
        self.loop.run(self.trainer.optimizers[0], 0, batch)

    def block(self, steps: int = 0) -> float:
        """Seconds of a few steps; of as many as are timed if not given."""
        synchronize()
        began = time.perf_counter()
        for _ in range(steps or self.steps):
            self.step()
        synchronize()
        seconds = time.perf_counter() - began
        self.trainer.optimizers[0].zero_grad()  # the others need the memory
        return seconds

    def peak_memory(self) -> int | None:
        """Bytes of one step: what is kept, and what a block adds to it. None on a CPU.

        What is kept are weights, averages, weak networks and the optimizer's state, though not that
        of a co-trained network's own optimizer.
        """
        if self.device.type != "cuda":
            return None
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        self.block()
        added = torch.cuda.max_memory_allocated(self.device) - before
        return added + sum(tensor.nbytes for tensor in self._kept())

    def _kept(self) -> Iterator[Tensor]:
        yield from self.module.parameters()
        yield from self.module.buffers()
        for state in self.trainer.optimizers[0].state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))

    def finite(self) -> bool:
        """Whether the weights still are numbers: a step that is skipped takes another time."""
        return all(bool(p.isfinite().all()) for p in self.module.network.parameters())
