"""What data/prepare.py reads besides folders: torchvision, Hugging Face, webdataset shards."""

import io
import json
import pickle
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import shared
from image_folders import encode, noise, pixels, preparer, samples, write_tar
from PIL import Image

from w2s_train.errors import UserError
from w2s_train.prepare.images import center_crop
from w2s_train.shards.samples import read_shard


@pytest.fixture
def prepare(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    return preparer(monkeypatch, capsys)


# ---- torchvision


def write_mnist(root: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """MNIST's four files, with few images."""
    raw, content = root / "MNIST" / "raw", {}
    raw.mkdir(parents=True)
    for name, split, n in (("train", "train", 30), ("t10k", "test", 12)):
        images, labels = noise(n, 28, 28, seed=n), np.arange(n, dtype=np.uint8) % 10
        header = struct.pack(">IIII", 0x803, n, 28, 28)
        (raw / f"{name}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        header = struct.pack(">II", 0x801, n)
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(header + labels.tobytes())
        content[split] = images, labels
    return content


@pytest.mark.parametrize("split", ["train", "test"])
def test_mnist(prepare, tmp_path: Path, split: str):
    images, labels = write_mnist(tmp_path / "root")[split]
    out = tmp_path / "out"
    options = ("--split", split, "--per-shard", 20, "--output", out)
    prepare("torchvision", "MNIST", "--root", tmp_path / "root", *options)
    found = samples(out, split)
    assert sorted((pixels(s["png"]).tobytes(), int(s["cls"])) for s in found) == sorted(
        (image.tobytes(), int(label)) for image, label in zip(images, labels, strict=True)
    )
    assert (out / "classes.txt").read_text().startswith("0 - zero\n1 - one\n")


@pytest.mark.parametrize("name", ["CIFAR10", "CIFAR100"])
def test_cifar(prepare, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch):
    """Its own files, with few images; their checksums are others."""
    import torchvision

    kind = getattr(torchvision.datasets, name)
    key, names = (
        ("labels", "label_names") if name == "CIFAR10" else ("fine_labels", "fine_label_names")
    )
    folder = tmp_path / "root" / kind.base_folder
    folder.mkdir(parents=True)
    content = {}
    for i, (file, _) in enumerate([*kind.train_list, *kind.test_list]):
        images, labels = noise(4, 3072, seed=i), [0, 1, 2, 3]
        (folder / file).write_bytes(pickle.dumps({"data": images, key: labels}))
        content[file] = images.reshape(4, 3, 32, 32).transpose(0, 2, 3, 1)
    (folder / kind.meta["filename"]).write_bytes(pickle.dumps({names: ["a", "b", "c", "d"]}))
    for part in ("train_list", "test_list"):
        monkeypatch.setattr(kind, part, [[file, None] for file, _ in getattr(kind, part)])
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": None})
    for split, part in (("train", kind.train_list), ("test", kind.test_list)):
        options = ("--root", tmp_path / "root", "--split", split, "--output", tmp_path / "out")
        prepare("torchvision", name, *options)
        expected = [(x.tobytes(), i) for file, _ in part for i, x in enumerate(content[file])]
        found = [
            (pixels(s["png"]).tobytes(), int(s["cls"])) for s in samples(tmp_path / "out", split)
        ]
        assert sorted(found) == sorted(expected)
    assert (tmp_path / "out/classes.txt").read_text() == "a\nb\nc\nd\n"
    assert len(json.loads((tmp_path / "out/index.json").read_text())["shards"]) == 2


def test_imagenet(prepare, tmp_path: Path):
    root, out = tmp_path / "root", tmp_path / "out"
    names = {"n01": ("tench", "Tinca tinca"), "n02": ("goldfish",)}
    for wnid in names:
        (root / "val" / wnid).mkdir(parents=True)
        for i in range(3):
            jpeg = encode(noise(90, 70 + 30 * i, *[3] * (i == 0)), "jpeg")  # most are grey
            (root / "val" / wnid / f"ILSVRC2012_{i}.JPEG").write_bytes(jpeg)
    torch.save((names, []), root / "meta.bin")
    options = ("--root", root, "--split", "val", "--size", 32, "--output", out)
    prepare("torchvision", "ImageNet", *options)
    assert (out / "classes.txt").read_text() == "tench, Tinca tinca\ngoldfish\n"
    found = samples(out, "val")
    assert sorted(s["cls"] for s in found) == [b"0"] * 3 + [b"1"] * 3
    assert {pixels(s["png"]).shape for s in found} == {(32, 32, 3)}


# ---- Hugging Face


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A data set of ten PNGs in three classes, and an empty cache."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    features = datasets.Features(
        pic=datasets.Image(),
        kind=datasets.ClassLabel(names=["x", "y", "z"]),
        note=datasets.Value("string"),
    )
    content = [encode(noise(9, 9, 3, seed=i)) for i in range(10)]
    columns = {
        "pic": [{"bytes": png, "path": None} for png in content],
        "kind": [i % 3 for i in range(10)],
        "note": ["-"] * 10,
    }
    return datasets.Dataset.from_dict(columns, features=features)


def pairs(folder: Path, split: str = "train") -> list[tuple[bytes, int]]:
    return sorted((s["png"], int(s["cls"])) for s in samples(folder, split))


@pytest.mark.slow
def test_huggingface(prepare, rows, tmp_path: Path):
    """Parquet, folders of it and both forms of save_to_disk give the same shards."""
    from datasets import DatasetDict

    (tmp_path / "parquet").mkdir()
    rows.select(range(6)).to_parquet(tmp_path / "parquet/train-00000-of-00002.parquet")
    rows.select(range(6, 10)).to_parquet(tmp_path / "parquet/train-00001-of-00002.parquet")
    rows.select(range(3)).to_parquet(tmp_path / "parquet/test-00000-of-00001.parquet")
    rows.save_to_disk(tmp_path / "one")
    DatasetDict(train=rows, test=rows.select(range(3))).save_to_disk(tmp_path / "both")
    expected = [(encode(noise(9, 9, 3, seed=i)), i % 3) for i in range(10)]
    for number, path in enumerate(("parquet", "parquet/train-*.parquet", "one", "both")):
        out = tmp_path / f"out{number}"
        prepare("huggingface", tmp_path / path, "--per-shard", 4, "--output", out)
        assert pairs(out) == sorted(expected)
        assert (out / "classes.txt").read_text() == "x\ny\nz\n"
        if path in ("parquet", "both"):
            prepare("huggingface", tmp_path / path, "--split", "test", "--output", out)
            assert pairs(out, "test") == sorted(expected[:3])
            with pytest.raises(UserError, match="split=val: must be one of"):
                prepare("huggingface", tmp_path / path, "--split", "val", "--output", out)


@pytest.mark.slow
def test_huggingface_plain_columns(prepare, rows, tmp_path: Path):
    """Columns without types are found by their names; texts become classes."""
    from datasets import Dataset

    content = [encode(noise(9, 9, 3, seed=i)) for i in range(4)]
    names = ["cat", "ant", "cat", "bee"]
    for number, images in enumerate((content, [{"bytes": c, "path": "x.png"} for c in content])):
        path, out = tmp_path / f"{number}.parquet", tmp_path / f"out{number}"
        Dataset.from_dict({"img": images, "label": names}).to_parquet(path)
        prepare("huggingface", path, "--output", out)
        assert pairs(out) == sorted(zip(content, (2, 0, 2, 1), strict=True))
        assert (out / "classes.txt").read_text() == "ant\nbee\ncat\n"


@pytest.mark.slow
def test_huggingface_errors(prepare, rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "rows.parquet"
    out = ("--output", tmp_path / "out")
    labels = [0, 1, None, *[0] * 7]
    typed = rows.remove_columns("kind").add_column("label", labels)
    for column, message in (
        (labels, "row 2 has no label"),
        ([0, 1, -1, *[0] * 7], "label=-1: must be at least 0 .row 2"),
        ([0, 2**20, *[0] * 8], r"label=1048576: must be in \[0, 1048575\] .row 1"),
        (np.array([2**63, *[0] * 9], np.uint64), "label=9223372036854775808: must be in .*row 0"),
        ([0.5] * 10, "whole numbers, truths or texts"),
    ):
        typed.remove_columns("label").add_column("label", column).to_parquet(path)
        with pytest.raises(UserError, match=message):
            prepare("huggingface", path, *out)
    rows.rename_column("kind", "other").cast_column("other", typed.features["label"]).to_parquet(
        path
    )
    with pytest.raises(UserError, match="label_column: must be given, one of pic, other, note"):
        prepare("huggingface", path, *out)
    with pytest.raises(UserError, match="label_column=nope: must be one of pic, other, note"):
        prepare("huggingface", path, "--label-column", "nope", *out)
    with pytest.raises(UserError, match="image_column=other: must hold images"):
        prepare("huggingface", path, "--image-column", "other", "--label-column", "other", *out)
    prepare("huggingface", path, "--label-column", "other", *out)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install -e '.\[huggingface\]'"):
        prepare("huggingface", path, *out)


# ---- shards


@pytest.mark.parametrize("name, mode", [("cifar10", "RGB"), ("mnist", "L")])
@pytest.mark.slow
def test_shared_shards(prepare, tmp_path: Path, name: str, mode: str):
    """Keys, labels and bytes as they were; with a size, the crop of each."""
    given = shared(f"data/{name}/test-000000.tar.gz")
    before, out = list(read_shard(given)), tmp_path / "out"
    printed = prepare("shards", given, "--split", "test", "--output", out)
    assert "2,500 images as they were" in printed
    assert samples(out, "test") == before
    assert (out / "classes.txt").read_bytes() == given.with_name("classes.txt").read_bytes()
    prepare("shards", given, "--split", "small", "--size", 8, "--output", out)
    for old, new in list(zip(before, samples(out, "small"), strict=True))[:50]:
        field = next(field for field in ("png", "jpg") if field in old)
        image = Image.open(io.BytesIO(old[field]))
        assert image.mode == mode and old["__key__"] == new["__key__"] and old["cls"] == new["cls"]
        np.testing.assert_array_equal(pixels(new["png"]), center_crop(image, 8))


def test_shard_errors(prepare, tmp_path: Path):
    png, out = encode(noise(4, 4)), ("--output", tmp_path / "out")
    good = {"png": png, "cls": b"1"}
    for number, (members, message) in enumerate(
        (
            ((good, {"png": png}), "label: sample 001 of .*0.tar must have one, in 001.cls"),
            ((good, {"png": png, "cls": b" "}), "label=: must be a whole number, in 001.cls of"),
            ((good, {"png": png, "cls": b"-1"}), "label=-1: must be at least 0, in 001"),
            ((good, {"png": png, "cls": b"9" * 20}), r"label=9{20}: must be in \[0, 1048575\], in"),
            ((good, {"png": png, "cls": b"2000000000"}), "label=2000000000: .* 001.cls of .*4.tar"),
            ((good, {"txt": b"", "cls": b"1"}), "must hold images .*; sample 001 holds"),
        )
    ):
        path = write_tar(tmp_path / f"{number}.tar", *members)
        with pytest.raises(UserError, match=message):
            prepare("shards", path, "--mode", "L", *out, "--split", f"s{number}")
    path = write_tar(tmp_path / "cut.tar", good, good, good)
    path.write_bytes(path.read_bytes()[:1600])
    with pytest.raises(UserError, match="must be a whole tar"):
        prepare("shards", path, *out, "--split", "cut")
    with pytest.raises(UserError, match="shards=.*nothing"):
        prepare("shards", tmp_path / "nothing-*.tar", *out)
    (tmp_path / "classes.txt").write_text("only\n")
    with pytest.raises(UserError, match=r"label=1: must be in \[0, 0\]"):
        prepare("shards", write_tar(tmp_path / "g.tar", good), *out, "--split", "g")
    with pytest.raises(UserError, match="which this command did not make"):
        write_tar(tmp_path / "train-000000.tar", good)
        prepare("shards", tmp_path / "train-*.tar", "--mode", "L", "--output", tmp_path)
    assert not list((tmp_path / "out").glob("*.partial"))
