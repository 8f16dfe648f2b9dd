"""`lightning sample` and `lightning reference`."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, images
from PIL import Image

from w2s_train.cli import main
from w2s_train.command.run import compose
from w2s_train.errors import UserError
from w2s_train.evaluation.fid import FID
from w2s_train.evaluation.images import TarWriter
from w2s_train.features import ClassifierFeatures, InceptionFeatures
from w2s_train.features.frechet import Moments, Reference
from w2s_train.module import DiffusionModule
from w2s_train.scores import read_scores
from w2s_train.shards.decode import decode_image
from w2s_train.shards.format import ShardTable, is_written, table_path
from w2s_train.shards.samples import read_shard

DIGITS = ["-c", "configs/digits_w2s.yaml", "-c", "tests/tiny.yaml"]


@pytest.fixture
def run(tiny_run: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(ROOT)
    return tiny_run


def expected(folder: Path, seeds: range, labels: list[int]) -> torch.Tensor:
    """Images of the checkpoint, (N, 1, 8, 8), straight from the module."""
    module = compose(["fit", *DIGITS], run=False).model
    path = folder / "checkpoints/last.ckpt"
    module.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    module.eval()
    return module.generate(list(seeds), labels)


def sample(folder: Path, *options: str) -> None:
    main(
        ["sample", *DIGITS, "--trainer.default_root_dir", str(folder), "--ckpt_path=last", *options]
    )


@pytest.mark.slow
def test_every_format_holds_the_same_images(run: Path, tmp_path: Path):
    """Folder, .npz, shards and grid; an image depends on seed and class alone."""
    images = expected(run, range(5, 14), [3, 7, 3, 7, 3, 7, 3, 7, 3])
    which = ("--seeds=5:14", "--classes=[3,7]")
    few = "--data.generation_batch_size=4"
    sample(run, *which, f"--output={tmp_path}/png")
    for i, image in enumerate(images):
        path = tmp_path / "png" / f"{5 + i:06d}-{3 if i % 2 == 0 else 7}.png"
        assert np.array_equal(np.array(Image.open(path)), image[0])
    sample(run, *which, few, "--format=npz", f"--output={tmp_path}/samples.npz")
    with np.load(tmp_path / "samples.npz") as arrays:
        assert arrays["arr_0"].dtype == np.uint8 and arrays["arr_0"].shape == (9, 8, 8, 3)
        for channel in range(3):
            assert np.array_equal(arrays["arr_0"][..., channel], images[:, 0])
        assert arrays["arr_1"].tolist() == [3, 7, 3, 7, 3, 7, 3, 7, 3]
    sample(run, *which, few, "--format=shards", f"--output={tmp_path}/shards")
    shard = tmp_path / "shards/samples-000-000000.tar"
    table = ShardTable.load(table_path(shard))
    assert is_written(shard) and table.labels.tolist() == [3, 7, 3, 7, 3, 7, 3, 7, 3]
    for i, (written, image) in enumerate(zip(read_shard(shard), images, strict=True)):
        assert written["__key__"] == table.keys[i] == f"{5 + i:06d}"
        assert np.array_equal(decode_image(written["png"]), image)
    sample(run, *which, "--format=grid", "--columns=3", f"--output={tmp_path}/grid.png")
    grid = np.array(Image.open(tmp_path / "grid.png"))[..., 0]
    assert np.array_equal(grid[2:10, 12:20], images[1, 0]) and grid.shape == (32, 32)
    assert not list(tmp_path.glob("*partial*"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "options, message",
    [
        (["--seeds=5"], "seeds=5: must be FIRST:LAST"),
        (["--seeds=7:7"], "seeds=7:7: must be FIRST:LAST"),
        (["--classes=[3,10]"], r"classes=\[3, 10\]: must be in \[0, 9\]"),
        (["--format=npz", "--output=x.png"], "output=x.png: must end in .npz"),
        (["--output=configs"], "output=configs: must be new"),
        (["--format=gif"], "format"),
        (["--format=grid", "--columns=0", "--output=x.png"], "columns=0: must be at least 1"),
    ],
)
def test_bad_samples(run: Path, options: list[str], message: str):
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        sample(run, *options)


@pytest.mark.slow
def test_a_run_brings_its_own_config(run: Path, tmp_path: Path, capsys):
    """Also where it was moved to; one class; options of the command line come after it."""
    sample(run, "--seeds=0:3", "--classes=3", f"--output={tmp_path}/one")
    assert capsys.readouterr().out.endswith(f"written: 3 images to {tmp_path}/one\n")
    moved = run.rename(tmp_path / "moved")
    folders = {"two": moved, "three": moved / "checkpoints" / "last.ckpt"}
    for name, path in folders.items():
        options = ["--seeds=0:3", "--classes=3", f"--output={tmp_path / name}"]
        main(["sample", f"--ckpt_path={path}", *options])
        for seed in range(3):
            image = Path(name, f"{seed:06d}-3.png")
            assert (tmp_path / image).read_bytes() == (tmp_path / "one" / image.name).read_bytes()
    before = len(read_scores(moved))
    step = moved / "checkpoints" / "step-000003.ckpt"
    main(["validate", "--ckpt_path", str(step), "--model.sampler.init_args.steps=3"])
    last = read_scores(moved)[-1]
    assert (len(read_scores(moved)), last.step, last.protocol.steps) == (before + 1, 3, 3)
    main(["validate", f"--ckpt_path={moved}", f"--trainer.default_root_dir={tmp_path}/elsewhere"])
    assert [score.step for score in read_scores(tmp_path / "elsewhere")] == [6]
    assert len(read_scores(moved)) == before + 1
    assert not run.exists()


ALONE = {
    (): "ckpt_path=null: must be a run folder, or a checkpoint in one",
    ("--ckpt_path=last",): "ckpt_path=last: must be a run folder, or a checkpoint in one",
    (
        "--ckpt_path",
        "sub/lone.ckpt",
    ): "ckpt_path=sub/lone.ckpt: must be a run folder, or a checkpoint in one",
}


@pytest.mark.parametrize("options", ALONE)
@pytest.mark.parametrize("name", ["validate", "sample"])
def test_a_lone_checkpoint_asks_for_a_config(
    name: str, options: tuple, tmp_path: Path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "lone.ckpt").touch()
    (tmp_path / "config.yaml").touch()  # of another run: a run's checkpoints lie in `checkpoints`
    with pytest.raises(SystemExit, match=f"error: {ALONE[options]}.* lightning {name} -c CONFIG"):
        main([name, *options])


@pytest.mark.slow
def test_reference_is_that_of_the_preparation(command, tmp_path: Path):
    """Shard by shard in batches equals all images at once; a subset keeps what it should."""
    made = Reference.load(ROOT / "data/digits/reference.npz")
    for size, keep in ((250, 10_000), (7, 100)):
        path = tmp_path / f"{size}.npz"
        options = [f"--data.generation_batch_size={size}", f"--keep_features={keep}"]
        command("reference", f"--output={path}", *options)
        ours = Reference.load(path)
        assert ours.fingerprint == made.fingerprint
        torch.testing.assert_close(ours.moments.mu, made.moments.mu, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(ours.moments.sigma, made.moments.sigma, rtol=1e-9, atol=1e-12)
        assert len(ours.features) == min(keep, 1497)
        rows = {tuple(row) for row in made.features.tolist()}
        assert {tuple(row) for row in ours.features.tolist()} <= rows
    whole = Reference.load(tmp_path / "250.npz").features
    assert torch.equal(Reference.load(tmp_path / "7.npz").features, whole[:100])


@pytest.mark.slow
def test_reference_of_another_split(command, tmp_path: Path):
    path = tmp_path / "heldout.npz"
    urls = "--urls=data/digits/heldout-*.tar"
    command("reference", urls, f"--output={path}")
    ours, made = Reference.load(path), Reference.load(ROOT / "data/digits/heldout.npz")
    assert ours.fingerprint == made.fingerprint and ours.fingerprint["n"] == 300
    torch.testing.assert_close(ours.moments.sigma, made.moments.sigma, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_reference_on_two_processes(command, tmp_path: Path):
    one = tmp_path / "one.npz"
    command("reference", f"--output={one}", "--keep_features=50")
    two = tmp_path / "two.npz"
    several = ("--trainer.devices=2", "--trainer.strategy=ddp_fork")
    command("reference", f"--output={two}", "--keep_features=50", *several)
    ours, other = Reference.load(one), Reference.load(two)
    assert ours.fingerprint == other.fingerprint
    torch.testing.assert_close(ours.moments.sigma, other.moments.sigma, rtol=1e-10, atol=1e-12)
    assert torch.equal(ours.features, other.features)


@pytest.mark.slow
def test_samples_of_two_processes(run: Path, tmp_path: Path):
    """One file, the same bytes and record; fewer images than processes are refused."""
    several = ("--trainer.devices=2", "--trainer.strategy=ddp_fork", "--format=npz")
    sample(run, "--seeds=3:20", "--format=npz", f"--output={tmp_path}/one.npz")
    sample(run, "--seeds=3:20", f"--output={tmp_path}/two.npz", *several)
    with np.load(tmp_path / "one.npz") as one, np.load(tmp_path / "two.npz") as two:
        assert all(np.array_equal(one[name], two[name]) for name in ("arr_0", "arr_1"))
    records = [json.loads((tmp_path / f"{name}.npz.json").read_text()) for name in ("one", "two")]
    assert records[0] == records[1]
    assert (records[1]["step"], records[1]["seeds"]) == (6, [3, 19])
    with pytest.raises(SystemExit, match="seeds=0:1: must be at least as many as processes, 2"):
        sample(run, "--seeds=0:1", f"--output={tmp_path}/few.npz", *several)


def changed(path: Path, **changes: str | int) -> Path:
    """The digits' reference with another fingerprint and without single features."""
    made = Reference.load(ROOT / "data/digits/reference.npz")
    Reference(made.moments, made.fingerprint | changes).save(path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(dataset="mnist"), "reference=.*: was made with dataset mnist, must be digits"),
        (dict(images="3x8x8"), "reference=.*: was made with images 3x8x8, must be 1x8x8"),
        (dict(extractor="other"), "reference=.*: was made with extractor other, must be classif"),
    ],
)
def test_a_reference_of_something_else(command, tmp_path: Path, changes: dict, message: str):
    path = changed(tmp_path / "other.npz", **changes)
    features = "{class_path: w2s_train.features.ClassifierFeatures, "
    features += "init_args: {weights: data/digits/classifier.safetensors}}"
    callback = f"{{class_path: w2s_train.callbacks.FID, init_args: {{reference: {path}, "
    option = f"--trainer.callbacks={callback}features: {features}}}}}"
    run = command("fit")
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        command("fit", option)
    assert not run.with_name("run.1").exists()  # refused before the earlier run is moved aside


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "cannot be read .EOFError"),
        (b"text", "cannot be read .ValueError"),
        (b"PK\x03\x04 and no more", "cannot be read .BadZipFile"),
    ],
)
def test_broken_references(tmp_path: Path, content: bytes, message: str):
    (tmp_path / "r.npz").write_bytes(content)
    with pytest.raises(UserError, match=f"^reference=.*{message}"):
        Reference.load(tmp_path / "r.npz")


