"""Samples per second of the training stream, beside a plain webdataset pipeline and a memory map.

    python benchmarks/data.py --samples 20000 --shape 4 32 32 --json OUT.json

Latents (float16) of the given shape are written to shards of 1,000 under --folder, and read back in
shuffled batches by

    w2s_train    the stream of `ShardDataModule`, reading at places of the shards' tables
    webdataset   WebDataset(shards).shuffle().decode().to_tuple("npy", "cls").batched(), as its
                 documentation builds it: tar members decoded one by one
    memory map   rows of one .npy file, mapped: a bound, which has no shards, labels or faults

one after another, round after round, in one process and one thread; ratios are taken within a
round. Files stay in the page cache, so this measures processor time and not the disk; samples per
second are per core. --workers measures the stream once more through a `DataLoader` with so many
worker processes, up to tensors on the device (the GPU if there is one).
"""

import argparse
import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset as wds
from common import about
from torch import Tensor
from torch.utils.data import DataLoader

from w2s_train.shards import (
    ShardBatches,
    ShardFiles,
    ShardWriter,
    Storage,
    expand_urls,
    write_index,
)
from w2s_train.shards.index import find_shards
from w2s_train.shards.order import Positions, StreamOrder

PER_SHARD, WINDOW = 1000, 10_000
Batches = Iterator[tuple[Tensor, Tensor]]


def write(folder: Path, samples: int, shape: tuple[int, ...]) -> None:
    """The same latents as shards and as one array."""
    rng = np.random.default_rng(0)
    array = np.lib.format.open_memmap(
        folder / "all.npy", mode="w+", dtype=np.float16, shape=(samples, *shape)
    )
    for first in range(0, samples, PER_SHARD):
        rows = range(first, min(first + PER_SHARD, samples))
        with ShardWriter(folder / f"train-{first // PER_SHARD:06d}.tar") as writer:
            for row in rows:
                array[row] = rng.standard_normal(shape).astype(np.float16)
                content = io.BytesIO()
                np.save(content, array[row])
                writer.write(f"{row:08d}", row % 1000, npy=content.getvalue())
    array.flush()
    write_index(folder)


def stream(folder: Path, batch_size: int, **options: Any) -> DataLoader:
    """Ours."""
    storage = Storage(folder / "cache")
    shards = find_shards(expand_urls(str(folder / "train-*.tar")), storage)
    order = StreamOrder([shard.samples for shard in shards], seed=0, window=WINDOW)
    batches = ShardBatches(ShardFiles(shards, storage), order)
    positions = Positions(lambda: 0, batch_size, rank=0, world_size=1)
    return DataLoader(batches, batch_size=None, sampler=positions, **options)


def ours(folder: Path, batch_size: int) -> Batches:
    """Batches of the stream."""
    for batch in stream(folder, batch_size):
        yield batch["image"], batch["label"]


def plain(folder: Path, batch_size: int) -> Batches:
    """Batches of webdataset."""
    urls = sorted(str(path) for path in folder.glob("*.tar"))
    pipeline = wds.WebDataset(urls, shardshuffle=len(urls), seed=0).shuffle(1000).decode()
    batches = pipeline.to_tuple("npy", "cls").batched(batch_size)
    for image, label in batches.repeat():
        yield torch.as_tensor(np.asarray(image)), torch.as_tensor(np.asarray(label))


def mapped(folder: Path, batch_size: int) -> Batches:
    """Batches of rows of a memory map."""
    array = np.load(folder / "all.npy", mmap_mode="r")
    rng = np.random.default_rng(0)
    while True:
        order = rng.permutation(len(array))
        for first in range(0, len(order) - batch_size + 1, batch_size):
            rows = order[first : first + batch_size]
            yield torch.from_numpy(array[rows]), torch.from_numpy(rows % 1000)


CONTESTANTS: dict[str, Callable[[Path, int], Batches]] = {
    "w2s_train": ours,
    "webdataset": plain,
    "memory map": mapped,
}


def rate(batches: Batches, samples: int) -> float:
    """Samples per second over about so many samples."""
    first, _ = next(batches)
    count, began = 0, time.perf_counter()
    while count < samples:
        image, label = next(batches)
        assert image.shape[1:] == first.shape[1:] and len(label) == len(image)
        count += len(image)
    return count / (time.perf_counter() - began)


def to_device(folder: Path, batch_size: int, workers: int, samples: int) -> float:
    """Samples per second through worker processes, up to tensors on the device."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pinned = device.type == "cuda"
    loader = stream(folder, batch_size, num_workers=workers, pin_memory=pinned)

    def batches() -> Batches:
        for batch in loader:
            label = batch["label"].to(device, non_blocking=True)
            yield batch["image"].to(device, non_blocking=True), label

    found = batches()
    for _ in range(4 * workers):  # until every worker has started
        next(found)
    return rate(found, samples)


def measure(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """All rounds."""
    rates: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
    for i in range(args.rounds):
        print(f"round {i + 1} of {args.rounds}", flush=True)
        for name, contestant in CONTESTANTS.items():
            rates[name].append(rate(contestant(folder, args.batch_size), args.samples))
    ratios = [a / b for a, b in zip(rates["w2s_train"], rates["webdataset"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {
        "samples_per_second": {name: statistics.median(each) for name, each in rates.items()},
        "ratio_to_webdataset": middle,
        "ratio_quartiles": [low, high],
        "with_workers": {
            str(workers): to_device(folder, args.batch_size, workers, 4 * args.samples)
            for workers in args.workers
        },
    }


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--shape", type=int, nargs="+", default=[4, 32, 32])
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--workers", type=int, nargs="*", default=[], help="such as 1 4")
    parser.add_argument("--folder", type=Path, help="for the shards; a temporary one if not given")
    parser.add_argument("--json", type=Path, help="where to write the results")
    args = parser.parse_args()
    for name, least in (("samples", args.batch_size), ("batch_size", 1), ("rounds", 3)):
        if getattr(args, name) < least:
            raise SystemExit(f"error: {name}={getattr(args, name)}: must be at least {least}")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        write(Path(folder), args.samples, tuple(args.shape))
        result = measure(Path(folder), args)
    result |= about()
    result |= {name: getattr(args, name) for name in ("samples", "shape", "batch_size", "rounds")}
    low, high = result["ratio_quartiles"]
    for name, found in result["samples_per_second"].items():
        print(f"{name:12} {found:12,.0f} samples/s per core")
    print(f"ratio to webdataset {result['ratio_to_webdataset']:.1f} ({low:.1f} to {high:.1f})")
    for workers, found in result["with_workers"].items():
        print(f"{workers:>3} workers  {found:12,.0f} samples/s on the device")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
