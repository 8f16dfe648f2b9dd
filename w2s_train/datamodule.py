"""What a run reads: training batches from shards, plans of what to generate, and every image once
for reference statistics.
"""

import hashlib
import os
import runpy
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.utils.data import DataLoader

from w2s_train.errors import UserError, require
from w2s_train.secrets import redacted
from w2s_train.shards import ShardBatches, ShardFiles, ShardImages, Storage, expand_urls
from w2s_train.shards.format import CLASSES, read_index
from w2s_train.shards.global_batch import accumulate, parts_for, recount
from w2s_train.shards.index import Shard, check_labels, count_labels, find_shards
from w2s_train.shards.order import GenerationPlan, Places, Positions, Remaining, Shares, StreamOrder
from w2s_train.shards.storage import is_remote, split_url
from w2s_train.shards.workers import batches, check_room

SMALL = 512e6  # bytes of decoded samples that are held in memory unless the config says otherwise
TRIED = 16  # samples that are read, at most, to know the size of one


class ShardDataModule(LightningDataModule):
    """Training batches from shards; generation plans for validate, test and predict.

    Training batches are ``{"image": (B, C, H, W) as stored, uint8 for pixels, "label": (B,) int64,
    "skipped": [...]}``, and "tokens" where the objective aligns with stored ones: see
    `ShardBatches`. Their order depends on ``seed`` and the position in the run alone, not on the
    numbers of processes and workers. Batches of a plan hold "index", "seed",
    "label" and "setting", (B,) int64 each. Every rank gets its own part of a plan, nothing padded
    and nothing twice; a trainer must be told so: ``use_distributed_sampler=False``.

    Args:
        train_urls: Path, glob or brace pattern of the training shards, or such a URL
            (``s3://``, ``gs://``, ``hf://``, ``https://``, ...).
        held_out_urls: The same for shards that are not trained on, where segments that only look on
            do so, too; read only for them.
        num_classes: Labels are 0 ... num_classes - 1; must equal the network's. None is as many as
            ``classes.txt`` or ``index.json`` beside the shards tell of, or as ``images`` has; the
            command gives the network as many.
        batch_size: Rows per process at a time; with ``global_batch_size``, the most.
        global_batch_size: Rows per optimizer step, over all processes and accumulated parts; the
            rows per process and ``trainer.accumulate_grad_batches`` follow from it, and steps mean
            optimizer steps in ``trainer.val_check_interval`` and ``limit_train_batches``, too.
            None is ``batch_size`` times processes times what the trainer accumulates.
        num_workers: Worker processes per rank that read shards; 0 reads in the main process. They
            pass batches on through ``/dev/shm``, which must have room for three per worker.
        batch_timeout_minutes: For how long a batch of the workers is waited for, a download of its
            shard included. (Processes that wait for another one do so for
            ``watch.timeout_minutes``.)
        shuffle: Samples within which the order is shuffled, whole shards of them; the shards
            themselves are in a new order every epoch. 0 leaves the rows of a shard as they are.
        flip: Mirror every other training sample at random; latents need stored mirrored ones.
        in_memory: Keep the decoded data in memory; None does for local shards
            that decode to less than 512 MB.
        max_skipped: Share of the samples of an epoch, in [0, 1], that may be missing or
            unreadable; they are replaced by others and reported. Beyond it training stops.
        cache: Folder for downloads and tables of shards; ``$W2S_CACHE`` or ``~/.cache/w2s_train``
            if not given.
        cache_gigabytes: Limit of the downloads in the cache; None is none.
        allow_pipe: Let ``pipe:COMMAND`` in ``train_urls`` run the command in a shell; true only on
            the command line, and in no config.
        unlabelled: Take shards without labels: every sample is of class 0, whatever its shard
            says. Training is unconditional then, ``model.label_dropout=1``.
        num_generated: Images per validation.
        generation_batch_size: Images per validation step; does not change the images.
        labels_as_in_training: Generate the classes with their frequencies in the training shards,
            the label of an image fixed by its seed; otherwise each class in turn. For data whose
            classes are not equally frequent: references have their natural frequencies.
        sampling_seeds: Validations are repeated with so many sets of ``num_generated`` seeds, none
            of them twice; each gets a score of its own.
        first_seed: Of an evaluation's images; another one than 0 makes images that nobody has seen.
        prepare: Name of a script in ``data/`` that makes the shards when they are missing.
        images: Folder of images, in a sub-folder per class or all of one class, of which
            ``data/prepare.py`` makes the shards where they are missing; see `fit_to`.
        made_by: The command that makes the shards, to be named where they are missing.
        dataset: Name of the data set, for its references; that of the shards' folder if not given.
        seed: Of the order; the command links it to ``seed_everything``.

    Raises:
        UserError: A number out of its range; shards that are missing and that no script makes.
    """

    def __init__(
        self,
        train_urls: str,
        num_classes: int | None,
        batch_size: int,
        global_batch_size: int | None = None,
        num_workers: int = 4,
        batch_timeout_minutes: float = 30.0,
        shuffle: int = 10_000,
        flip: bool = False,
        in_memory: bool | None = None,
        max_skipped: float = 0.01,
        cache: str | None = None,
        cache_gigabytes: float | None = None,
        allow_pipe: bool = False,
        unlabelled: bool = False,
        num_generated: int = 50_000,
        generation_batch_size: int = 250,
        labels_as_in_training: bool = False,
        sampling_seeds: int = 1,
        first_seed: int = 0,
        prepare: str | None = None,
        images: str | None = None,
        made_by: str | None = None,
        dataset: str | None = None,
        seed: int = 0,
        held_out_urls: str | None = None,
    ) -> None:
        super().__init__()
        if num_classes is None:
            num_classes = classes_of(train_urls, images, made_by)
        positive = dict(num_classes=num_classes, batch_size=batch_size, num_generated=num_generated)
        positive |= dict(global_batch_size=1 if global_batch_size is None else global_batch_size)
        positive |= dict(generation_batch_size=generation_batch_size, sampling_seeds=sampling_seeds)
        for name, value in positive.items():
            require(name, value, "[1, inf)")
        least = dict(num_workers=num_workers, shuffle=shuffle, seed=seed, first_seed=first_seed)
        for name, value in least.items():
            require(name, value, "[0, inf)")
        require("batch_timeout_minutes", batch_timeout_minutes, "(0, inf)")
        require("max_skipped", max_skipped, "[0, 1]")
        if cache_gigabytes is not None:
            require("cache_gigabytes", cache_gigabytes, "(0, inf)")
        self.prepare_data_per_node = False  # nodes share the project's folder
        self.script = find_script(prepare) if prepare else None
        self.images, self.made_by = images, made_by
        self.shape: Sequence[int] = ()  # of what is still to be made of ``images``, if anything
        self.makes_shards = prepare is not None or images is not None
        self.storage = Storage(cache, cache_gigabytes, allow_pipe)
        self.train_urls, self.num_classes, self.batch_size = train_urls, num_classes, batch_size
        self.global_batch_size, self.most_rows = global_batch_size, batch_size
        self.divided_for: Any = None  # the trainer that accumulates for the global batch
        if not self.makes_shards:
            self.expand(train_urls)
        self.held_out_urls = held_out_urls
        self.num_workers, self.batch_timeout_minutes = num_workers, batch_timeout_minutes
        self.shuffle, self.flip = shuffle, flip
        self.in_memory, self.max_skipped, self.seed = in_memory, max_skipped, seed
        self.num_generated, self.generation_batch_size = num_generated, generation_batch_size
        self.sampling_seeds, self.unlabelled = sampling_seeds, unlabelled
        self.first_seed = first_seed
        self.labels_as_in_training = labels_as_in_training
        self.dataset = dataset or Path(redacted(train_urls)).resolve().parent.name
        self.seeds: Sequence[int] | None = None  # of `lightning sample`
        self.classes: Sequence[int] | None = None  # the same, taken in turn
        self.order: StreamOrder | None = None  # of the training stream, once there is one
        self.repeated: int | float = 0  # batches of it, or a share of the data
        self.shards: list[Shard] = []
        self.tokens = False  # whether batches bring an encoder's tokens along
        self.checkpoint_order = dict[str, Any]()

    def expand(self, urls: str, name: str = "train_urls") -> list[str]:
        """The shards that a pattern names; see `expand_urls`."""
        try:
            return expand_urls(urls, name, allow_pipe=self.storage.allow_pipe)
        except UserError as error:
            raise _named(error, self.made_by if urls == self.train_urls else None) from None

    def fit_to(self, shape: Sequence[int]) -> None:
        """Make the shards of ``images`` of shape (C, H, W), as the network takes them.

        Raises:
            UserError: They would not lie in a local folder.
        """
        if is_remote(self.train_urls):
            raise UserError(
                f"data.train_urls={self.train_urls}: must be a local path, where the shards of "
                "data.images are made"
            )
        self.shape = shape

    def prepare_data(self) -> None:
        """Run what makes the shards, which does nothing where they exist already.

        Raises:
            UserError: Of ``images``, no shards can be made.
        """
        if self.script is not None:
            runpy.run_path(str(self.script), run_name="w2s_train.prepare")["prepare"]()
        if self.images is not None and self.shape:
            script, *words = prepare_folder(self.images, self.train_urls, self.shape)
            script = str(Path(__file__).resolve().parents[1] / script)
            if subprocess.run([sys.executable, script, *words]).returncode:
                command = shlex.join(["python", script, *words])
                raise UserError(f"images={self.images}: must become shards; see above: {command}")
            self.shape = ()  # made; a process looks at all images once

    def setup(self, stage: str) -> None:
        """Divide the global batch, before anybody asks the trainer what it accumulates.

        Raises:
            UserError: The trainer would put samplers of its own in place of ours.
        """
        trainer: Any = self.trainer
        if trainer.overfit_batches:
            raise UserError(f"trainer.overfit_batches={trainer.overfit_batches}: must be 0")
        if trainer.world_size > 1 and trainer._accelerator_connector.use_distributed_sampler:
            raise UserError("trainer.use_distributed_sampler=True: must be False")
        if stage == "fit":
            self.check_unlabelled(trainer.lightning_module)
        size = self.global_batch_size
        if stage != "fit" or size is None or trainer is self.divided_for:
            return
        parts = parts_for(trainer, size, self.most_rows)
        self.divided_for, self.batch_size = trainer, parts.rows
        accumulate(trainer, parts.number)
        rank_zero_info(f"global batch {size}: {parts.describe(trainer.world_size)}")

    def only_first(self, seeds: int) -> None:
        """Generate so many images of an evaluation at most, once: nobody takes in more."""
        self.num_generated, self.sampling_seeds = min(self.num_generated, seeds), 1

    def repeat(self, batches: int | float) -> None:
        """Train on the first batches again and again, as ``trainer.overfit_batches`` says.

        Args:
            batches: So many per process (int), or so large a share of the data (float below 1); 0
                is all data.
        """
        self.repeated = batches

    def check_unlabelled(self, module: Any) -> None:
        """Refuse to train a module on labels where there are none.

        Raises:
            UserError: It would.
        """
        if self.unlabelled and not module.unconditional:
            raise UserError(
                f"model.label_dropout={module.label_dropout}: must be 1 with data.unlabelled=true, "
                "since all samples are of class 0"
            )

    # ---- training --------------------------------------------------------------------------

    def check_global_batch(self, trainer: Any) -> None:
        """Refuse a global batch that the trainer's processes cannot share.

        Raises:
            UserError: It is none, or the trainer accumulates by itself.
        """
        if self.global_batch_size is not None:
            parts_for(trainer, self.global_batch_size, self.most_rows)

    def train_dataloader(self) -> DataLoader:
        """Endless batches of this rank, from where the run stands.

        Raises:
            UserError: Shards that are missing beyond ``max_skipped``, or labels that are no class.
        """
        trainer: Any = self.trainer
        if self.global_batch_size is not None:
            recount(trainer)
        self.shards, self.tokens = self._find_shards(), needs_tokens(trainer.lightning_module)
        counts = [shard.samples for shard in self.shards]
        repeated = self._repeated(sum(counts), trainer.world_size)
        self.order = StreamOrder(counts, seed=self.seed, window=self.shuffle, repeated=repeated)
        module, remote = trainer.lightning_module, any(is_remote(s.url) for s in self.shards)
        undecided = self.in_memory is None and not remote
        size = self._bytes_of_one(module.images_seen) if self.num_workers or undecided else 0
        check_workers(self, trainer, self.batch_size, size)
        self._compare_order()  # only now do processes start workers
        self.files = self._files()
        small = 0 < size * self.files.samples * (1 + self.flip) < SMALL
        in_memory = undecided and small or bool(self.in_memory)
        return batches(
            ShardBatches(self.files, self.order, in_memory=in_memory, prefetch=remote),
            Positions(
                lambda: module.images_seen, self.batch_size, trainer.global_rank, trainer.world_size
            ),
            self.num_workers,
            minutes=self.batch_timeout_minutes,
            pin=torch.cuda.is_available(),
        )

    def held_out(self) -> ShardBatches | None:
        """Batches that are not trained on, by positions in an order of their own; None without.

        Raises:
            UserError: Shards that are missing, not whole or trained on; labels that are no class.
        """
        if self.held_out_urls is None:
            return None
        urls = self.expand(self.held_out_urls, "held_out_urls")
        if shared := {*urls} & {*self.expand(self.train_urls)}:
            raise UserError(f"held_out_urls={min(shared)}: must not be trained on")
        shards = find_shards(urls, self.storage, unlabelled=self.unlabelled)
        check_labels(shards, self.num_classes, self.storage)
        for shard in shards:
            if shard.damage or not shard.samples:
                problem = shard.loss() if shard.damage else "no samples"
                raise UserError(f"held_out_urls={shard.url}: must be whole ({problem})")
        files, remote = ShardFiles(shards, self.storage), any(is_remote(s.url) for s in shards)
        order = StreamOrder([s.samples for s in shards], seed=self.seed, window=self.shuffle)
        size = 0 if remote else bytes_of_one(files, range(min(TRIED, files.samples)))
        small = 0 < size * files.samples < SMALL
        in_memory = small if self.in_memory is None else self.in_memory
        return ShardBatches(files, order, in_memory=in_memory, prefetch=remote)

    def images_per_step(self, trainer: Any) -> int:
        """Of an optimizer step, over all processes and accumulated parts."""
        rows = self.batch_size * trainer.world_size * trainer.accumulate_grad_batches
        return int(self.global_batch_size or rows)

    def _repeated(self, samples: int, processes: int) -> int:
        """Samples of the batches that are repeated; 0 if none are."""
        rows, number = self.batch_size * processes, self.repeated
        if isinstance(number, float) and number:
            number = max(int(number * samples) // rows, 1)
        return int(number) * rows

    def names(self, first: int, rows: int) -> list[str]:
        """Key and shard of the samples at positions ``first`` ... ``first + rows - 1``."""
        assert self.order is not None
        numbers = self.order.at(first, first + rows).rows.tolist()
        return [self.files.title(number) for number in numbers]

    def _find_shards(self) -> list[Shard]:
        """What there is to train on, checked as far as it can be without reading samples."""
        urls = self.expand(self.train_urls)
        shards = find_shards(urls, self.storage, unlabelled=self.unlabelled)
        check_labels(shards, self.num_classes, self.storage)
        samples = sum(shard.samples for shard in shards)
        if samples == 0:
            raise UserError(f"train_urls={self.train_urls}: must hold samples, there are none")
        damaged = [shard for shard in shards if shard.damage]
        lost = sum(shard.lost for shard in damaged)
        report = redacted("; ".join(f"{s.url}: {s.loss()}" for s in damaged[:5]))
        if lost > self.max_skipped * samples:
            raise UserError(
                f"max_skipped={self.max_skipped}: {lost:,} of {samples:,} samples are missing in "
                f"{len(damaged)} of {len(shards)} shards ({report})"
            )
        if self.max_skipped < 1 and not all(shard.sha256 for shard in damaged):
            raise UserError(
                f"max_skipped={self.max_skipped}: must be 1 for damaged shards without an index, "
                f"of which nobody knows what is lost ({report})"
            )
        if damaged:
            rank_zero_warn(f"{len(damaged)} of {len(shards)} shards are damaged ({report})")
        return shards

    def _bytes_of_one(self, position: int) -> int:
        """Of a sample that is due first, whose shard is needed anyhow."""
        assert self.order is not None
        numbers = self.order.at(position, position + TRIED).rows.tolist()
        return bytes_of_one(self._files(), numbers)

    def _files(self) -> ShardFiles:
        """The training samples."""
        return ShardFiles(self.shards, self.storage, flip=self.flip, tokens=self.tokens)

    @property
    def order_name(self) -> str:
        """What the order of the training stream is made from, as a digest."""
        names = [(os.path.basename(s.url), s.samples, s.sha256 or s.bytes) for s in self.shards]
        return _digest((names, self.seed, self.shuffle))

    def state_dict(self) -> dict[str, Any]:
        """For checkpoints: which order of which data the run's position refers to."""
        sizes = [(os.path.basename(s.url), s.samples, s.bytes) for s in self.shards]
        sums = [s.sha256 for s in self.shards]
        data = {"sizes": _digest(sizes), "sums": _digest(sums) if all(sums) else ""}
        return {"order": self.order_name, **data, "seed": self.seed, "shuffle": self.shuffle}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Of the checkpoint that a run goes on from."""
        self.checkpoint_order = dict(state_dict)

    def _compare_order(self) -> None:
        if torch.distributed.is_initialized():
            seen: list[Any] = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(seen, (len(self.shards), self.order_name))
            if len(set(seen)) > 1:
                raise UserError(
                    f"train_urls={self.train_urls}: must name the same shards for all processes, "
                    f"they see {sorted(set(seen))} (number, digest)"
                )
        before, now = self.checkpoint_order, self.state_dict()
        if not before or before["order"] == now["order"]:
            return
        trainer: Any = self.trainer
        start = Path(trainer.ckpt_path or "").resolve()
        if trainer.ckpt_path and start.parent.parent == Path(trainer.default_root_dir).resolve():
            self._refuse_other(before, now, trainer.ckpt_path)
        rank_zero_warn(
            "the shards, data.seed or data.shuffle are not those of the checkpoint: samples "
            "of the current epoch may come twice or not at all"
        )

    def _refuse_other(self, before: dict[str, Any], now: dict[str, Any], path: str) -> None:
        """As far as the checkpoint, and an ``index.json`` on both sides, can tell them apart."""
        for name in ("seed", "shuffle"):
            if before.get(name, now[name]) != now[name]:
                raise UserError(f"data.{name}={now[name]}: must be {before[name]}, as in {path}")
        other = before.get("sizes", now["sizes"]) != now["sizes"]
        if other or (before.get("sums") and now["sums"] and before["sums"] != now["sums"]):
            raise UserError(
                f"data.train_urls={self.train_urls}: must hold the data set of {path} (names, "
                "samples and bytes or SHA-256 of its shards); other data are another run, with "
                "another trainer.default_root_dir"
            )

    # ---- generation ------------------------------------------------------------------------

    def generated_labels(self) -> Sequence[int] | Shares:
        """What the images of an evaluation are of."""
        if not self.labels_as_in_training:
            return range(self.num_classes)
        return Shares(self.class_counts())

    def class_counts(self) -> np.ndarray:
        """Training samples of each class, (num_classes,) int64."""
        shards = self.shards or self._find_shards()
        return count_labels(shards, self.num_classes, self.storage)

    def val_dataloader(self) -> list[DataLoader]:
        """One generation plan per setting of the module and range of seeds; this rank's parts."""
        trainer: Any = self.trainer
        if self.num_generated < trainer.world_size:
            raise UserError(
                f"num_generated={self.num_generated}: must be at least the number of processes, "
                f"{trainer.world_size}"
            )
        n, labels = self.num_generated, self.generated_labels()
        firsts = [self.first_seed + k * n for k in range(self.sampling_seeds)]
        return [
            self._generation(GenerationPlan(range(first, first + n), labels, setting))
            for setting in range(len(trainer.lightning_module.settings))
            for first in firsts
        ]

    test_dataloader = val_dataloader

    def predict_dataloader(self) -> DataLoader:
        """This rank's part of the plan of `lightning sample`, or of the first of validation."""
        trainer: Any = self.trainer
        seeds = range(self.num_generated) if self.seeds is None else self.seeds
        plan = GenerationPlan(seeds, self.classes or self.generated_labels())
        if len(plan) < trainer.world_size:
            raise UserError(
                f"seeds={plan.seeds[0]}:{plan.seeds[-1] + 1}: must be at least as many as "
                f"processes, {trainer.world_size}"
            )
        return self._generation(plan)

    def _generation(self, plan: GenerationPlan) -> DataLoader:
        trainer: Any = self.trainer
        sampler = Remaining(plan, trainer.global_rank, trainer.world_size)
        return DataLoader(plan, batch_size=self.generation_batch_size, sampler=sampler)


def _digest(parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


class ReferenceImages(LightningDataModule):
    """Every image of some shards once, uint8, for reference statistics.

    Args:
        urls: Path, glob or brace pattern of shards of images.
        data: The data module of the run, which may have to make the shards first.
    """

    def __init__(self, urls: str, data: ShardDataModule) -> None:
        super().__init__()
        self.urls, self.data = urls, data
        self.allow_zero_length_dataloader_with_multiple_devices = True  # of fewer images than these

    def prepare_data(self) -> None:
        """As for a fit."""
        self.data.prepare_data()

    def predict_dataloader(self) -> DataLoader:
        """This process's part, one image after another in batches: see `ShardImages`.

        Raises:
            UserError: Shards that are missing or not whole.
        """
        trainer: Any = self.trainer
        urls = self.data.expand(self.urls, "urls")
        shards = find_shards(urls, self.data.storage, unlabelled=True)  # nobody asks for labels
        for shard in shards:
            if shard.damage:  # statistics of a part would pass for those of the whole
                raise UserError(f"urls={shard.url}: must be whole ({shard.loss()})")
        files = ShardFiles(shards, self.data.storage)
        rank, size = trainer.global_rank, self.data.generation_batch_size
        first, last = (files.samples * (rank + k) // trainer.world_size for k in (0, 1))
        parts = [range(i, min(i + size, last)) for i in range(first, last, size)]
        workers = self.data.num_workers
        tried = range(first, min(first + TRIED, last)) if workers else range(0)
        images = ShardFiles(shards, self.data.storage)
        check_workers(self.data, trainer, size, bytes_of_one(images, tried))
        minutes = self.data.batch_timeout_minutes
        return batches(ShardImages(files), parts, workers, minutes=minutes)


def bytes_of_one(files: ShardFiles, numbers: Sequence[int]) -> int:
    """Of the first of some samples that can be read; 0 if none can."""
    rows = (files.read(Places.of([number])) for number in numbers)
    whole = next((each for each in rows if not each.bad), None)
    found = [whole.image, whole.tokens] if whole else []
    return sum(each.nbytes for each in found if each is not None)


def needs_tokens(module: Any) -> bool:
    """Whether the objective of a module aligns with stored tokens."""
    align = getattr(getattr(module, "objective", None), "align", None)
    return align is not None and align.stored


def check_workers(data: ShardDataModule, trainer: Any, rows: int, size: int) -> None:
    """Refuse more workers than there is shared memory for.

    Args:
        data: Says how many workers.
        trainer: Says how many processes this machine has.
        rows: Of a batch.
        size: Bytes of a row.
    """
    check_room(rows * size, data.num_workers, getattr(trainer, "num_devices", 1))


def prepare_folder(images: str, train_urls: str, shape: Sequence[int]) -> list[str]:
    """The words of a command, after ``python``, that makes shards (C, H, W) of a folder."""
    split = Path(train_urls).name.partition("-")[0]
    words = ["data/prepare.py", "folder", images, "--output", str(Path(train_urls).parent)]
    words += ["--split", split, "--size", str(shape[1]), "--mode", "RGB" if shape[0] == 3 else "L"]
    return words if _class_folders(images) else [*words, "--unlabelled"]


def classes_of(train_urls: str, images: str | None, made_by: str | None) -> int:
    """Number of classes of shards, or of a folder of images that become some.

    Raises:
        UserError: It is not known.
    """
    folder, _ = split_url(train_urls)
    if (listed := Path(folder) / CLASSES).is_file():
        return len(listed.read_bytes().splitlines())
    if images is not None:
        return max(len(_class_folders(images)), 1)
    last = [entry["labels"][-1] for entry in read_index(Path(folder)).values() if entry["labels"]]
    if not last:
        rule = f"must be a number where {folder} tells of no classes"
        raise _named(UserError(f"num_classes=null: {rule}"), made_by)
    return int(max(last)) + 1


def _class_folders(images: str) -> list[str]:
    """Sub-folders, each a class."""
    if not os.path.isdir(images):
        raise UserError(f"images={images}: must be an existing folder")
    entries = os.scandir(images)
    return [each.name for each in entries if each.is_dir() and not each.name.startswith(".")]


def _named(error: UserError, made_by: str | None) -> UserError:
    """The error, with the command that makes what is missing."""
    return UserError(f"{error}; made by: {made_by}") if made_by else error


def find_script(name: str) -> Path:
    """A script in the project's ``data/`` folder and nowhere else: a config may not run more.

    Raises:
        UserError: There is none of this name.
    """
    folder = Path(__file__).resolve().parents[1] / "data"
    script = folder / f"{name}.py"
    known = [path for path in sorted(folder.glob("*.py")) if "def prepare(" in path.read_text()]
    if script not in known:
        names = ", ".join(path.stem for path in known) or "none"
        raise UserError(f"prepare={name}: must be one of the scripts in {folder}: {names}")
    return script
