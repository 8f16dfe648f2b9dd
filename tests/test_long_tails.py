"""Classes that are not equally frequent, and data without classes."""

import json
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, loaded, moments
from image_folders import encode, noise, preparer, samples, write_tar
from shard_files import number_image
from test_stream import Process, module

from w2s_train.errors import UserError
from w2s_train.evaluation.fid import FID
from w2s_train.features import ClassifierFeatures
from w2s_train.features.frechet import frechet_distance
from w2s_train.shards import ShardWriter, write_index
from w2s_train.shards.decode import decode_image
from w2s_train.shards.order import GenerationPlan, Shares, total_variation
from w2s_train.shards.samples import read_shard

COUNTS = np.array([500, 100, 20, 4, 1, 0])


@pytest.fixture
def prepare(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    return preparer(monkeypatch, capsys)


def write_long_tail(folder: Path, counts: list[int], *, index: bool = True) -> str:
    """Two shards; the second has the last class alone."""
    *most, last = counts
    parts = [[k for k, n in enumerate(most) for _ in range(n)], [len(most)] * last]
    for number, labels in enumerate(parts):
        with ShardWriter(folder / f"train-{number:06d}.tar") as writer:
            for i, label in enumerate(labels):
                writer.write(f"{number}-{i:04d}", label, png=number_image(label))
    if index:
        write_index(folder)
    return str(folder / "train-*.tar")


# ---- labels as in training


@pytest.mark.parametrize("first", [0, 1, 1000, 10**9])
@pytest.mark.parametrize("n", [625, 5000])
def test_labels_have_the_frequencies(first: int, n: int):
    """Of any range of seeds, nearly without noise: independent draws are off by 1 / sqrt(n)."""
    plan = GenerationPlan(range(first, first + n), Shares(COUNTS))
    labels = [plan[i]["label"] for i in range(n)]
    found = np.bincount(labels, minlength=6)
    assert found[5] == 0
    assert np.abs(found / n - COUNTS / 625).max() < 3 / n
    assert total_variation(found, COUNTS) < 5 / n


def test_a_label_depends_on_its_seed_alone():
    one, other = (GenerationPlan(seeds, Shares(COUNTS)) for seeds in (range(90), range(40, 99)))
    assert [one[i + 40]["label"] for i in range(50)] == [other[i]["label"] for i in range(50)]
    assert [one[i]["label"] for i in range(9)] == [Shares(COUNTS).of(i) for i in range(9)]


def test_total_variation():
    assert total_variation(np.array([1, 1]), np.array([5, 5])) == 0
    assert total_variation(np.array([1, 0]), np.array([0, 3])) == 1
    assert total_variation(np.array([3, 1]), np.array([1, 1])) == pytest.approx(0.25)


def test_real_images_score_well_with_the_labels_of_their_data():
    """And badly with labels in turn: the distance between two mixtures of the same classes."""
    generator = torch.Generator().manual_seed(0)
    means = 3 * torch.randn(5, 8, generator=generator)

    def real(labels: list[int]) -> torch.Tensor:
        return means[labels] + torch.randn(len(labels), 8, generator=generator)

    data = real([k for k, count in enumerate(COUNTS[:5]) for _ in range(8 * count)])
    scores = {}
    for name, labels in (("in turn", range(5)), ("as in training", Shares(COUNTS))):
        plan = GenerationPlan(range(5000), labels)
        images = real([plan[i]["label"] for i in range(5000)])
        scores[name] = frechet_distance(moments(images), moments(data))
    assert scores["as in training"] < 0.05
    assert scores["in turn"] > 100 * scores["as in training"]


def test_plans_of_the_data_module(tmp_path: Path):
    """With and without an index, for any number of processes; by default each class in turn."""
    urls = write_long_tail(tmp_path, [12, 5, 3])
    options = dict(num_classes=3, num_generated=40)
    for index in (True, False):
        if not index:
            (tmp_path / "index.json").unlink()
        parts = []
        for rank in range(2):
            data = module(urls, Process(rank, 2), labels_as_in_training=True, **options)
            assert data.class_counts().tolist() == [12, 5, 3]
            [loader] = data.val_dataloader()
            for batch in loader:
                parts += zip(batch["seed"].tolist(), batch["label"].tolist(), strict=True)
        assert sorted(parts) == [(s, Shares(np.array([12, 5, 3])).of(s)) for s in range(40)]
        counts = np.bincount([label for _, label in parts])
        assert counts.tolist() == pytest.approx([24, 10, 6], abs=1)
    data = module(urls, **options)
    assert [row["label"] for row in data.val_dataloader()[0].dataset] == [i % 3 for i in range(40)]


def test_sample_has_them_too(tmp_path: Path):
    urls = write_long_tail(tmp_path, [12, 5, 3])
    data = module(urls, num_classes=3, labels_as_in_training=True)
    data.seeds = range(7, 20)
    labels = [row["label"] for row in data.predict_dataloader().dataset]
    assert labels == [Shares(np.array([12, 5, 3])).of(s) for s in range(7, 20)]
    data.classes = [2, 0]
    labels = [row["label"] for row in data.predict_dataloader().dataset]
    assert labels == [2, 0] * 6 + [2]


def warned(data, unconditional: bool = False) -> list[str]:
    """What a FID says when training starts."""
    fid = FID.__new__(FID)
    trainer = SimpleNamespace(datamodule=data, is_global_zero=True)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        fid.on_train_start(trainer, SimpleNamespace(unconditional=unconditional))
    return [str(each.message) for each in found]


def test_a_warning_before_training(tmp_path: Path):
    tail = write_long_tail(tmp_path / "a", [12, 5, 3])
    [said] = warned(module(tail, num_classes=3))
    assert "data.labels_as_in_training=False" in said
    assert "3 to 12 images of a class (total variation 0.27, above 0.1)" in said
    assert warned(module(tail, num_classes=3, labels_as_in_training=True)) == []
    assert warned(module(tail, num_classes=3), unconditional=True) == []
    assert warned(module(write_long_tail(tmp_path / "b", [20, 20, 21]), num_classes=3)) == []


@pytest.mark.slow
def test_scores_record_it(command, tmp_path: Path):
    """In the protocol, only where it is used; resumed and repeated scores are the same."""
    folder = command("fit", "--data.labels_as_in_training=true")
    scores = json.loads((folder / "scores.json").read_text())
    assert all(s["protocol"]["labels"].startswith("as in training, counts sha") for s in scores)
    command("validate", "--ckpt_path=last", "--data.labels_as_in_training=true")
    again = json.loads((folder / "scores.json").read_text())[-1]
    assert again["value"] == scores[-1]["value"]
    command("validate", "--ckpt_path=last")
    plain = json.loads((folder / "scores.json").read_text())[-1]
    assert "labels" not in plain["protocol"]


# ---- no classes


def image_files(folder: Path, *names: str) -> None:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encode(noise(8, 8, 3, seed=number)))


