"""Shards: tables, indices, stores, and what becomes of damage."""

import hashlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset as wds
from PIL import Image
from shard_files import add, npy, number_image, overwrite, png, write_latents, write_numbers

from w2s_train.errors import UserError
from w2s_train.shards import ShardWriter, Storage, expand_urls, is_written, write_index
from w2s_train.shards.index import check_labels, find_shards
from w2s_train.shards.order import Places
from w2s_train.shards.samples import to_float
from w2s_train.shards.store import IndexedStore, MemoryStore
from w2s_train.shards.table import ShardTable
from w2s_train.shards.writer import table_path


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(tmp_path / "cache")


def store(pattern: str, storage: Storage, *, flip: bool = False) -> IndexedStore:
    return IndexedStore(find_shards(expand_urls(pattern), storage), storage, flip=flip)


def read(source, rows, mirrored=False):
    rows = np.array(rows)
    return source.read(Places(rows, np.broadcast_to(mirrored, rows.shape)))


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
    source = store(write_numbers(tmp_path, [5, 1, 7], index=index), storage)
    rows = read(source, [12, 0, 5, 4, 6, 6])
    assert rows.image[:, 0, 0, 0].tolist() == [12, 0, 5, 4, 6, 6]
    assert rows.image.dtype == torch.uint8
    assert rows.label.tolist() == [2, 0, 5, 4, 6, 6]
    assert rows.bad == {}
    assert source.name(5) == (str(tmp_path / "train-000001.tar"), "0005")


def test_mirrored_images_and_latents(tmp_path: Path, storage: Storage):
    """Pixels are mirrored; of latents, the stored mirrored ones are taken."""
    images = store(write_numbers(tmp_path / "a", [5]), storage, flip=True)
    latents = store(write_latents(tmp_path / "b", [5], (1, 2, 2)), storage, flip=True)
    turn = np.array([False, True, True])
    for source in (images, MemoryStore(images, 5, flip=True)):
        assert read(source, [1, 2, 3], turn).image[:, 0, 0, 0].tolist() == [1, 253, 252]
    for source in (latents, MemoryStore(latents, 5, flip=True)):
        assert read(source, [1, 2, 3], turn).image[:, 0, 0, 0].tolist() == [1, -2, -3]
    plain = store(write_latents(tmp_path / "c", [5], (1, 2, 2), flip=False), storage, flip=True)
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
        rows = read(store(str(tmp_path / "*.tar"), storage), range(4))
        assert all("byte" in reason for reason in rows.bad.values())
        return
    image = read(store(str(tmp_path / "*.tar"), storage), [3, 1]).image
    assert np.array_equal(image.numpy(), np.stack([arrays[3], arrays[1]]))


def test_bfloat16_is_stored_as_its_bits(tmp_path: Path, storage: Storage):
    values = torch.randn(3, 2, 4).bfloat16()
    with ShardWriter(tmp_path / "train-000000.tar") as writer:
        for i, value in enumerate(values):
            writer.write(f"{i}", 0, **{"bf16.npy": npy(value.view(torch.uint16).numpy())})
    image = read(store(str(tmp_path / "*.tar"), storage), [0, 1, 2]).image
    assert torch.equal(image, values)


def test_pixels_become_floats_between_minus_one_and_one():
    pixels = torch.tensor([0, 127, 128, 255], dtype=torch.uint8)
    assert to_float(pixels).tolist() == pytest.approx([-1, -1 / 255, 1 / 255, 1], abs=1e-6)
    assert to_float(torch.tensor([2.5]).half()).dtype == torch.float32


def test_memory_equals_disk(tmp_path: Path, storage: Storage):
    """Including what cannot be read."""
    pattern = write_numbers(tmp_path, [20, 30])
    overwrite(tmp_path / "train-000001.tar", "0033", b"no image at all")
    disk = store(pattern, storage, flip=True)
    memory = MemoryStore(disk, 50, flip=True)
    rng = np.random.default_rng(0)
    for _ in range(5):
        rows, turn = rng.integers(50, size=16), rng.random(16) < 0.5
        one, other = read(disk, rows, turn), read(memory, rows, turn)
        good = [i for i in range(16) if i not in one.bad]
        assert torch.equal(one.image[good], other.image[good])
        assert torch.equal(one.label, other.label)
        assert one.bad == other.bad
    assert memory.name(33) == (str(tmp_path / "train-000001.tar"), "0033")


