"""What becomes of damaged shards: rows 11, 12 and 19 of the faults that we survive."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from shard_files import (
    add,
    files,
    number_image,
    overwrite,
    png,
    read,
    write_latents,
    write_numbers,
)

from w2s_train.errors import UserError
from w2s_train.shards import ShardFiles, ShardWriter, Storage, expand_urls, write_index
from w2s_train.shards.dataset import Decoded
from w2s_train.shards.format import ShardTable, table_path
from w2s_train.shards.index import check_labels, find_shards


def test_a_cut_shard_is_known_before_it_is_read(tmp_path: Path, storage: Storage):
    """Faults row 11: an indexed shard that was cut says how many samples that costs."""
    pattern = write_numbers(tmp_path, [10, 10])
    path = tmp_path / "train-000001.tar"
    table = ShardTable.load(table_path(path))
    path.write_bytes(path.read_bytes()[: int(table.offsets[7, 0]) + 3])
    shards = find_shards(expand_urls(pattern), storage)
    assert [shard.lost for shard in shards] == [0, 3]
    assert "cut off at" in shards[1].damage
    rows = read(ShardFiles(shards, storage), range(20))
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
    rows = read(ShardFiles([shard], storage), range(7))
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
    rows = read(ShardFiles(shards, storage), [4, 5, 9, 10])
    assert sorted(rows.bad) == [1, 2]
    assert "FileNotFoundError" in rows.bad[1]


def test_a_corrupt_image_names_itself(tmp_path: Path, storage: Storage):
    """Faults row 11: for every kind of damage."""
    with ShardWriter(tmp_path / "train-000000.tar") as writer:
        whole = png(np.random.default_rng(0).integers(256, size=(64, 64)).astype(np.uint8))
        kinds = [whole, b"", b"text", whole[:500], whole[:30] + b"\0" * 900 + whole[930:]]
        for i, content in enumerate(kinds):
            writer.write(f"{i}", 0, png=content)
    rows = read(files(str(tmp_path / "*.tar"), storage), range(5))
    assert sorted(rows.bad) == [1, 2, 3, 4]
    assert all(rows.bad.values())


def test_pickled_arrays_are_refused(tmp_path: Path, storage: Storage):
    """Faults row 19: an object array is not unpickled."""
    stream = io.BytesIO()
    np.save(stream, np.array([{"a": 1}]), allow_pickle=True)
    with ShardWriter(tmp_path / "train-000000.tar") as writer:
        writer.write("a", 0, npy=stream.getvalue())
    assert "pickle" in read(files(str(tmp_path / "*.tar"), storage), [0]).bad[0]


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
        read(files(str(tmp_path / "*.tar"), storage), [0, 1])


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
        rows = read(files(str(tmp_path / "*.tar"), storage), [0, 1])
        assert rows.bad == {} and rows.label.tolist() == [1, 2]
        assert rows.image[:, 0, 0, 0].tolist() == [7, 80]


def test_shards_without_data(tmp_path: Path, storage: Storage):
    with ShardWriter(tmp_path / "train-000000.tar") as writer:
        writer.write("a", 0, txt=b"words")
    with pytest.raises(UserError, match="must hold one of .* it holds txt"):
        read(files(str(tmp_path / "*.tar"), storage), [0])


def test_an_index_of_other_shards(tmp_path: Path, storage: Storage):
    pattern = write_numbers(tmp_path, [5])
    path = tmp_path / "train-000000.tar"
    path.write_bytes(path.read_bytes() + b"\0" * 10240)
    with pytest.raises(UserError, match="must have .* bytes, as index.json beside it says"):
        find_shards(expand_urls(pattern), storage)
    (tmp_path / "index.json").write_text('{"version": 1, "shards": {"train-000000.tar": {}}}')
    with pytest.raises(UserError, match="index.json: must be the index of a folder of shards"):
        find_shards(expand_urls(pattern), storage)


def test_a_damaged_mirrored_array(tmp_path: Path, storage: Storage):
    """It is bad when it is due, from the disk and from memory, and only then."""
    pattern = write_latents(tmp_path, [6], (1, 2, 2))
    overwrite(tmp_path / "train-000000.tar", "000003", b"\0" * 200)  # the first field: flip.npy
    disk = files(pattern, storage, flip=True)
    turn = np.array([False, True, True])
    for source in (disk, Decoded(disk)):
        assert sorted(read(source, [3, 3, 4], turn).bad) == [1]


def test_a_broken_table_is_scanned_anew(tmp_path: Path, storage: Storage):
    """The shard itself says what it holds, also where a table is another shard's."""
    pattern = write_numbers(tmp_path, [5, 5])
    first, second = (table_path(tmp_path / f"train-00000{i}.tar") for i in range(2))
    for content in (b"", b"PK", first.read_bytes()):
        second.write_bytes(content)
        rows = read(files(pattern, storage), [7])
        assert rows.bad == {} and rows.label.tolist() == [7]


def test_a_shard_that_comes_back(tmp_path: Path, storage: Storage, monkeypatch):
    """A failure is remembered for a while, and no longer."""
    pattern = write_numbers(tmp_path, [5])
    path = tmp_path / "train-000000.tar"
    path.rename(tmp_path / "away")
    source = files(pattern, storage)
    assert read(source, [1]).bad
    (tmp_path / "away").rename(path)
    assert read(source, [1]).bad
    monkeypatch.setattr("w2s_train.shards.dataset.RETRY_SECONDS", 0.0)
    assert read(source, [1]).bad == {}


def test_the_machine_is_not_the_data(tmp_path: Path, storage: Storage, monkeypatch):
    """Too many open files are no damaged samples."""
    source = files(write_numbers(tmp_path, [5]), storage)

    def full(path, flags):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr("os.open", full)
    with pytest.raises(UserError, match="Too many open files"):
        read(source, [1])
