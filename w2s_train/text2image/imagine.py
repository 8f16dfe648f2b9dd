"""One image per prompt and seed: the course of ``lightning imagine``."""

import importlib.metadata
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.guiders import BaseGuidance
from tqdm import tqdm

from w2s_train import __version__
from w2s_train.errors import INTERRUPTED, PREEMPTED, Stopped, UserError, distinct, require
from w2s_train.files import atomic_write, expanded
from w2s_train.generation import parse_seeds
from w2s_train.scores import git_commit
from w2s_train.signals import PREEMPTION, REQUESTS
from w2s_train.text2image.base import Guider
from w2s_train.text2image.described import described, settings_of
from w2s_train.text2image.device import computing_device
from w2s_train.text2image.distance import Distance
from w2s_train.text2image.folder import ModelFolder
from w2s_train.text2image.judge import Judge
from w2s_train.text2image.painter import Dtype, Offload, Painter, Settings, meta_network
from w2s_train.text2image.prompts import Prompt, read_prompts
from w2s_train.text2image.record import ImageRecord, Item
from w2s_train.text2image.sheet import contact_sheet, read_image

PIPELINE = "StableDiffusion3ModularPipeline"
ROWS, COLUMNS = 40, 8  # of the contact sheet, at most
PACKAGES = ("torch", "diffusers", "transformers")
SEEDS = 2**63  # what torch's generators take
LINES = 15.0  # seconds between two lines about progress, where there is no terminal


