"""Shards: tables, indices, reading, and what becomes of damage."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset as wds
from shard_files import files, npy, number_image, overwrite, read, write_latents, write_numbers

from w2s_train.errors import UserError
from w2s_train.shards import ShardWriter, Storage, is_written
from w2s_train.shards.dataset import Decoded
from w2s_train.shards.format import ShardTable, table_path
from w2s_train.shards.samples import to_float


def test_webdataset_reads_what_is_written(tmp_path: Path):
    """The shards are webdataset's, and the table says where its fields lie."""
    write_latents(tmp_path, [3], (2, 2))
    path = tmp_path / "train-000000.tar"
    table = ShardTable.load(table_path(path))
    content = path.read_bytes()
    samples = list(wds.WebDataset(str(path), shardshuffle=False))
    assert [s["__key__"] for s in samples] == table.keys.tolist()
    assert [int(s["cls"]) for s in samples] == table.labels.tolist()
    for row, sample in enumerate(samples):
        for column, field in enumerate(table.fields):
            first, size = table.offsets[row, column], table.sizes[row, column]
            assert content[first : first + size] == sample[field]


def test_the_index_states_samples_bytes_and_hash(tmp_path: Path):
    write_numbers(tmp_path, [3, 4])
    shards = json.loads((tmp_path / "index.json").read_text())["shards"]
    for name, entry in shards.items():
        content = (tmp_path / name).read_bytes()
        assert entry["bytes"] == len(content)
        assert entry["sha256"] == hashlib.sha256(content).hexdigest()
    assert [entry["samples"] for entry in shards.values()] == [3, 4]
    assert [entry["labels"] for entry in shards.values()] == [[0, 2], [3, 6]]


def test_an_interrupted_shard_is_not_written(tmp_path: Path):
    path = tmp_path / "train-000000.tar"
    with pytest.raises(KeyboardInterrupt), ShardWriter(path) as writer:
        writer.write("a", 0, png=number_image(0))
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    assert not is_written(path)
    with ShardWriter(path) as writer:
        writer.write("a", 0, png=number_image(0))
    assert is_written(path)
    path.write_bytes(path.read_bytes()[:-512])
    assert not is_written(path)


@pytest.mark.parametrize("index", [True, False])
def test_rows_are_read_at_their_places(tmp_path: Path, storage: Storage, index: bool):
    """With an index or without: other people's shards are scanned."""
    source = files(write_numbers(tmp_path, [5, 1, 7], index=index), storage)
    rows = read(source, [12, 0, 5, 4, 6, 6])
    assert rows.image[:, 0, 0, 0].tolist() == [12, 0, 5, 4, 6, 6]
    assert rows.image.dtype == torch.uint8
    assert rows.label.tolist() == [2, 0, 5, 4, 6, 6]
    assert rows.bad == {}
    assert source.name(5) == (str(tmp_path / "train-000001.tar"), "0005")


def test_mirrored_images_and_latents(tmp_path: Path, storage: Storage):
    """Pixels are mirrored; of latents, the stored mirrored ones are taken."""
    images = files(write_numbers(tmp_path / "a", [5]), storage, flip=True)
    latents = files(write_latents(tmp_path / "b", [5], (1, 2, 2)), storage, flip=True)
    turn = np.array([False, True, True])
    for source in (images, Decoded(images)):
        assert read(source, [1, 2, 3], turn).image[:, 0, 0, 0].tolist() == [1, 253, 252]
    for source in (latents, Decoded(latents)):
        assert read(source, [1, 2, 3], turn).image[:, 0, 0, 0].tolist() == [1, -2, -3]
    plain = files(write_latents(tmp_path / "c", [5], (1, 2, 2), flip=False), storage, flip=True)
    with pytest.raises(UserError, match="flip=True: must be False for .*train-000000.tar"):
        read(plain, [0])


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.uint8, ">f4"])
def test_arrays_keep_type_and_values(tmp_path: Path, storage: Storage, dtype):
    rng = np.random.default_rng(0)
    arrays = [(rng.random((3, 5)) * 200).astype(dtype) for _ in range(4)]
    with ShardWriter(tmp_path / "train-000000.tar") as writer:
        for i, array in enumerate(arrays):
            writer.write(f"{i}", 0, npy=npy(array))
    if dtype == ">f4":
        rows = read(files(str(tmp_path / "*.tar"), storage), range(4))
        assert all("byte" in reason for reason in rows.bad.values())
        return
    image = read(files(str(tmp_path / "*.tar"), storage), [3, 1]).image
    assert np.array_equal(image.numpy(), np.stack([arrays[3], arrays[1]]))


def test_bfloat16_is_stored_as_its_bits(tmp_path: Path, storage: Storage):
    values = torch.randn(3, 2, 4).bfloat16()
    with ShardWriter(tmp_path / "train-000000.tar") as writer:
        for i, value in enumerate(values):
            writer.write(f"{i}", 0, **{"bf16.npy": npy(value.view(torch.uint16).numpy())})
    image = read(files(str(tmp_path / "*.tar"), storage), [0, 1, 2]).image
    assert torch.equal(image, values)


def test_pixels_become_floats_between_minus_one_and_one():
    pixels = torch.tensor([0, 127, 128, 255], dtype=torch.uint8)
    assert to_float(pixels).tolist() == pytest.approx([-1, -1 / 255, 1 / 255, 1], abs=1e-6)
    assert to_float(torch.tensor([2.5]).half()).dtype == torch.float32


def test_memory_equals_disk(tmp_path: Path, storage: Storage):
    """Including what cannot be read."""
    pattern = write_numbers(tmp_path, [20, 30])
    overwrite(tmp_path / "train-000001.tar", "0033", b"no image at all")
    disk = files(pattern, storage, flip=True)
    memory = Decoded(disk)
    rng = np.random.default_rng(0)
    for _ in range(5):
        rows, turn = rng.integers(50, size=16), rng.random(16) < 0.5
        one, other = read(disk, rows, turn), read(memory, rows, turn)
        good = [i for i in range(16) if i not in one.bad]
        assert torch.equal(one.image[good], other.image[good])
        assert torch.equal(one.label, other.label)
        assert one.bad == other.bad
    assert disk.name(33) == (str(tmp_path / "train-000001.tar"), "0033")


def test_many_shards_in_one_batch(tmp_path: Path, storage: Storage, monkeypatch):
    """More than are kept open, again and again."""
    monkeypatch.setattr("w2s_train.shards.dataset.OPEN_SHARDS", 3)
    source = files(write_numbers(tmp_path, [1] * 20), storage)
    for _ in range(3):
        assert read(source, range(20)).image[:, 0, 0, 0].tolist() == list(range(20))
        assert len(source._files) == 20
        read(source, [0])
        assert len(source._files) <= 4
