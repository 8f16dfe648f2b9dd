"""Own images from a folder alone; what is missing names the command that makes it."""

import contextlib
import json
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, lightning
from image_folders import encode, noise
from refusals import parsers_built_once, refusal

from w2s_train.cli import main
from w2s_train.command.run import compose
from w2s_train.datamodule import classes_of, prepare_folder
from w2s_train.errors import UserError
from w2s_train.features import inception
from w2s_train.features.frechet import Reference

FID = (
    "[{class_path: w2s_train.callbacks.FID, init_args: {reference: %s/reference.npz, features: "
    "{class_path: w2s_train.features.ClassifierFeatures, init_args: "
    "{weights: data/digits/classifier.safetensors}}}}, w2s_train.callbacks.SampleGrid]"
)
SHORT = ["--trainer.max_steps=2", "--trainer.val_check_interval=2", "--data.num_workers=0"]
SHORT += ["--data.batch_size=4", "--data.num_generated=66", "--trainer.accelerator=cpu"]
SHORT += ["--model.sampler.init_args.steps=2", "--model.network.init_args.depth=2"]
SHORT += ["--model.network.init_args.hidden_size=32", "--model.network.init_args.in_channels=1"]


def photos(folder: Path, *classes: str) -> Path:
    """Ten of each class; without classes, in the folder itself."""
    for number, name in enumerate(classes or [""]):
        (folder / name).mkdir(parents=True)
        for i in range(10):
            path = folder / name / f"{i}.png"
            path.write_bytes(encode(noise(9, 12, 3, seed=20 * number + i)))
    return folder


def options(tmp_path: Path) -> list[str]:
    shape = ["--model.network.init_args.input_size=8"]
    made = [f"--data.train_urls={tmp_path}/made/train-*.tar", f"--trainer.callbacks={FID}"]
    made[1] %= tmp_path / "made"
    return [*SHORT, *shape, *made]


@pytest.mark.slow
def test_a_folder_is_all_that_is_needed(digits: None, tmp_path: Path, capfd):
    """Shards of the network's size and channels, number of classes, reference, scores, grid."""
    images = f"--data.images={photos(tmp_path / 'photos', 'b', 'a', 'c')}"
    run = dict(config="images_w2s", tiny=False)
    folder = lightning("fit", tmp_path / "run", *options(tmp_path), images, **run)
    assert (tmp_path / "made" / "classes.txt").read_text().split() == ["a", "b", "c"]
    about = Reference.load(tmp_path / "made" / "reference.npz").fingerprint
    assert (about["n"], about["images"], about["split"]) == (30, "1x8x8", "train")
    (score,) = json.loads((folder / "scores.json").read_text())
    assert score["protocol"]["reference"] == about
    assert (folder / "grids" / "step-000002.png").is_file()
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["data"]["num_classes"] == 3
    assert config["model"]["network"]["init_args"]["num_classes"] == 3

    # Later starts find what they need beside the shards, and refuse other images.
    before = (tmp_path / "made" / "reference.npz").read_bytes()
    lightning("fit", folder, *options(tmp_path), "--trainer.max_steps=4", "--ckpt_path=last", **run)
    assert len(json.loads((folder / "scores.json").read_text())) == 2
    assert (tmp_path / "made" / "reference.npz").read_bytes() == before
    other = f"--data.images={photos(tmp_path / 'others', 'b', 'a', 'd')}"
    with pytest.raises(SystemExit, match=r"must become shards; see above: python \S*prepare.py"):
        lightning("fit", tmp_path / "other", *options(tmp_path), other, **run)
    assert "train shards were made " in capfd.readouterr().err
    assert not (tmp_path / "other").exists()

    # Its samples need neither images nor shards, and make none.
    elsewhere = f"--data.train_urls={tmp_path}/elsewhere/train-*.tar"
    for name in ("photos", "gone"):
        output = f"--output={tmp_path}/of_{name}"
        main(["sample", f"--ckpt_path={folder}", images, elsewhere, "--seeds=0:2", output])
        assert len(list((tmp_path / f"of_{name}").glob("*.png"))) == 2
        assert not (tmp_path / "elsewhere").exists()
        if name == "photos":
            (tmp_path / "photos").rename(tmp_path / "gone")
    main(["validate", f"--ckpt_path={folder}", images])


