"""The training stream: every sample once an epoch, exact positions, clear errors."""

import io
import itertools
import tarfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from w2s_train.datamodule import GenerationPlan, ShardDataModule
from w2s_train.stream import ShardStream, decode, expand_urls, read_shard

SHARDS, ROWS = 4, 10


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def png(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "png")
    return stream.getvalue()


@pytest.fixture
def urls(tmp_path: Path) -> list[str]:
    """40 grey 2x2 images whose grey value is their number."""
    for shard in range(SHARDS):
        with tarfile.open(tmp_path / f"train-{shard:02d}.tar", "w") as tar:
            for row in range(ROWS):
                number = shard * ROWS + row
                add(tar, f"{number:04d}.png", png(np.full((2, 2), number, np.uint8)))
                add(tar, f"{number:04d}.cls", b"%d" % (number % 10))
    return expand_urls(str(tmp_path / "train-{00..03}.tar"))


def stream(urls: list[str], **changes) -> ShardStream:
    options = dict(num_classes=10, batch_size=5, seed=0, rank=0, world_size=1, start=0)
    options |= dict(shuffle=8, flip=False, in_memory=False)
    return ShardStream(urls, **(options | changes))


def numbers(batch: dict) -> list[int]:
    values = ((batch["image"][:, 0, 0, 0] + 1) * 127.5).round().int().tolist()
    assert [v % 10 for v in values] == batch["label"].tolist()
    return values


def take(source, n: int) -> list[list[int]]:
    return [numbers(batch) for batch in itertools.islice(iter(source), n)]


def test_every_sample_once_an_epoch_in_new_orders(urls):
    batches = take(stream(urls), 16)
    first, second = sum(batches[:8], []), sum(batches[8:], [])
    assert sorted(first) == sorted(second) == list(range(40))
    assert first != second
    assert first != list(range(40))
    assert take(stream(urls), 16) == batches
    assert take(stream(urls, in_memory=True), 16) == batches
    assert take(stream(urls, seed=1), 16) != batches


def test_slots_share_nothing(urls):
    """2 ranks x 2 workers of 4 shards: together one epoch, each its own samples."""
    loaders = [
        DataLoader(stream(urls, rank=rank, world_size=2), batch_size=None, num_workers=2)
        for rank in range(2)
    ]
    shares = [sum(take(loader, 4), []) for loader in loaders]
    assert sorted(sum(shares, [])) == list(range(40))


@pytest.mark.parametrize("workers", [0, 2, 3])
@pytest.mark.parametrize("start", [1, 2, 7, 20])
def test_a_later_start_continues_the_stream(urls, workers: int, start: int):
    """Faults row 1: the next 8 batches after a resume are those of the uninterrupted run."""
    options = dict(flip=True, shuffle=6)
    loader = DataLoader(stream(urls, **options), batch_size=None, num_workers=workers)
    whole = [b["image"] for b in itertools.islice(iter(loader), start + 8)]
    later = DataLoader(stream(urls, **options, start=start), batch_size=None, num_workers=workers)
    for one, other in zip(whole[start:], iter(later), strict=False):
        assert torch.equal(one, other["image"])


def test_flips(urls, tmp_path: Path):
    pixels = np.array([[0, 255]], np.uint8)
    with tarfile.open(tmp_path / "flip.tar", "w") as tar:
        add(tar, "a.png", png(pixels))
        add(tar, "a.cls", b"0")
    source = stream([str(tmp_path / "flip.tar")], flip=True, batch_size=2000)
    images = next(iter(source))["image"][:, 0, 0]
    mirrored = (images[:, 0] == 1).float().mean().item()
    assert mirrored == pytest.approx(0.5, abs=0.05)
    plain = next(iter(stream([str(tmp_path / "flip.tar")], batch_size=50)))["image"][:, 0, 0]
    assert (plain == torch.tensor([-1.0, 1.0])).all()


