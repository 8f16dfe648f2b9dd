"""The training stream: the same samples for any processes and workers, from any position."""

import itertools
import os
import warnings
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import quick
from shard_files import number_image, numbers, overwrite, same, write_latents, write_numbers
from torch.utils.data import DataLoader

from w2s_train.datamodule import GenerationPlan, ShardDataModule
from w2s_train.running.samples import reseed
from w2s_train.shards import ShardWriter, expand_urls, write_index

COUNTS = [10, 7, 13, 10]
N = sum(COUNTS)


@pytest.fixture
def urls(tmp_path: Path) -> str:
    return write_numbers(tmp_path, COUNTS)


class Process:
    """As much of a trainer as the data module asks."""

    accumulate_grad_batches, ckpt_path = 1, None

    def __init__(self, rank: int = 0, world_size: int = 1, images_seen: int = 0) -> None:
        self.global_rank, self.world_size = rank, world_size
        self.lightning_module = SimpleNamespace(settings=[None], images_seen=images_seen)


def module(urls: str, process: Process | None = None, **changes) -> ShardDataModule:
    options = dict(num_classes=10, batch_size=5, num_workers=0, shuffle=16, num_generated=23)
    data = ShardDataModule(urls, **(options | dict(generation_batch_size=4) | changes))
    data.trainer = process or Process()
    return data


def take(urls: str, n: int, process: Process | None = None, **changes) -> list[dict]:
    loader = module(urls, process, **changes).train_dataloader()
    return list(itertools.islice(iter(loader), n))


def global_order(urls: str, world_size: int, batch_size: int, steps: int, **changes) -> list[int]:
    """Samples in the order of positions, from the batches of all ranks."""
    ranks = [
        take(urls, steps, Process(rank, world_size), batch_size=batch_size, **changes)
        for rank in range(world_size)
    ]
    return [n for step in zip(*ranks, strict=True) for batch in step for n in numbers(batch)]


RANKS = [(1, 0), (1, 3), (2, 0), (2, 2), (4, 1), (20, 0)]  # and worker processes of each


