r"""Encode shards of images with a diffusers autoencoder, once, before training on its latents.

    python data/encode_latents.py "data/imagenet256/train-*.tar" \
        --autoencoder stabilityai/sd-vae-ft-mse --output data/imagenet256_latents

Needs ``pip install -e ".[latents]"``. Each shard becomes one of the same name, keys and labels,
with the moments of the posterior, mean and log-variance (2C, h, w), of each image (``.npy``) and of
its mirror image (``.flip.npy``), or with latents (C, h, w) where there is no posterior; with
``--dtype bfloat16`` their bits (``.bf16.npy`` and ``.flip.bf16.npy``). Training samples the
posterior anew each time. With ``--align`` the tokens (N, F) of an encoder come along
(``.tokens.npy``, ``.flip.tokens.npy``): docs/align.md. Beside them:

    latents.json  what made them, and mean and std of the latents per channel
    index.json    samples, bytes and sha256 of each shard
    classes.txt   copied where the images have one

All GPUs encode, one process each; without one the CPU does, with ``--processes``. Neither changes
the result. A killed command goes on where it stopped when it is given again. For many nodes, give
each its ``--part``, such as ``--part $SLURM_ARRAY_TASK_ID/8`` in an array 1-8: the one that ends
last writes the statistics and the index, and so does the command without ``--part``.
"""

import argparse
import contextlib
import functools
import re
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from w2s_train.errors import UserError
from w2s_train.prepare.engine import LOCKS, Task, here, locked, on_devices, remove_partials
from w2s_train.prepare.latents import (
    FIELDS,
    PRECISIONS,
    Encoder,
    Settings,
    Summary,
    begin,
    complete,
    first_size,
    is_encoded,
    recipe_of,
)
from w2s_train.shards import local_shards, write_index
from w2s_train.shards.format import CLASSES, ShardTable, table_path

SECONDS = 60  # more than writing the files that describe the whole takes