def test_colour_and_arrays(tmp_path: Path):
    colour = np.zeros((2, 3, 3), np.uint8)
    colour[..., 1] = 255
    array = io.BytesIO()
    np.save(array, np.arange(4, dtype=np.float16).reshape(1, 2, 2))
    with tarfile.open(tmp_path / "mixed.tar", "w") as tar:
        add(tar, "a.png", png(colour))
        add(tar, "a.cls", b"1")
        add(tar, "b.npy", array.getvalue())
        add(tar, "b.cls", b"2")
    first, second = (decode(s, 10) for s in read_shard(str(tmp_path / "mixed.tar")))
    assert first["image"].shape == (3, 2, 3)
    assert first["image"].mean((1, 2)).tolist() == [-1, 1, -1]
    assert second["image"].flatten().tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("label", [b"10", b"-1"])
def test_labels_outside_the_classes(tmp_path: Path, label: bytes):
    """Faults row 12: the message names value, range, key and shard."""
    with tarfile.open(tmp_path / "bad.tar", "w") as tar:
        add(tar, "sample7.png", png(np.zeros((2, 2), np.uint8)))
        add(tar, "sample7.cls", label)
    expected = rf"label={int(label)}: must be in \[0, 9\] \(sample sample7 of .*bad.tar\)"
    with pytest.raises(ValueError, match=expected):
        next(iter(stream([str(tmp_path / "bad.tar")])))


def test_pickled_arrays_are_refused(tmp_path: Path):
    """Faults row 19: an object array is not unpickled."""
    array = io.BytesIO()
    np.save(array, np.array([{"a": 1}]), allow_pickle=True)
    with tarfile.open(tmp_path / "evil.tar", "w") as tar:
        add(tar, "a.npy", array.getvalue())
        add(tar, "a.cls", b"0")
    with pytest.raises(ValueError, match="pickle"):
        next(iter(stream([str(tmp_path / "evil.tar")])))


def test_missing_shards(tmp_path: Path):
    for pattern in ("none.tar", "none-*.tar", "none-{0..3}.tar"):
        with pytest.raises(ValueError, match="must name existing files"):
            expand_urls(str(tmp_path / pattern))


def test_plan_covers_classes_evenly():
    items = [GenerationPlan(range(95), range(10))[i] for i in range(95)]
    assert [item["seed"] for item in items] == list(range(95))
    counts = Counter(item["label"] for item in items)
    assert set(counts) == set(range(10))
    assert max(counts.values()) - min(counts.values()) <= 1


class Process:
    """As much of a trainer as the data module asks."""

    global_step, accumulate_grad_batches = 0, 1

    def __init__(self, rank: int, world_size: int) -> None:
        self.global_rank, self.world_size = rank, world_size
        self.lightning_module = SimpleNamespace(settings=[None])


def module(urls: list[str], **changes) -> ShardDataModule:
    pattern = str(Path(urls[0]).parent / "*.tar")
    options = dict(num_classes=10, batch_size=5, num_workers=0, num_generated=23)
    return ShardDataModule(pattern, **(options | dict(generation_batch_size=4) | changes))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_every_seed_exactly_once(urls, world_size: int):
    """Faults row 17: nothing padded, nothing twice, on any number of ranks."""
    seeds = []
    for rank in range(world_size):
        data = module(urls, sampling_seeds=2)
        data.trainer = Process(rank, world_size)
        for loader in data.val_dataloader():
            seeds += [s for batch in loader for s in batch["seed"].tolist()]
    assert sorted(seeds) == list(range(46))


def test_too_few_shards(urls):
    data = module(urls)
    data.trainer = Process(0, 5)
    with pytest.raises(ValueError, match="4 shards are too few for 5 processes x 1 workers"):
        data.train_dataloader()


@pytest.mark.parametrize(
    "bad",
    [dict(batch_size=0), dict(num_workers=-1), dict(num_generated=0), dict(prepare="../cli")],
)
def test_bad_arguments(urls, bad: dict):
    with pytest.raises(ValueError, match=f"{next(iter(bad))}="):
        module(urls, **bad)