@pytest.mark.parametrize("in_memory", quick([False, True]))
@pytest.mark.parametrize("world_size, workers", RANKS)
def test_one_order_for_any_processes_and_workers(urls, world_size, workers, in_memory):
    """Faults rows 2 and 13: 4 shards on up to 20 ranks; the same global batches of 20 samples."""
    options = dict(num_workers=workers, in_memory=in_memory)
    found = global_order(urls, world_size, 20 // world_size, 6, **options)
    assert found == global_order(urls, 1, 20, 6)
    for epoch in range(3):
        assert sorted(found[epoch * N : (epoch + 1) * N]) == list(range(N))


@pytest.mark.parametrize("counts, ranks, workers", [([7, 8, 9], 2, 0), ([9], 2, 2), ([1], 4, 1)])
def test_few_shards(tmp_path: Path, counts: list[int], ranks: int, workers: int):
    """Faults row 13: 3 shards on 2 ranks, 1 shard on 2 ranks x 2 workers, 1 sample on 4 ranks."""
    pattern = write_numbers(tmp_path, counts)
    n = sum(counts)
    found = global_order(pattern, ranks, 3, 3 * n, num_workers=workers)
    assert Counter(found) == {number: 9 * ranks for number in range(n)}


@pytest.mark.parametrize("in_memory", quick([False, True]))
@pytest.mark.parametrize("workers", quick([0, 2, 3], 0, 3))
@pytest.mark.parametrize("start", quick([7, 1, 2, 20]))
def test_a_later_start_continues_the_stream(urls, workers: int, start: int, in_memory: bool):
    """Faults row 1: the next 8 batches after a resume are those of the uninterrupted run."""
    options = dict(flip=True, num_workers=workers, in_memory=in_memory)
    whole = take(urls, start + 8, **options)[start:]
    later = take(urls, 8, Process(images_seen=5 * start), **options)
    assert len(later) == 8
    assert all(same(one, other) for one, other in zip(whole, later, strict=True))


@pytest.mark.parametrize("before, after", [(1, 2), (4, 1), (2, 3)])
def test_another_number_of_ranks_loses_and_repeats_nothing(urls, before: int, after: int):
    """Faults row 2: stopped after 7 steps; the order goes on where it was."""
    seen = global_order(urls, before, 4, 7)
    rest = [
        take(urls, 8, Process(rank, after, images_seen=len(seen)), batch_size=3)
        for rank in range(after)
    ]
    seen += [n for step in zip(*rest, strict=True) for batch in step for n in numbers(batch)]
    whole = global_order(urls, 1, 1, len(seen))
    assert seen == whole


def test_resuming_reads_only_its_batches(tmp_path: Path, monkeypatch):
    """Any position is reached without reading what lies before it."""
    pattern = write_latents(tmp_path, [64] * 16, (4, 16, 16))
    read = Counter()
    for name in ("pread", "preadv"):
        real = getattr(os, name)

        def counted(file, what, offset, real=real, name=name):
            result = real(file, what, offset)
            read[name] += len(result) if name == "pread" else result
            return result

        monkeypatch.setattr(os, name, counted)
    position = 5 * 1024 + 700
    options = dict(in_memory=False, batch_size=16, shuffle=256)
    take(pattern, 1, Process(images_seen=position), **options)
    assert 0 < sum(read.values()) <= 16 * (128 + 2 * 4 * 16 * 16)


def test_a_virtual_epoch_goes_on(urls):
    """A loader that is read from again begins where the run stands, as after an epoch's end."""
    process = Process()
    loader = module(urls, process, num_workers=2).train_dataloader()
    whole = take(urls, 6)
    first = list(itertools.islice(iter(loader), 3))
    process.lightning_module.images_seen = 15
    second = list(itertools.islice(iter(loader), 3))
    assert all(same(a, b) for a, b in zip(whole, first + second, strict=True))


def test_flips_follow_the_position(urls):
    """Half of all samples, the same on any number of ranks, and new ones in every epoch."""
    batches = take(urls, 40, flip=True)
    columns = torch.cat([b["image"][:, 0, 0] for b in batches]).int()
    assert (columns[:, 0] > columns[:, 1]).float().mean() == pytest.approx(0.5, abs=0.15)
    plain = torch.cat([b["image"][:, 0, 0] for b in take(urls, 40)]).int()
    assert (plain[:, 0] < plain[:, 1]).all()
    two = [take(urls, 20, Process(rank, 2), flip=True) for rank in range(2)]
    joined = [batch for step in zip(*two, strict=True) for batch in step]
    assert all(same(a, b) for a, b in zip(batches, joined, strict=True))


# ---- faults ----------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", quick([2, 0]))
@pytest.mark.parametrize("in_memory", [True, False])
def test_bad_samples_are_replaced_and_named(tmp_path: Path, workers: int, in_memory: bool):
    """Faults row 11: full batches of readable samples; who reads them changes nothing."""
    pattern = write_numbers(tmp_path, COUNTS)
    for key in ("0003", "0021"):
        shard = tmp_path / ("train-000000.tar" if key == "0003" else "train-000002.tar")
        overwrite(shard, key, b"\0" * 1000)
    options = dict(num_workers=workers, in_memory=in_memory)
    batches = take(pattern, 16, **options)
    skipped = [entry for batch in batches for entry in batch["skipped"]]
    assert Counter((Path(each.shard).name, each.key) for each in skipped) == {
        ("train-000000.tar", "0003"): 2,
        ("train-000002.tar", "0021"): 2,
    }
    assert all("no image" in each.reason for each in skipped)
    assert Counter(each.epoch for each in skipped) == {0: 2, 1: 2}
    found = [n for batch in batches for n in numbers(batch)]
    assert len(found) == 80 and not {3, 21} & set(found)
    ranks = [take(pattern, 8, Process(rank, 2), **options) for rank in range(2)]
    assert found == [n for step in zip(*ranks, strict=True) for b in step for n in numbers(b)]


def test_a_missing_shard_within_the_allowance(tmp_path: Path, recwarn):
    """Faults row 11: a missing shard in the middle is said at the start, skipped and counted."""
    pattern = write_numbers(tmp_path, COUNTS)
    (tmp_path / "train-000001.tar").unlink()
    with pytest.raises(ValueError, match="max_skipped=0.1: 7 of 40 samples are missing in 1 of 4"):
        take(pattern, 1, max_skipped=0.1)
    batches = take(pattern, 8, max_skipped=0.2)
    assert any("1 of 4 shards are damaged" in str(w.message) for w in recwarn)
    assert sum(len(batch["skipped"]) for batch in batches) == 7
    assert not set(range(10, 17)) & {n for batch in batches for n in numbers(batch)}


def test_nothing_readable(tmp_path: Path):
    pattern = write_numbers(tmp_path, [3])
    for key in ("0000", "0001", "0002"):
        overwrite(tmp_path / "train-000000.tar", key, b"\0" * 1000)
    for in_memory in (True, False):
        with pytest.raises(ValueError, match="must hold .*readable sample"):
            take(pattern, 1, in_memory=in_memory, max_skipped=1.0)


def test_a_label_that_is_no_class(urls):
    """Faults row 12: before the first batch, on every rank alike."""
    with pytest.raises(ValueError, match=r"label=9: must be in \[0, 8\] \(sample 0009 of "):
        take(urls, 1, Process(1, 2), num_classes=9)


def test_a_cut_shard_of_which_nobody_knows_the_length(tmp_path: Path, recwarn):
    """Faults row 11: no share of it could be stated."""
    pattern = write_numbers(tmp_path, [30], index=False)
    path = tmp_path / "train-000000.tar"
    path.write_bytes(path.read_bytes()[:20_000])
    with pytest.raises(ValueError, match="max_skipped=0.5: must be 1 for damaged .* cut off after"):
        take(pattern, 1, max_skipped=0.5)
    take(pattern, 1, max_skipped=1.0)
    assert any("an unknown number of samples lost" in str(w.message) for w in recwarn)


@pytest.mark.parametrize("prefix", ["./", "", "sub/../"])
def test_every_shard_once(tmp_path: Path, monkeypatch, prefix: str):
    """However its path is spelled, and however many patterns name it."""
    write_numbers(tmp_path, COUNTS)
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path)
    for pattern in ("train-*.tar", "{train-*.tar,train-000000.tar}", "train-{000000..000003}.tar"):
        found = expand_urls(prefix + pattern)
        assert sorted(Path(url).name for url in found) == [f"train-00000{i}.tar" for i in range(4)]


