"""Training data from webdataset shards, and the plan of what to generate for validation."""

import runpy
import signal
from pathlib import Path

import torch
from lightning import LightningDataModule
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from torch.utils.data import DataLoader, Dataset

from w2s_train.errors import UserError
from w2s_train.stream import ShardStream, expand_urls


class GenerationPlan(Dataset):
    """What to generate: item i is seed i and class i mod ``num_classes``.

    Args:
        num_samples: Number of images.
        num_classes: Number of classes, all equally often.
    """

    def __init__(self, num_samples: int, num_classes: int) -> None:
        self.num_samples, self.num_classes = num_samples, num_classes

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> dict[str, int]:
        return {"seed": index, "label": index % self.num_classes}


class ShardDataModule(LightningDataModule):
    """Training batches from shards; generation plans for validate, test and predict.

    Batches are ``{"image": (B, C, H, W) float32, "label": (B,) int64}``; items of a plan are
    ``{"seed": (B,) int64, "label": (B,) int64}``. Every rank gets its own part of the plan, nothing
    padded and nothing twice.

    Args:
        train_urls: Path, glob or brace pattern of the training shards.
        num_classes: Labels are 0 ... num_classes - 1; must equal the network's.
        batch_size: Rows per step and process.
        num_workers: Worker processes per rank that read shards; 0 reads in the main process.
        shuffle: Samples held per worker for shuffling.
        flip: Mirror every other training image at random.
        in_memory: Keep the decoded data in memory.
        num_generated: Images per validation.
        generation_batch_size: Images per validation step; does not change the images.
        prepare: Name of a script in ``data/`` that makes the shards when they are missing.
        seed: Of the order; the command links it to ``seed_everything``.

    Raises:
        UserError: A number out of its range; shards that are missing and that no script makes.
    """

    def __init__(
        self,
        train_urls: str,
        num_classes: int,
        batch_size: int,
        num_workers: int = 4,
        shuffle: int = 10_000,
        flip: bool = False,
        in_memory: bool = False,
        num_generated: int = 50_000,
        generation_batch_size: int = 250,
        prepare: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        least = dict(num_classes=1, batch_size=1, num_workers=0, shuffle=0, num_generated=1)
        given = dict(num_classes=num_classes, batch_size=batch_size, num_workers=num_workers)
        given |= dict(shuffle=shuffle, num_generated=num_generated)
        for name, value in (given | dict(generation_batch_size=generation_batch_size)).items():
            if value < least.get(name, 1):
                raise UserError(f"{name}={value}: must be at least {least.get(name, 1)}")
        self.script = _find_script(prepare) if prepare else None
        if self.script is None:
            expand_urls(train_urls)
        self.train_urls, self.num_classes, self.batch_size = train_urls, num_classes, batch_size
        self.num_workers, self.shuffle, self.flip = num_workers, shuffle, flip
        self.in_memory, self.seed = in_memory, seed
        self.num_generated, self.generation_batch_size = num_generated, generation_batch_size

    def prepare_data(self) -> None:
        """Run the preparation script, which does nothing where its files exist already."""
        if self.script is not None:
            runpy.run_path(str(self.script), run_name="w2s_train.prepare")["prepare"]()

    def train_dataloader(self) -> DataLoader:
        """Endless batches of this rank, from where the run stands."""
        trainer = self.trainer
        assert trainer is not None
        urls, workers = expand_urls(self.train_urls), max(self.num_workers, 1)
        if len(urls) < trainer.world_size * workers:
            raise UserError(
                f"train_urls={self.train_urls}: {len(urls)} shards are too few for "
                f"{trainer.world_size} processes x {workers} workers; each needs one"
            )
        stream = ShardStream(
            urls,
            num_classes=self.num_classes,
            batch_size=self.batch_size,
            seed=self.seed,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            start=trainer.global_step * trainer.accumulate_grad_batches,
            shuffle=self.shuffle,
            flip=self.flip,
            in_memory=self.in_memory,
        )
        return DataLoader(
            stream,
            batch_size=None,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
            worker_init_fn=_ignore_interrupts,
        )

    def val_dataloader(self) -> DataLoader:
        """This rank's part of the generation plan."""
        assert self.trainer is not None
        if self.num_generated < self.trainer.world_size:
            raise UserError(
                f"num_generated={self.num_generated}: must be at least the number of processes, "
                f"{self.trainer.world_size}"
            )
        plan = GenerationPlan(self.num_generated, self.num_classes)
        sampler = UnrepeatedDistributedSampler(
            plan, self.trainer.world_size, self.trainer.global_rank, shuffle=False
        )
        return DataLoader(plan, batch_size=self.generation_batch_size, sampler=sampler)

    test_dataloader = val_dataloader
    predict_dataloader = val_dataloader


def _ignore_interrupts(worker: int) -> None:
    """A terminal's Ctrl-C reaches workers, too; the main process decides when they end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _find_script(name: str) -> Path:
    """A script in the project's ``data/`` folder and nowhere else: a config may not run more."""
    folder = Path(__file__).resolve().parent.parent / "data"
    script = folder / f"{name}.py"
    if script.parent != folder or not script.is_file():
        known = ", ".join(sorted(path.stem for path in folder.glob("*.py"))) or "none"
        raise UserError(f"prepare={name}: must be one of the scripts in {folder}: {known}")
    return script