def test_a_reference_that_says_nothing(tmp_path: Path):
    moments = Moments(torch.zeros(3).double(), torch.eye(3).double(), 9)
    Reference(moments, {"n": 9}).save(tmp_path / "r.npz")
    with pytest.raises(UserError, match="its fingerprint lacks dataset, extractor, split"):
        Reference.load(tmp_path / "r.npz")
    about = dict(dataset="a", split="b", n=9, extractor="c")
    Reference(Moments(moments.mu, torch.eye(2).double(), 9), about).save(tmp_path / "r.npz")
    with pytest.raises(UserError, match="must be .F,. and .F, F."):
        Reference.load(tmp_path / "r.npz")


@pytest.mark.slow
def test_a_reference_is_not_overwritten_by_another(command, tmp_path: Path):
    with pytest.raises(SystemExit, match="holds digits train, must be new for digits heldout"):
        command("reference", "--urls=data/digits/heldout-*.tar")


@pytest.mark.slow
def test_left_overs_of_a_stopped_npz(run: Path, tmp_path: Path, monkeypatch):
    """A second start with fewer images does not take the first one's rows."""
    generate = DiffusionModule.generate

    def broken(self, batch: list[int], *rest: Any):
        if batch[0] >= 8:
            raise RuntimeError("stopped")
        return generate(self, batch, *rest)

    options = ("--format=npz", f"--output={tmp_path}/s.npz", "--data.generation_batch_size=8")
    monkeypatch.setattr(DiffusionModule, "generate", broken)
    with pytest.raises(RuntimeError, match="stopped"):
        sample(run, "--seeds=0:20", *options)
    monkeypatch.setattr(DiffusionModule, "generate", generate)
    sample(run, "--seeds=0:10", *options)
    with np.load(tmp_path / "s.npz") as arrays:
        assert len(arrays["arr_0"]) == 10 and arrays["arr_0"].any(axis=(1, 2, 3)).all()
    (tmp_path / "s.npz").unlink()
    with pytest.raises(SystemExit, match="must hold 20 images, only 8 came"):
        sample(run, "--seeds=0:20", *options, "--trainer.limit_predict_batches=0.4")