@pytest.mark.parametrize("pattern", ["none.tar", "none-*.tar", "none-{0..3}.tar", "."])
def test_an_empty_list(tmp_path: Path, pattern: str):
    """Faults row 13."""
    with pytest.raises(ValueError, match="train_urls=.*: must name existing files"):
        module(str(tmp_path / pattern))


def test_shards_without_samples(tmp_path: Path):
    with pytest.raises(ValueError, match="must hold samples, there are none"):
        take(write_numbers(tmp_path, [0, 0]), 1)


def test_first_draws_differ_between_all_ranks():
    """Faults row 15: the main processes draw the noise, from seeds that differ; workers none."""
    draws = []
    for rank in range(8):
        reseed(42, rank, 0, torch.device("cpu"))
        draws.append(torch.randn(4))
    assert len({tuple(draw.tolist()) for draw in draws}) == 8


def test_first_samples_differ_between_all_ranks_and_workers(tmp_path: Path):
    """Faults row 15: samples and coin flips of (rank, worker) pairs come from one order."""
    pattern = write_latents(tmp_path, [64] * 4, (1, 4, 4))
    options = dict(num_workers=2, flip=True, in_memory=False)
    batches = [take(pattern, 2, Process(rank, 2), **options) for rank in range(2)]
    first = [b["image"][:, 0, 0, 0].abs().tolist() for rank in batches for b in rank]
    assert len({row for rows in first for row in rows}) == 20  # four batches of 5, none twice
    flips = [tuple((b["image"][:, 0, 0, 0] < 0).tolist()) for rank in batches for b in rank]
    assert len(set(flips)) > 1


def test_small_sets_are_held_in_memory(urls):
    found = [
        module(urls, in_memory=given).train_dataloader().dataset.in_memory
        for given in (None, True, False)
    ]
    assert found == [True, True, False]


def test_other_data_than_the_checkpoints(urls, recwarn):
    """A position in another order: said, and gone on with."""
    data = module(urls)
    data.train_dataloader()
    state = data.state_dict()

    def warned(**changes) -> bool:
        recwarn.clear()
        warnings.simplefilter("always")
        other = module(urls, **changes)
        other.load_state_dict(state)
        other.train_dataloader()
        return any("are not those of the checkpoint" in str(w.message) for w in recwarn)

    assert not warned()
    assert warned(shuffle=3)
    assert warned(seed=1)
    path = Path(urls).parent / "train-000000.tar"
    with ShardWriter(path) as writer:  # as many samples under the same name
        for number in range(10):
            writer.write(f"{number}", 0, png=number_image(number))
    write_index(path.parent)
    assert warned()


# ---- generation plans ------------------------------------------------------------------------


def test_plan_covers_classes_evenly():
    items = [GenerationPlan(range(95), range(10))[i] for i in range(95)]
    assert [item["seed"] for item in items] == list(range(95))
    counts = Counter(item["label"] for item in items)
    assert set(counts) == set(range(10))
    assert max(counts.values()) - min(counts.values()) <= 1


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_every_seed_exactly_once(urls, world_size: int):
    """Faults row 17: nothing padded, nothing twice, on any number of ranks."""
    seeds = []
    for rank in range(world_size):
        data = module(urls, Process(rank, world_size), sampling_seeds=2)
        for loader in data.val_dataloader():
            assert isinstance(loader, DataLoader)
            seeds += [s for batch in loader for s in batch["seed"].tolist()]
    assert sorted(seeds) == list(range(46))


@pytest.mark.parametrize(
    "bad",
    [
        dict(batch_size=0),
        dict(num_workers=-1),
        dict(num_generated=0),
        dict(prepare="../cli"),
        dict(max_skipped=1.5),
        dict(max_skipped=float("nan")),
        dict(cache_gigabytes=0.0),
        dict(seed=-1),
        dict(train_urls=""),
        dict(train_urls="train-{0..3.tar"),
    ],
)
def test_bad_arguments(urls, bad: dict):
    with pytest.raises(ValueError, match=f"{next(iter(bad))}="):
        module(**({"urls": urls} | {k.replace("train_", ""): v for k, v in bad.items()}))