def test_many_shards_in_one_batch(tmp_path: Path, storage: Storage, monkeypatch):
    """More than are kept open, again and again."""
    monkeypatch.setattr("w2s_train.shards.store.OPEN_SHARDS", 3)
    source = store(write_numbers(tmp_path, [1] * 20), storage)
    for _ in range(3):
        assert read(source, range(20)).image[:, 0, 0, 0].tolist() == list(range(20))
        assert len(source._opened) <= 20


# ---- faults ----------------------------------------------------------------------------------


def test_a_cut_shard_is_known_before_it_is_read(tmp_path: Path, storage: Storage):
    """Faults row 11: an indexed shard that was cut says how many samples that costs."""
    pattern = write_numbers(tmp_path, [10, 10])
    path = tmp_path / "train-000001.tar"
    table = ShardTable.load(table_path(path))
    path.write_bytes(path.read_bytes()[: int(table.offsets[7, 0]) + 3])
    shards = find_shards(expand_urls(pattern), storage)
    assert [shard.lost for shard in shards] == [0, 3]
    assert "cut off at" in shards[1].damage
    rows = read(IndexedStore(shards, storage, flip=False), range(20))
    assert sorted(rows.bad) == [17, 18, 19]
    assert rows.image[:17, 0, 0, 0].tolist() == list(range(17))


@pytest.mark.parametrize("cut", ["member", "header", "between"])
def test_a_cut_shard_without_an_index(tmp_path: Path, storage: Storage, cut: str):
    """Faults row 11: what is whole is used, and the damage is named."""
    pattern = write_numbers(tmp_path, [10], index=False)
    path = tmp_path / "train-000000.tar"
    place = {"member": 3, "header": -512 + 100, "between": -512}[cut]
    end = int(ShardTable.scan(path).offsets[7, 0]) + place
    path.write_bytes(path.read_bytes()[:end])
    [shard] = find_shards(expand_urls(pattern), storage)
    assert shard.samples == 7
    assert "cut off after 0007" in shard.damage
    rows = read(IndexedStore([shard], storage, flip=False), range(7))
    assert rows.bad == {} and rows.image[:, 0, 0, 0].tolist() == list(range(7))


def test_a_broken_header_in_the_middle(tmp_path: Path, storage: Storage):
    """Tarfile ends there without a word; the scan does not."""
    pattern = write_numbers(tmp_path, [10], index=False)
    path = tmp_path / "train-000000.tar"
    start = int(ShardTable.scan(path).offsets[4, 0]) - 512
    content = bytearray(path.read_bytes())
    content[start : start + 512] = b"\x07" * 512
    path.write_bytes(content)
    [shard] = find_shards(expand_urls(pattern), storage)
    assert shard.samples == 4
    assert f"unreadable at byte {start:,}, after 0004.cls" in shard.damage


def test_a_missing_shard_of_an_index(tmp_path: Path, storage: Storage):
    """Faults row 11: a glob still finds it, and all of its samples are lost."""
    pattern = write_numbers(tmp_path, [5, 5, 5])
    (tmp_path / "train-000001.tar").unlink()
    for urls in (pattern, str(tmp_path / "train-{000000..000002}.tar")):
        shards = find_shards(expand_urls(urls), storage)
        assert [(shard.samples, shard.lost) for shard in shards] == [(5, 0), (5, 5), (5, 0)]
    rows = read(IndexedStore(shards, storage, flip=False), [4, 5, 9, 10])
    assert sorted(rows.bad) == [1, 2]
    assert "FileNotFoundError" in rows.bad[1]


def test_a_corrupt_image_names_itself(tmp_path: Path, storage: Storage):
    """Faults row 11: for every kind of damage."""
    with ShardWriter(tmp_path / "train-000000.tar") as writer:
        whole = png(np.random.default_rng(0).integers(256, size=(64, 64)).astype(np.uint8))
        kinds = [whole, b"", b"text", whole[:500], whole[:30] + b"\0" * 900 + whole[930:]]
        for i, content in enumerate(kinds):
            writer.write(f"{i}", 0, png=content)
    rows = read(store(str(tmp_path / "*.tar"), storage), range(5))
    assert sorted(rows.bad) == [1, 2, 3, 4]
    assert all(rows.bad.values())