def test_shards_of_one_size_and_what_a_stopped_one_leaves(tmp_path: Path):
    """Ten images in batches of three are shards of four, four and two; an error ends the last."""
    trainer = SimpleNamespace(global_rank=1)
    for name, error in (("whole", None), ("stopped", RuntimeError("stopped"))):
        writer = TarWriter(tmp_path / name, size=4)
        for first in range(0, 10, 3):
            seeds = list(range(first, min(first + 3, 10)))
            batch = {"seed": seeds, "label": [seed % 2 for seed in seeds]}
            writer.write(trainer, images(len(seeds), size=8), batch)
        writer.finish(trainer) if error is None else writer.on_exception(trainer, None, error)
    names = [f"samples-001-{number:06d}" for number in range(3)]
    for name, kept in (("whole", names), ("stopped", names[:2])):
        found = {path.name for path in (tmp_path / name).iterdir()}
        assert found == {f"{each}.{end}" for each in kept for end in ("tar", "table.npz")}
    keys = [s["__key__"] for n in names for s in read_shard(tmp_path / "whole" / f"{n}.tar")]
    assert keys == [f"{seed:06d}" for seed in range(10)]


@pytest.mark.slow
def test_metrics_that_need_single_features(command, tmp_path: Path):
    path = changed(tmp_path / "bare.npz")
    features = "{class_path: w2s_train.features.ClassifierFeatures, "
    features += "init_args: {weights: data/digits/classifier.safetensors}}"
    callback = f"{{class_path: w2s_train.callbacks.FID, init_args: {{reference: {path}, "
    metrics = "metrics: [{class_path: w2s_train.metrics.KernelDistance}]"
    option = f"--trainer.callbacks={callback}features: {features}, {metrics}}}}}"
    with pytest.raises(SystemExit, match="holds no features of single images, which KernelDist"):
        command("fit", option)


