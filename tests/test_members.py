"""What is a sample in a tar: several tars in one file, what Macs leave, keys with dots, labels."""

import gzip
import io
import json
import tarfile
import warnings
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from shard_files import add, files, number_image, read, write_numbers

from w2s_train.errors import UserError
from w2s_train.shards import ShardWriter, Storage, expand_urls, write_index
from w2s_train.shards.format import ShardTable
from w2s_train.shards.index import find_shards
from w2s_train.shards.members import parse_label, shown_label
from w2s_train.shards.samples import encoded_image, read_shard


def tar(names: Iterable[str], prefix: str = "") -> bytes:
    """Members with an image, the number of the member or, for labels, "1"."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as opened:
        for i, name in enumerate(names):
            label = name.endswith(".cls")
            add(opened, prefix + name, b"1" if label else number_image(i % 128))
    return file.getvalue()


def pairs(first: int, last: int) -> list[str]:
    return [f"{i:05d}.{kind}" for i in range(first, last) for kind in ("png", "cls")]


def keys(path: Path) -> list[str]:
    """By all ways of reading, which agree."""
    table = ShardTable.scan(path)
    assert table.damage == ""
    found = [sample["__key__"] for sample in read_shard(path)]
    assert table.keys.tolist() == found
    return found


# ---- several tars in one file


@pytest.mark.parametrize("between", [0, 512, 10240, 3 << 20])
@pytest.mark.parametrize("packed", [False, True])
def test_two_tars_in_one_file(tmp_path: Path, storage: Storage, between: int, packed: bool):
    """``cat a.tar b.tar``: 375 of 375 samples; tarfile alone reads the first 188."""
    content = tar(pairs(0, 188)) + b"\0" * between + tar(pairs(188, 375))
    path = tmp_path / ("a.tar.gz" if packed else "a.tar")
    path.write_bytes(gzip.compress(content, 1) if packed else content)
    found = list(read_shard(path))
    assert [sample["__key__"] for sample in found] == [f"{i:05d}" for i in range(375)]
    assert found[374]["png"] == number_image((374 - 188) * 2 % 128)
    [shard] = find_shards([str(path)], storage)
    assert (shard.samples, shard.damage) == (375, "")
    rows = read(files(str(path), storage), [0, 187, 188, 374])
    assert not rows.bad
    assert rows.image[:, 0, 0, 0].tolist() == [0, 374 % 128, 0, 372 % 128]


def test_packed_tars_one_after_another(tmp_path: Path, storage: Storage):
    """``cat a.tar.gz b.tar.gz``, and three of them."""
    path = tmp_path / "a.tar.gz"
    parts = [tar(pairs(10 * i, 10 * i + 10)) for i in range(3)]
    path.write_bytes(b"".join(map(gzip.compress, parts)))
    assert len(list(read_shard(path))) == 30
    assert find_shards([str(path)], storage)[0].samples == 30


def test_what_follows_is_no_tar(tmp_path: Path, storage: Storage):
    """Or a tar that is cut: damage, and no silence."""
    for rest, reason in (
        (b"x" * 2000, "unreadable at byte 10,240, after 00001.cls"),
        (b"x" * 100, "cut off after 00001.cls"),
        (tar(pairs(2, 9))[:3000], "cut off after"),
    ):
        path = tmp_path / "a.tar"
        path.write_bytes(tar(pairs(0, 2)) + rest)
        with pytest.raises(UserError, match=f"shard={path}: must be a whole tar .{reason}"):
            next(read_shard(path))
        table = ShardTable.scan(path)
        assert table.damage.startswith(reason) and len(table) >= 2


@pytest.mark.parametrize("zeros", [0, 512, 1 << 21, 700])
def test_zeros_at_the_end_are_fine(tmp_path: Path, zeros: int):
    path = tmp_path / "a.tar"
    path.write_bytes(tar(pairs(0, 2)) + b"\0" * zeros)
    assert keys(path) == ["00000", "00001"]


def test_a_key_in_both_tars(tmp_path: Path):
    path = tmp_path / "a.tar"
    path.write_bytes(tar(pairs(0, 2)) * 2)
    with pytest.raises(UserError, match="holds two members 00000.png"):
        ShardTable.scan(path)


# ---- what is no sample

LEFT = (
    ".DS_Store", "._00000.png", "._00000.cls", "x/.DS_Store", "x/._00000.png", "x/._00000.cls",
    "__MACOSX/x/._00000.png", "__MACOSX/00000.png", "Thumbs.db", "x/desktop.ini", "README.md",
    "x/LICENSE", "classes.txt", "dataset_info.json", ".AppleDouble/x.png", "x/.y.png",
)  # fmt: skip


@pytest.mark.parametrize("prefix", ["", "./", "train/", "./a.b/"])
def test_what_file_managers_leave(tmp_path: Path, storage: Storage, prefix: str):
    """A tar from a Mac has the samples that it had elsewhere."""
    path = tmp_path / "a.tar"
    path.write_bytes(tar([*LEFT, *pairs(0, 3), "z/._00001.png", "z/.DS_Store"], prefix))
    assert keys(path) == [f"{prefix}{i:05d}" for i in range(3)]
    rows = read(files(str(path), storage), range(3))
    assert not rows.bad and rows.label.tolist() == [1, 1, 1]


def test_a_mac_folder_with_samples_only_by_name(tmp_path: Path):
    path = tmp_path / "a.tar"
    path.write_bytes(tar(["README.md", "list.txt"]))
    with pytest.raises(UserError, match="must hold samples, such as KEY.png .* README.md and the"):
        ShardTable.scan(path)


# ---- keys with dots


@pytest.mark.parametrize(
    "names, expected",
    [
        ("a.1.png a.1.cls a.2.png a.2.cls", {"a.1": "png cls", "a.2": "png cls"}),
        ("v1.0.x.PNG v1.0.x.cls", {"v1.0.x": "png cls"}),
        ("d.e/a.1.png d.e/a.1.cls", {"d.e/a.1": "png cls"}),
        ("a.png a.mask.png a.cls", {"a": "png mask.png cls"}),
        ("a.npy a.flip.npy a.cls", {"a": "npy flip.npy cls"}),
        ("a.1.bf16.npy a.1.flip.bf16.npy a.1.cls", {"a.1": "bf16.npy flip.bf16.npy cls"}),
        ("1.png 1.cls 1.5.png 1.5.cls", {"1": "png cls", "1.5": "png cls"}),
        ("a.1.png a.1.mask.png a.1.txt a.1.cls", {"a.1": "png mask.png txt cls"}),
    ],
)
def test_keys_with_dots(tmp_path: Path, names: str, expected: dict[str, str]):
    path = tmp_path / "a.tar"
    path.write_bytes(tar(names.split()))
    assert keys(path) == list(expected)
    found = {s["__key__"]: " ".join(set(s) - {"__key__"}).split() for s in read_shard(path)}
    assert {k: sorted(v) for k, v in found.items()} == {
        k: sorted(v.split()) for k, v in expected.items()
    }


def test_keys_with_dots_are_written_again(tmp_path: Path, storage: Storage):
    with ShardWriter(tmp_path / "a.tar") as writer:
        for i in range(3):
            writer.write(f"a.{i}", i, png=number_image(i))
    write_index(tmp_path)
    assert keys(tmp_path / "a.tar") == ["a.0", "a.1", "a.2"]
    rows = read(files(str(tmp_path / "a.tar"), storage), range(3))
    assert rows.label.tolist() == [0, 1, 2] and not rows.bad


# ---- labels


@pytest.mark.parametrize(
    "content, label",
    [
        (b"3", 3), (b"3\n", 3), (b"\xef\xbb\xbf3", 3), (b"\xef\xbb\xbf 3\r\n", 3), (b"\t3\0", 3),
        ("3\n".encode("utf-16"), 3), ("\N{NO-BREAK SPACE}3\u200b".encode(), 3), (b"+3", 3),
        (b"007", 7), (b"-1", -1), (b"true", 1), (b"False\n", 0), (b"\xef\xbb\xbfTRUE", 1),
    ],
)  # fmt: skip
def test_labels(content: bytes, label: int):
    assert parse_label(content) == label


@pytest.mark.parametrize("content", [b"", b"cat", b"1.5", b"1_0", b"1 2", b"\xff", b"yes"])
def test_no_labels(content: bytes, tmp_path: Path):
    with pytest.raises(ValueError):
        parse_label(content)
    sample = {"__key__": "a", "png": b"", "cls": content}
    with pytest.raises(UserError, match="label=.*: must be a whole number, in a.cls of x.tar"):
        encoded_image(sample, Path("x.tar"))
    assert shown_label(content).isprintable()


def test_a_byte_order_mark_in_a_shard(tmp_path: Path, storage: Storage):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as opened:
        for i in range(3):
            add(opened, f"{i}.png", number_image(i))
            add(opened, f"{i}.cls", f"\ufeff{i}\r\n".encode())
    assert read(files(str(path), storage), range(3)).label.tolist() == [0, 1, 2]


# ---- indices


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[1, 2]",
        "no json",
        '{"weight_map": {}}',
        json.dumps({"version": 2, "shards": [{"basename": "shard.00000.mds", "samples": 3}]}),
        json.dumps({"__kind__": "wids-shard-index-v1", "shardlist": [{"url": "a", "nsamples": 1}]}),
    ],
)
def test_other_programs_indices(tmp_path: Path, storage: Storage, text: str):
    """Are ignored with a word."""
    pattern = write_numbers(tmp_path, [5])
    (tmp_path / "index.json").write_text(text)
    with pytest.warns(UserWarning, match="index=.*index.json: ignored, it is another program's"):
        shards = find_shards(expand_urls(pattern), storage)
    assert [shard.samples for shard in shards] == [5]


def test_an_index_that_is_no_text(tmp_path: Path, storage: Storage):
    pattern = write_numbers(tmp_path, [5])
    (tmp_path / "index.json").write_bytes(b"\xff\xfe\xff" * 9)
    with pytest.warns(UserWarning, match="another program's"):
        assert find_shards(expand_urls(pattern), storage)[0].samples == 5


def test_our_own_index_that_is_broken(tmp_path: Path, storage: Storage):
    pattern = write_numbers(tmp_path, [5])
    path = tmp_path / "index.json"
    whole = path.read_text()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for text in (whole[:-20], whole[:60], whole.replace("samples", "sample")):
            path.write_text(text)
            with pytest.raises(UserError, match=f"index={path}: must be the index .* is broken"):
                find_shards(expand_urls(pattern), storage)


# ---- no labels


def test_shards_without_labels(tmp_path: Path, storage: Storage):
    """Only where the user says so; a scan of one kind is not taken for the other."""
    path = tmp_path / "a.tar"
    path.write_bytes(tar(["0.png", "0.txt", "1.png", "a.1.png", "a.2.png", ".DS_Store"]))
    for _ in range(2):
        [shard] = find_shards([str(path)], storage, unlabelled=True)
        assert (shard.samples, shard.labels) == (4, (0, 0))
        with pytest.raises(UserError, match="sample 0 of .* must have one.* data.unlabelled=true"):
            find_shards([str(path)], storage)
    labelled = write_numbers(tmp_path / "b", [5, 9])
    for index in (True, False):
        shards = find_shards(expand_urls(labelled), storage, unlabelled=True)
        from w2s_train.shards import ShardFiles

        rows = read(ShardFiles(shards, storage), range(14))
        assert rows.label.tolist() == [0] * 14
        assert np.array_equal(rows.image[:, 0, 0, 0], range(14))
        if index:
            (tmp_path / "b/index.json").unlink()