def test_pickled_arrays_are_refused(tmp_path: Path, storage: Storage):
    """Faults row 19: an object array is not unpickled."""
    stream = io.BytesIO()
    np.save(stream, np.array([{"a": 1}]), allow_pickle=True)
    with ShardWriter(tmp_path / "train-000000.tar") as writer:
        writer.write("a", 0, npy=stream.getvalue())
    assert "pickle" in read(store(str(tmp_path / "*.tar"), storage), [0]).bad[0]


@pytest.mark.parametrize("label", [10, 999, -1])
def test_labels_outside_the_classes(tmp_path: Path, storage: Storage, label: int):
    """Faults row 12: the message names value, range, key and shard, before anything is read."""
    with ShardWriter(tmp_path / "train-000000.tar") as writer:
        writer.write("fine", 0, png=number_image(0))
        writer.write("sample7", label, png=number_image(1))
    shards = find_shards(expand_urls(str(tmp_path / "*.tar")), storage)
    expected = rf"label={label}: must be in \[0, 9\] \(sample sample7 of .*train-000000.tar"
    with pytest.raises(UserError, match=expected):
        check_labels(shards, 10, storage)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.cls", b"cat", "label=cat: must be a whole number .sample a of .*bad.tar"),
        ("a.txt", b"1", "label: sample a of .*bad.tar must have one"),
    ],
)
def test_labels_that_are_none(tmp_path: Path, storage: Storage, name: str, content: bytes, message):
    with tarfile.open(tmp_path / "bad.tar", "w") as tar:
        add(tar, "a.png", number_image(0))
        add(tar, name, content)
    with pytest.raises(UserError, match=message):
        find_shards([str(tmp_path / "bad.tar")], storage)


@pytest.mark.parametrize("content", [b"", b"x" * 2000])
def test_files_that_are_no_shards(tmp_path: Path, storage: Storage, content: bytes):
    (tmp_path / "bad.tar").write_bytes(content)
    with pytest.raises(UserError, match="bad.tar: must be an uncompressed tar"):
        find_shards([str(tmp_path / "bad.tar")], storage)


def test_other_shapes_are_named(tmp_path: Path, storage: Storage):
    with ShardWriter(tmp_path / "train-000000.tar") as writer:
        writer.write("small", 0, png=number_image(0))
        writer.write("large", 0, png=png(np.zeros((3, 3), np.uint8)))
    with pytest.raises(UserError, match="small of .* large of "):
        read(store(str(tmp_path / "*.tar"), storage), [0, 1])


def test_mixed_and_empty_shards(tmp_path: Path, storage: Storage):
    """PNG beside JPEG, and a shard all of whose images were left out."""
    stream = io.BytesIO()
    Image.fromarray(np.full((2, 2), 80, np.uint8)).save(stream, "jpeg")
    with ShardWriter(tmp_path / "train-000000.tar") as writer:
        writer.write("a", 1, png=number_image(7))
        writer.write("b", 2, jpg=stream.getvalue())
    with ShardWriter(tmp_path / "train-000001.tar"):
        pass
    write_index(tmp_path)
    for listed in (True, False):
        if not listed:
            (tmp_path / "index.json").unlink()
        rows = read(store(str(tmp_path / "*.tar"), storage), [0, 1])
        assert rows.bad == {} and rows.label.tolist() == [1, 2]
        assert rows.image[:, 0, 0, 0].tolist() == [7, 80]


def test_shards_without_data(tmp_path: Path, storage: Storage):
    with ShardWriter(tmp_path / "train-000000.tar") as writer:
        writer.write("a", 0, txt=b"words")
    with pytest.raises(UserError, match="must hold one of .* it holds txt"):
        read(store(str(tmp_path / "*.tar"), storage), [0])


def test_an_index_of_other_shards(tmp_path: Path, storage: Storage):
    pattern = write_numbers(tmp_path, [5])
    path = tmp_path / "train-000000.tar"
    path.write_bytes(path.read_bytes() + b"\0" * 10240)
    with pytest.raises(UserError, match="must have .* bytes, as index.json beside it says"):
        find_shards(expand_urls(pattern), storage)
    (tmp_path / "index.json").write_text("{}")
    with pytest.raises(UserError, match="index.json: must be the index of a folder of shards"):
        find_shards(expand_urls(pattern), storage)