def test_a_flat_folder(prepare, tmp_path: Path):
    image_files(tmp_path / "raw", "a.png", "b.png", "deep/er/c.png", ".hidden.png", ".x/d.png")
    options = ("folder", tmp_path / "raw", "--output", tmp_path / "out")
    printed = prepare(*options, "--unlabelled")
    assert "3 images" in printed and "1 classes of 3 to 3 images" in printed
    found = samples(tmp_path / "out")
    assert [sample["cls"] for sample in found] == [b"0"] * 3
    assert not (tmp_path / "out" / "classes.txt").exists()
    with pytest.raises(UserError, match="were made with .* unlabelled True, not None"):
        prepare(*options)


def test_a_flat_folder_says_what_helps(prepare, tmp_path: Path):
    image_files(tmp_path / "raw", "a.png")
    with pytest.raises(UserError, match="one sub-folder per class, .* --unlabelled takes images"):
        prepare("folder", tmp_path / "raw", "--output", tmp_path / "out")


def test_shards_without_labels(prepare, tmp_path: Path):
    png = encode(noise(8, 8))
    source = write_tar(tmp_path / "a.tar", {"png": png}, {"png": png, "cls": b"cat"})
    options = ("shards", source, "--output", tmp_path / "out")
    with pytest.raises(UserError, match="sample 000 of .* must have one, .* --unlabelled takes"):
        prepare(*options, "--mode", "L")
    prepare(*options, "--unlabelled")
    assert [(s["cls"], s["png"]) for s in samples(tmp_path / "out")] == [(b"0", png)] * 2