class Imagine:
    """Images of a text-to-image model, one per prompt and seed, which depends on these alone.

    What is there is not made again: a start that was stopped goes on, and prompts, seeds and scores
    can be added.

    Args:
        model: Folder of a Stable Diffusion 3 or 3.5, as diffusers saves it.
        prompts: File of prompts: .txt, one a line; .tsv, as PartiPrompts; or .jsonl.
        guidance: A guider of w2s_train.text2image or diffusers.guiders.
        seeds: FIRST:LAST, the last one not included.
        output: Folder of the images, with imagine.json and sheet.png.
        steps: Of the sampler.
        height: In pixels; what the model is made for if not given.
        width: The same.
        max_sequence_length: Tokens of the longest text encoder, T5.
        negative_prompt: What guidance goes away from, where it goes away from a prompt.
        dtype: bfloat16, float16 or float32, of all parts.
        device: Such as cuda:1; if not given, the GPU of this process, or the CPU.
        offload: What waits in host memory for its turn: model (whole parts), group (blocks), or
            sequential (single layers, slow); nothing if not given.
        scores: Judges of the images; only what is missing is scored.
        distances: Fréchet distances of all images together to a reference, and what else their
            features tell.

    Raises:
        UserError: A number out of its range, a missing file or folder, or one of something else.
    """

    def __init__(
        self,
        model: str,
        prompts: str,
        guidance: BaseGuidance,
        seeds: str = "0:4",
        output: str = "images",
        steps: int = 28,
        height: int | None = None,
        width: int | None = None,
        max_sequence_length: int = 256,
        negative_prompt: str = "",
        dtype: Dtype = "bfloat16",
        device: str | None = None,
        offload: Offload | None = None,
        scores: list[Judge] | None = None,
        distances: list[Distance] | None = None,
    ) -> None:
        self.seeds = parse_seeds(seeds)
        if negative_prompt is None:  # as diffusers takes it, and then guides nothing
            raise UserError('negative_prompt=null: must be given; "" will do')
        self.model = ModelFolder(model)
        self.prompts = read_prompts(prompts)
        self.settings = Settings(
            require("steps", steps, "[1, inf)"),
            self.model.size("height", height),
            self.model.size("width", width),
            require("max_sequence_length", max_sequence_length, "[1, 512]"),
            negative_prompt,
        )
        self.guidance, self.dtype, self.offload = guidance, dtype, offload
        self.device = None if device is None else computing_device(device)
        if offload is not None and offload != "group" and self._on(0).type == "cpu":
            raise UserError(f"offload={offload}: must be null where the device is the CPU")
        self.scores = scores or []
        distinct("scores", [judge.name for judge in self.scores])
        self.distances = distances or []
        if self.distances and len(self.prompts) * len(self.seeds) < 2:
            raise UserError(f"seeds={seeds}: must be two images or more for distances")
        self.record = ImageRecord(expanded("output", output))
        if (shift := getattr(guidance, "shift", self.model.shift)) != self.model.shift:
            raise UserError(
                f"guidance.shift={shift}: must be {self.model.shift}, as the model's scheduler has"
            )
        if self.seeds[-1] >= SEEDS:
            raise UserError(f"seeds={seeds}: must be below 2^63")
        if isinstance(guidance, Guider):
            guidance.check(meta_network(self.model))

    def __call__(self, rank: int = 0, world: int = 1, local: int = 0) -> None:
        """Make what is missing of this process's images, and score them.

        Args:
            rank: Of this process.
            world: Number of processes that were started.
            local: Rank among those on this machine, for its GPU.

        Raises:
            UserError: The folder has images of another protocol.
            Stopped: A signal asked for it; the image at hand was finished.
        """
        REQUESTS.listen(signal.SIGINT, *PREEMPTION)
        device = self._on(local)
        for distance in self.distances:
            distance.load(self.settings.height, self.settings.width)
        self.record.begin(self.protocol(device))
        items = [self._item(prompt, seed) for prompt in self.prompts for seed in self.seeds]
        mine = items[rank::world]
        there = self.record.entries()
        missing = [item for item in mine if (item.prompt, item.seed) not in there]
        if missing:
            self._paint(missing, len(mine), device, shown=rank == 0)
        there = self.record.entries()
        if all((item.prompt, item.seed) in there for item in items):
            self._sheet()
            for distance in self.distances:
                self._measure(distance, items, device)
        for judge in self.scores:
            self._judge(judge, mine)
        if rank == 0:
            before = len(mine) - len(missing)
            share = " by this process" if world > 1 else ""
            share += f"; {before:,} were there" if before else ""
            print(f"written: {len(missing):,} images to {self.record.folder}{share}")

    def protocol(self, device: torch.device) -> dict[str, Any]:
        """What all images depend on, as plain values.

        Args:
            device: Of this process.
        """
        versions = {name: importlib.metadata.version(name) for name in PACKAGES}
        return {
            "model": {"name": self.model.path.resolve().name, "sha256": self.model.digest},
            "pipeline": PIPELINE,
            "guidance": described(self.guidance),
            "guidance_settings": settings_of(self.guidance),
            **self.settings._asdict(),
            "dtype": self.dtype,
            "device": device.type,
            "versions": {"w2s_train": __version__} | versions,
            "git_commit": git_commit(),
        }

    def _on(self, local: int) -> torch.device:
        if self.device is not None:
            return self.device
        number = torch.cuda.device_count()
        return torch.device("cuda", local % number) if number else torch.device("cpu")

    def _paint(
        self, missing: Sequence[Item], total: int, device: torch.device, shown: bool
    ) -> None:
        painter = Painter(self.model, self.guidance, self.dtype, device, self.offload)
        done = total - len(missing)
        printed = began = time.monotonic()
        bar = tqdm(total=total, initial=done, unit="image", disable=None if shown else True)
        with bar, self.record.held():
            for number, item in enumerate(missing, 1):
                self._stop_if_asked(f"{done + number - 1} of {total} images are there")
                made = painter.paint(item.prompt, item.seed, self.settings)
                with atomic_write(self.record.folder / item.file) as file:
                    made.image.save(file, "png")
                seconds, took = round(made.seconds, 3), round(made.evaluations, 4)
                self.record.add(item, evaluations=took, seconds=seconds)
                bar.update()
                now = time.monotonic()
                if shown and not sys.stderr.isatty() and now - printed > LINES:
                    pace, printed = (now - began) / number, now
                    left = pace * (len(missing) - number)
                    line = f"{done + number} of {total} images, {pace:.1f} s each"
                    print(f"{line}, {left:.0f} s left", flush=True)

    def _judge(self, judge: Judge, items: Sequence[Item]) -> None:
        """What is missing of its scores."""
        self.record.judge(judge.name, judge.fingerprint)
        there = self.record.entries()
        keys = ((item, there[item.prompt, item.seed]) for item in items)
        missing = [item for item, entry in keys if judge.name not in entry["scores"]]
        with self.record.held():
            for item in missing:
                self._stop_if_asked(f"images are there, scores of {judge.name} are missing")
                image = read_image(self.record.folder / item.file)
                (value,) = judge.score([image], [item.prompt]).tolist()
                self.record.score(item, judge.name, value)

    def _measure(self, distance: Distance, items: Sequence[Item], device: torch.device) -> None:
        """What all images are together, unless the record has it; by whoever finishes last."""
        about = distance.about(items)
        if not self.record.has_distance(about):
            values = distance.of(self._files(items), self.record.folder, device)
            self.record.measure(values, about)

    def _files(self, items: Sequence[Item]) -> Iterator[Path]:
        for item in items:
            self._stop_if_asked("images are there, distances are missing")
            yield self.record.folder / item.file

    @staticmethod
    def _stop_if_asked(state: str) -> None:
        if REQUESTS.preempted or REQUESTS.interrupted:
            status = PREEMPTED if REQUESTS.preempted else INTERRUPTED
            raise Stopped(f"{state}; the same command goes on", status)

    def _sheet(self) -> None:
        """By whoever finishes last, of the first prompts and seeds."""
        folder = self.record.folder
        prompts, seeds = self.prompts[:ROWS], self.seeds[:COLUMNS]
        files = [folder / self._item(prompt, seed).file for prompt in prompts for seed in seeds]
        with atomic_write(folder / "sheet.png") as file:
            contact_sheet([prompt.text for prompt in prompts], seeds, files).save(file, "png")

    @staticmethod
    def _item(prompt: Prompt, seed: int) -> Item:
        return Item(prompt.text, prompt.category, seed)