def arguments() -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(
        description="Encode shards of images with a diffusers AutoencoderKL or AutoencoderDC.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("source", metavar="SHARDS", help="path, glob or brace pattern of the images' shards")
    add(
        "--autoencoder",
        required=True,
        metavar="PATH",
        help="local folder, or OWNER/NAME of the hub",
    )
    add("--output", required=True, type=Path, metavar="FOLDER", help="of the latents' shards")
    add("--dtype", choices=list(FIELDS), default="float16", help="of the stored moments")
    add("--no-flip", action="store_true", help="no second latent, of the mirrored image")
    add("--batch-size", type=int, default=32, help="images at a time; decides about the last bits")
    add("--precision", choices=PRECISIONS, default="float32", help="of the computation")
    add("--devices", default="auto", metavar="auto|cpu|N", help="all GPUs if any, the CPU, N GPUs")
    add("--processes", type=int, default=1, metavar="N", help="on the CPU, one thread each")
    add("--part", default="1/1", metavar="I/N", help="every N-th shard from the I-th, of 1 ... N")
    broken = "of a shard's images that may be undecodable and left out; 0: latents are complete"
    add("--max-broken", type=float, default=0.0, metavar="SHARE", help=broken)
    add("--revision", help="branch, tag or commit on the hub")
    model = "store tokens for REPA, too: a classifier's .safetensors, or a DINOv2 of timm"
    add("--align", metavar="MODEL", help=model)
    add("--align-weights", metavar="PATH", help="of timm's model; its own, from the hub")
    given = parser.parse_args()
    for name in ("batch_size", "processes"):
        if (value := getattr(given, name)) < 1:
            raise UserError(f"{name}={value}: must be at least 1")
    if given.align_weights and not given.align:
        raise UserError(f"align_weights={given.align_weights}: must come with --align MODEL")
    if not 0 <= given.max_broken < 1:
        raise UserError(f"max_broken={given.max_broken}: must be in [0, 1)")
    return given


def device_names(devices: str, processes: int) -> list[str]:
    """Of every process, the device that it encodes on.

    Raises:
        UserError: GPUs that are not there, or several processes for one.
    """
    visible = torch.cuda.device_count()
    if not re.fullmatch(r"auto|cpu|[1-9]\d*", devices):
        raise UserError(f"devices={devices}: must be auto, cpu or a number of GPUs")
    if devices == "cpu" or (devices == "auto" and not visible):
        return ["cpu"] * processes
    number = visible if devices == "auto" else int(devices)
    if number > visible:
        raise UserError(f"devices={devices}: must be at most {visible}, the GPUs that are visible")
    if processes > 1:
        raise UserError(f"processes={processes}: must be 1 on GPUs; --devices cpu takes more")
    return [f"cuda:{i}" for i in range(number)]


def all_tasks(source: str, output: Path) -> list[Task]:
    """Every shard of the source, and what it becomes.

    Raises:
        UserError: There are none, or two would become one.
    """
    shards = local_shards(source, "source")
    targets = [output / f"{shard.name.partition('.')[0]}.tar" for shard in shards]
    seen: dict[Path, Path] = {}
    for shard, target in zip(shards, targets, strict=True):
        if target in seen:
            raise UserError(f"source={source}: must have different names; {seen[target]}, {shard}")
        if target.resolve() == shard.resolve():
            raise UserError(f"output={output}: must not be the folder of the images")
        seen[target] = shard
    return [Task(shard, target, shared=True) for target, shard in seen.items()]


def part_of(tasks: list[Task], part: str) -> list[Task]:
    """The tasks of part "I/N".

    Raises:
        UserError: Not of this form.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", part)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise UserError(f"part={part}: must be I/N with I in 1 ... N, such as 1/8")
    return tasks[int(match[1]) - 1 :: int(match[2])]


def count_images(tasks: list[Task]) -> int | None:
    """Images in the sources, if the tables beside all of them say so."""
    tables = [table_path(task.source) for task in tasks]
    if not all(table.is_file() for table in tables):
        return None
    return sum(len(ShardTable.load(table)) for table in tables)


def encode(encoder: Encoder, devices: list[str], tasks: list[Task]) -> None:
    """Encode what is not written yet, under a progress bar."""
    todo = [task for task in tasks if not is_encoded(task)]
    print(f"{len(tasks) - len(todo)} of {len(tasks)} shards are written already", flush=True)
    seconds_between = 0.5 if sys.stderr.isatty() else 30  # a log keeps every line
    encoder_on = functools.partial(Encoder, encoder.settings)
    one = len(devices) == 1
    with (
        here(encoder, todo) if one else on_devices(encoder_on, devices, todo) as written,
        tqdm(total=count_images(todo), unit=" images", mininterval=seconds_between) as bar,
    ):
        began, images = time.monotonic(), 0
        for progress in written:
            images += progress.images
            bar.update(progress.images)
    seconds = time.monotonic() - began
    print(f"encoded {len(todo)} shards, {images} images, {images / seconds:.4g} images/s")


@contextlib.contextmanager
def claim_summary(folder: Path) -> Iterator[None]:
    """Keep other parts from writing the files beside the shards; wait for one that does."""
    with locked(folder, "summary", f"{LOCKS}/summary.lock", SECONDS) as alone:
        if alone:
            remove_partials(folder, "*.json")
        yield


def finish(output: Path, tasks: list[Task], recipe: dict[str, Any]) -> None:
    """Write what describes the whole, if it is whole."""
    missing = [task.target.name for task in tasks if not is_encoded(task)]
    if missing:
        print(f"{len(missing)} of {len(tasks)} shards are missing, such as {missing[0]}: another "
              "part, or this command without --part, ends with the statistics")  # fmt: skip
        return
    summary = complete(output, [task.target for task in tasks], recipe)
    classes = tasks[0].source.with_name(CLASSES)
    if classes.is_file():
        shutil.copyfile(classes, output / classes.name)
    write_index(output)  # last: its presence means done
    report(output, len(tasks), recipe, summary)


def report(output: Path, shards: int, recipe: dict[str, Any], summary: Summary) -> None:
    """Print the summary of a complete folder."""
    shape = "x".join(map(str, recipe["latent_shape"]))
    flips = ", each also mirrored" if recipe["flip"] else ""
    print(
        f"{output}: {shards} shards, {summary.images} images{flips}, latents {shape} in "
        f"{recipe['dtype']}, {summary.bytes:,} bytes"
    )
    if summary.broken:
        print(f"left out: {summary.broken} images that cannot be decoded")
    for name, values in (("mean", summary.mean), ("std", summary.std)):
        print(f"{name} per channel:", " ".join(f"{value:.5g}" for value in values))
    print(f"std of all channels: {summary.std_of_all:.5g}, 1/std {1 / summary.std_of_all:.5g}")


def main() -> None:
    """Check, encode, describe."""
    given = arguments()
    tasks = all_tasks(given.source, given.output)
    mine = part_of(tasks, given.part)
    devices = device_names(given.devices, given.processes)[: max(1, len(mine))]
    settings = Settings(
        given.autoencoder,
        given.revision,
        given.dtype,
        not given.no_flip,
        given.precision,
        given.batch_size,
        given.max_broken,
        first_size([task.source for task in tasks], given.max_broken),
        given.align,
        given.align_weights,
    )
    # One device is used here. Processes of several load the autoencoder themselves: this one only
    # names it.
    encoder = Encoder(settings, devices[0] if len(devices) == 1 else "cpu")
    recipe = recipe_of(settings, encoder.facts, given.source, [task.source for task in tasks])
    given.output.mkdir(parents=True, exist_ok=True)
    with claim_summary(given.output):
        begin(given.output, recipe)
    encode(encoder, devices, mine)
    with claim_summary(given.output):
        finish(given.output, tasks, recipe)


if __name__ == "__main__":
    try:
        main()
    except (UserError, OSError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    except KeyboardInterrupt:
        print("stopped; the same command goes on with the shards that are missing", file=sys.stderr)
        sys.exit(130)