def test_shards_are_made_in_a_local_folder(tmp_path: Path):
    images = f"--data.images={photos(tmp_path / 'photos', 'a')}"
    more = ["--data.prepare=null", "--data.num_classes=10", "--data.train_urls=s3://b/train-*.tar"]
    message = refusal(tmp_path / "run", images, *more)
    assert message.startswith("error: data.train_urls=s3://b/train-*.tar: must be a local path")
    assert not (tmp_path / "run").exists()


def test_the_command_fits_folder_and_network(tmp_path: Path):
    flat, deep = photos(tmp_path / "flat"), photos(tmp_path / "deep", "x", "y")
    words = ["data/prepare.py", "folder", str(deep), "--output", "made", "--split", "train"]
    urls = "made/train-*.tar"
    found = prepare_folder(str(deep), urls, (3, 64, 64))
    assert found == [*words, "--size", "64", "--mode", "RGB"]
    assert prepare_folder(str(flat), urls, (1, 8, 8))[-3:] == ["--mode", "L", "--unlabelled"]
    assert [classes_of(urls, str(each), None) for each in (flat, deep)] == [1, 2]
    with pytest.raises(UserError, match="^images=none: must be an existing folder"):
        classes_of(urls, "none", None)


def test_the_number_of_classes_stands_beside_the_shards(tmp_path: Path):
    """In the names, or else as the largest label of the index."""
    urls = f"{tmp_path}/train-*.tar"
    with pytest.raises(UserError, match="^num_classes=null: must be a number .*; made by: make it"):
        classes_of(urls, None, "make it")
    shard = {"samples": 2, "bytes": 1, "sha256": "0", "labels": [0, 6]}
    shards = {"train-0.tar": shard, "train-1.tar": shard | {"labels": [3, 4]}}
    (tmp_path / "index.json").write_text(json.dumps({"version": 1, "shards": shards}))
    assert classes_of(urls, None, None) == 7
    (tmp_path / "classes.txt").write_text("a\n" * 9)
    assert classes_of(urls, None, None) == 9


def test_features_that_cannot_be_had_come_before_any_work(tmp_path: Path, monkeypatch):
    """Inception's weights, in a place without a network; grids alone do without."""
    monkeypatch.chdir(tmp_path)
    images = f"--data.images={photos(tmp_path / 'photos', 'a')}"
    urls = f"--data.train_urls={tmp_path}/made/train-*.tar"

    def no_network(folder: str) -> None:
        raise OSError("no network")

    monkeypatch.setattr(inception, "check_download_inception", no_network)
    features = "{class_path: w2s_train.features.InceptionFeatures, init_args: {folder: %s}}"
    features %= tmp_path / "weights"
    callback = f"{{reference: {tmp_path}/made/reference.npz, features: {features}}}"
    scores = f"--trainer.callbacks={{class_path: w2s_train.callbacks.FID, init_args: {callback}}}"
    network = "--model.network.init_args.num_classes=1"
    more = ["--data.prepare=null", "--data.num_classes=1", network, urls, images, scores]
    message = refusal(tmp_path / "run", *more)
    assert "must be a local inception-2015-12-05.pt where it cannot be fetched" in message
    assert message.endswith("--trainer.callbacks w2s_train.callbacks.SampleGrid does without")
    assert not (tmp_path / "made").exists() and not (tmp_path / "run").exists()


def test_missing_data_name_the_command_that_makes_them(tmp_path: Path):
    """As the config of the data says; of images, which key does."""
    cifar10 = f"--data={ROOT}/configs/data/cifar10.yaml"  # which may be in this checkout
    message = refusal(tmp_path, cifar10, f"--data.train_urls={tmp_path}/train-*.tar")
    assert message.endswith(
        "train-*.tar does not; made by: python data/prepare.py torchvision CIFAR10 --root downloads"
        " --download --output data/cifar10"
    )
    with parsers_built_once(), pytest.raises(UserError) as error, contextlib.chdir(tmp_path):
        compose(["fit", "-c", str(ROOT / "configs" / "images_w2s.yaml")], run=False)
    assert "made by: --data.images FOLDER, or python data/prepare.py" in str(error.value)


def test_a_missing_reference_names_the_command_that_makes_it(digits: None, tmp_path: Path):
    """The words at hand, less what makes no reference."""
    scores = f"--trainer.callbacks={FID % tmp_path}"
    message = refusal(tmp_path / "run", "--data.prepare=null", scores, "--ckpt_path", "last")
    rule = f"reference={tmp_path}/reference.npz: must be an existing file; made by: lightning "
    assert message.startswith(f"error: {rule}reference -c ")
    assert "--data.prepare=null" in message and "last" not in message
