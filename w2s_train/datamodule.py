"""Training data from webdataset shards, and the plan of what to generate for validation."""

import runpy
import signal
from pathlib import Path
from typing import Any

import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader

from w2s_train.autoencoder import to_uint8
from w2s_train.errors import UserError
from w2s_train.plan import GenerationPlan, Remaining
from w2s_train.stream import ShardImages, ShardStream, expand_urls


class ShardDataModule(LightningDataModule):
    """Training batches from shards; generation plans for validate, test and predict.

    Batches are ``{"image": (B, C, H, W) float32, "label": (B,) int64}``; those of a plan hold
    "index", "seed", "label" and "setting", (B,) int64 each. Every rank gets its own part of a plan,
    nothing padded and nothing twice.

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
        sampling_seeds: Validations are repeated with so many sets of ``num_generated`` seeds, none
            of them twice; each gets a score of its own.
        prepare: Name of a script in ``data/`` that makes the shards when they are missing.
        dataset: Name of the data set, which its reference statistics carry; the name of the shards'
            folder if not given.
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
        sampling_seeds: int = 1,
        prepare: str | None = None,
        dataset: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        least = dict(num_classes=1, batch_size=1, num_workers=0, shuffle=0, num_generated=1)
        given = dict(num_classes=num_classes, batch_size=batch_size, num_workers=num_workers)
        given |= dict(shuffle=shuffle, num_generated=num_generated)
        given |= dict(generation_batch_size=generation_batch_size, sampling_seeds=sampling_seeds)
        for name, value in given.items():
            if value < least.get(name, 1):
                raise UserError(f"{name}={value}: must be at least {least.get(name, 1)}")
        self.script = _find_script(prepare) if prepare else None
        if self.script is None:
            expand_urls(train_urls)
        self.train_urls, self.num_classes, self.batch_size = train_urls, num_classes, batch_size
        self.num_workers, self.shuffle, self.flip = num_workers, shuffle, flip
        self.in_memory, self.seed = in_memory, seed
        self.num_generated, self.generation_batch_size = num_generated, generation_batch_size
        self.sampling_seeds = sampling_seeds
        self.dataset = dataset or Path(train_urls).resolve().parent.name
        self.plan: GenerationPlan | None = None  # of `lightning sample`

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

    def val_dataloader(self) -> list[DataLoader]:
        """One generation plan per setting of the module and range of seeds; this rank's parts."""
        assert self.trainer is not None
        if self.num_generated < self.trainer.world_size:
            raise UserError(
                f"num_generated={self.num_generated}: must be at least the number of processes, "
                f"{self.trainer.world_size}"
            )
        n, labels = self.num_generated, range(self.num_classes)
        module: Any = self.trainer.lightning_module
        return [
            self._generation(GenerationPlan(range(k * n, (k + 1) * n), labels, setting))
            for setting in range(len(module.settings))
            for k in range(self.sampling_seeds)
        ]

    test_dataloader = val_dataloader

    def predict_dataloader(self) -> DataLoader:
        """This rank's part of the plan of `lightning sample`, or of the first of validation."""
        assert self.trainer is not None
        seeds, labels = range(self.num_generated), range(self.num_classes)
        plan = self.plan or GenerationPlan(seeds, labels)
        if len(plan) < self.trainer.world_size:
            raise UserError(
                f"seeds={plan.seeds[0]}:{plan.seeds[-1] + 1}: must be at least as many as "
                f"processes, {self.trainer.world_size}"
            )
        return self._generation(plan)

    def _generation(self, plan: GenerationPlan) -> DataLoader:
        assert self.trainer is not None
        sampler = Remaining(plan, self.trainer.global_rank, self.trainer.world_size)
        return DataLoader(plan, batch_size=self.generation_batch_size, sampler=sampler)


class ReferenceImages(LightningDataModule):
    """Every image of some shards once, uint8, for reference statistics.

    Args:
        urls: Path, glob or brace pattern of shards of images.
        data: The data module of the run, which may have to make the shards first.
    """

    def __init__(self, urls: str, data: ShardDataModule) -> None:
        super().__init__()
        self.urls, self.data = urls, data

    def prepare_data(self) -> None:
        """As for a fit."""
        self.data.prepare_data()

    def predict_dataloader(self) -> DataLoader:
        """This process's batches: "image" (B, C, H, W) uint8, "place" and "encoding" lists of B."""
        assert self.trainer is not None
        images = ShardImages(
            expand_urls(self.urls, "urls"),
            rank=self.trainer.global_rank,
            world_size=self.trainer.world_size,
            num_classes=self.data.num_classes,
        )
        size, workers = self.data.generation_batch_size, self.data.num_workers
        return DataLoader(images, size, num_workers=workers, collate_fn=_collate_images)


def _collate_images(rows: list[dict[str, Any]]) -> dict[str, Any]:
    shapes = sorted({tuple(row["image"].shape) for row in rows})
    if len(shapes) > 1:
        raise UserError(f"images={shapes}: must be of one shape (channels, height, width)")
    return {
        "image": to_uint8(torch.stack([row["image"] for row in rows])),
        "place": [row["place"] for row in rows],
        "encoding": [row["encoding"] for row in rows],
    }


def _ignore_interrupts(worker: int) -> None:
    """A terminal's Ctrl-C reaches workers, too; the main process decides when they end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _find_script(name: str) -> Path:
    """A script in the project's ``data/`` folder and nowhere else: a config may not run more."""
    folder = Path(__file__).resolve().parent.parent / "data"
    script = folder / f"{name}.py"
    known = [path for path in sorted(folder.glob("*.py")) if "def prepare(" in path.read_text()]
    if script not in known:
        names = ", ".join(path.stem for path in known) or "none"
        raise UserError(f"prepare={name}: must be one of the scripts in {folder}: {names}")
    return script