@pytest.mark.slow
def test_data_sets_of_images_alone(prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    content = [encode(noise(9, 9, 3, seed=i)) for i in range(4)]
    images = [{"bytes": png, "path": None} for png in content]
    path, out = tmp_path / "a.parquet", ("--output", tmp_path / "out")
    kinds = datasets.Features(image=datasets.Image())
    datasets.Dataset.from_dict({"image": images}, features=kinds).to_parquet(path)
    with pytest.raises(UserError, match="label_column: there is none beside image; --unlabelled"):
        prepare("huggingface", path, *out)
    with pytest.raises(UserError, match="label_column=x: must be left out with --unlabelled"):
        prepare("huggingface", path, "--unlabelled", "--label-column", "x", *out)
    prepare("huggingface", path, "--unlabelled", *out)
    found = samples(tmp_path / "out")
    assert sorted(s["png"] for s in found) == sorted(content)
    assert {s["cls"] for s in found} == {b"0"}


@pytest.mark.slow
def test_truths_as_labels(prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    content = [encode(noise(9, 9, 3, seed=i)) for i in range(4)]
    rows = {"image": content, "label": [True, False, True, True]}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "a.parquet")
    prepare("huggingface", tmp_path / "a.parquet", "--output", tmp_path / "out")
    found = {s["png"]: s["cls"] for s in samples(tmp_path / "out")}
    assert [found[png] for png in content] == [b"1", b"0", b"1", b"1"]


def test_the_stream_without_labels(tmp_path: Path):
    """All of class 0, from the disk and from memory; without the option the message names it."""
    urls = str(write_tar(tmp_path / "a.tar", *[{"png": number_image(i)} for i in range(9)]))
    for in_memory in (False, True):
        data = module(urls, num_classes=1, unlabelled=True, in_memory=in_memory)
        batch = next(iter(data.train_dataloader()))
        assert batch["label"].tolist() == [0] * 5 and batch["skipped"] == []
    assert data.class_counts().tolist() == [9]
    with pytest.raises(UserError, match="must have one, in 000.cls; .* data.unlabelled=true"):
        module(urls, num_classes=1).train_dataloader()


@pytest.mark.slow
def test_unconditional_training_follows(command, tmp_path: Path):
    """With any other label dropout it is refused."""
    images = [{"png": encode(noise(8, 8, seed=i))} for i in range(40)]
    urls = f"--data.train_urls={write_tar(tmp_path / 'train-000000.tar', *images)}"
    options = ["--data.prepare=null", urls, "--data.unlabelled=true", "--trainer.callbacks=[]"]
    options += ["-c", "configs/weak/none.yaml"]
    with pytest.raises(SystemExit, match="model.label_dropout=0.1: must be 1 with data.unlabelled"):
        command("fit", *options)
    folder = command("fit", *options, "--model.label_dropout=1")
    assert (folder / "checkpoints" / "last.ckpt").is_file()


@pytest.mark.slow
def test_real_digits(digits: None):
    """A long tail of real images, by the labels of a plan: far off in turn, at home as in it."""
    shards = sorted((ROOT / "data/digits").glob("train-*.tar"))
    stored = [sample for shard in shards for sample in read_shard(shard)]
    labels = np.array([int(sample["cls"]) for sample in stored])
    extractor = loaded(ClassifierFeatures(str(ROOT / "data/digits/classifier.safetensors")))
    features = extractor(torch.stack([decode_image(sample["png"]) for sample in stored]))
    counts = np.array([120, 90, 60, 30, 15, 8, 4, 3, 2, 1])
    tail = [np.flatnonzero(labels == k)[:count] for k, count in enumerate(counts)]
    reference, rng = moments(features[np.concatenate(tail)]), np.random.default_rng(0)
    scores = []
    for given in (range(10), Shares(counts)):
        plan = GenerationPlan(range(5000), given)
        rows = [rng.choice(tail[plan[i]["label"]]) for i in range(5000)]
        scores.append(frechet_distance(moments(features[rows]), reference))
    assert scores[0] > 40 and scores[1] < 0.4