def test_a_reference_needs_a_callback(command):
    with pytest.raises(SystemExit, match="error: trainer.callbacks: must hold a FID"):
        command("reference", "--trainer.callbacks=[]")


@pytest.mark.parametrize(
    "n, name", [(50_000, "fid"), (60_000, "fid"), (5000, "fid@5k"), (49_999, "fid@49999")]
)
def test_fewer_images_than_the_protocol(n: int, name: str):
    """Never plain FID; the classifiers have no such custom."""
    fid = FID("none.npz", InceptionFeatures())
    assert "fid" + fid._suffix(n) == name
    assert FID("none.npz", ClassifierFeatures("toys/none.safetensors"))._suffix(n) == ""


@pytest.mark.slow
def test_too_few_images_for_the_covariance(command):
    """A warning with both numbers."""
    with pytest.warns(UserWarning, match="40 images are too few for a covariance of 64 features"):
        command("fit", "--data.num_generated=40")


def test_moments_survive_the_file(tmp_path: Path):
    x = torch.randn(30, 4, dtype=torch.float64)
    moments = Moments.from_sums(x.sum(0), x.T @ x, 30)
    about = dict(dataset="toys", split="train", n=30, extractor="none")
    Reference(moments, about, x.float()).save(tmp_path / "r.npz")
    loaded = Reference.load(tmp_path / "r.npz")
    assert torch.equal(loaded.moments.sigma, moments.sigma)
    assert torch.equal(loaded.features, x.float())
