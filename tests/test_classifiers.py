"""Small classifiers: their features against stored ones, their training, and its command."""

import io
import json
import runpy
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import scipy.ndimage
import torch
from conftest import ROOT, SHARED, images, loaded, moments, shared
from jsonargparse import ArgumentParser
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from w2s_train.features import (
    CIFAR10Classifier,
    ClassifierFeatures,
    ConvClassifier,
    FeatureExtractor,
    Regularization,
    mnist_classifier,
    train_classifier,
)
from w2s_train.features.frechet import Moments, frechet_distance
from w2s_train.features.training import normalized

NETWORKS = {"mnist": mnist_classifier, "cifar10": CIFAR10Classifier}
# "train -> ..." of shared/features/README.md: MNIST, CIFAR-10.
MEASURED = {
    "test": (0.0042299, 0.01334),
    "first 256": (0.062951, 0.33663),
    "first 512": (0.028941, 0.16347),
    "first 1000": (0.014526, 0.084705),
    "first 2000": (0.010243, 0.042671),
    "first 5000": (0.0056343, 0.023229),
    "blur 0.5": (0.19585, 0.22222),
    "blur 1.0": (10.79, 3.5635),
    "noise 4": (0.036021, 0.019766),
    "noise 16": (3.1453, 0.63929),
    "without class 0": (0.24011, 0.28076),
    "shift 2px": (0.029176, 0.047619),
}


def shared_extractor(name: str) -> ClassifierFeatures:
    weights = shared(f"features/{name}_classifier.safetensors")
    return loaded(ClassifierFeatures(str(weights), NETWORKS[name](), name))


@pytest.mark.parametrize("name", NETWORKS)
def test_shared_classifiers(name: str):
    """Stored features and logits of 32 test images."""
    extractor = shared_extractor(name)
    check = np.load(SHARED / "features" / f"{name}_check.npz")
    features = extractor(torch.from_numpy(check["images"]))
    np.testing.assert_allclose(features, check["features"], atol=1e-3)
    np.testing.assert_allclose(extractor.network.fc(features), check["logits"], atol=1e-3)
    softmax = torch.from_numpy(check["logits"]).softmax(1)
    torch.testing.assert_close(extractor.probabilities(features), softmax, rtol=0, atol=1e-3)
    assert extractor.metric == f"fd_{name}"
    assert extractor.describe().startswith(f"classifier {name} sha256:")


def read_shared(name: str, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    script = runpy.run_path(str(ROOT / "data/classifier.py"))
    urls = shared(f"data/{name}/{split}-000000.tar.gz").with_name(f"{split}-*.tar.gz")
    return script["read_images"](str(urls), split, script["ARCHITECTURES"][name], 1.0)


def disturbed(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Test images (N, C, H, W) uint8 as the rows of `MEASURED` want them."""

    def rounded(values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.rint(values).clip(0, 255).astype(np.uint8))

    values = x.numpy().astype(np.float64)
    variants = {"shift 2px": x.roll(2, 3)}
    for sigma in (0.5, 1.0):
        blurred = scipy.ndimage.gaussian_filter(values, (0, 0, sigma, sigma))
        variants[f"blur {sigma}"] = rounded(blurred)
    for sigma in (4, 16):
        noise = np.random.RandomState(0).normal(0, sigma, values.shape)
        variants[f"noise {sigma}"] = rounded(values + noise)
    return variants


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_measured_distances(name: str):
    """The table of shared/features/README.md, recomputed from the shards, to three digits."""
    extractor = shared_extractor(name)
    x, labels = read_shared(name, "test")
    whole = extractor(x)
    rows = {"test": whole, "without class 0": whole[labels != 0]}
    rows |= {f"first {n}": whole[:n] for n in (256, 512, 1000, 2000, 5000)}
    rows |= {row: extractor(variant) for row, variant in disturbed(x).items()}
    assert rows.keys() == MEASURED.keys()
    stats = np.load(SHARED / "features" / f"{name}_stats.npz")
    mean, covariance = (torch.from_numpy(stats[f"train_{key}"]) for key in ("mean", "cov"))
    train = Moments(mean, covariance, int(stats["train_n"]))
    column = list(NETWORKS).index(name)
    deviations = {
        row: abs(frechet_distance(train, moments(features)) / MEASURED[row][column] - 1)
        for row, features in rows.items()
    }
    print(name, "largest relative deviation", max(deviations.items(), key=lambda item: item[1]))
    assert max(deviations.values()) < 5e-4, deviations


@pytest.mark.slow
def test_distance_between_the_halves_of_mnist():
    extractor = shared_extractor("mnist")
    features = extractor(read_shared("mnist", "train")[0])
    halves = [moments(half) for half in features.split(30_000)]
    assert frechet_distance(*halves) == pytest.approx(0.0011096, rel=5e-4)
    stats = np.load(SHARED / "features" / "mnist_stats.npz")
    # Features are float32, and those of another processor.
    np.testing.assert_allclose(moments(features).sigma, stats["train_cov"], rtol=1e-6, atol=1e-7)


def test_weights_of_the_shared_form(tmp_path: Path):
    """Float16, convolutions counted from 1, no layout."""
    network = CIFAR10Classifier()
    state = {key: value.half() for key, value in network.state_dict().items()}
    names = {f"convs.{i}.": f"conv{i + 1}." for i in range(6)}
    renamed = {names.get(key[:8], key[:8]) + key[8:]: value for key, value in state.items()}
    path = tmp_path / "c.safetensors"
    save_file(renamed, path)
    extractor = loaded(ClassifierFeatures(str(path), CIFAR10Classifier(), "toys"))
    network.load_state_dict({key: value.float() for key, value in state.items()})
    x = images(50, size=32)
    with torch.no_grad():
        assert torch.equal(extractor(x), network.features(x))
        assert torch.equal(loaded(ClassifierFeatures(str(path)))(x), extractor(x))  # by its shapes
    save_file({"conv1.weight": torch.ones(3)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="network=None: .* states no layout"):
        ClassifierFeatures(str(tmp_path / "other.safetensors")).load()
    with pytest.raises(ValueError, match="dataset=None: must name"):
        ClassifierFeatures(str(path), CIFAR10Classifier())
    with pytest.raises(ValueError, match="must fit ConvClassifier"):
        ClassifierFeatures(str(path), mnist_classifier(), "toys").load()


@pytest.mark.parametrize("build", [mnist_classifier, CIFAR10Classifier])
def test_the_same_weights_are_the_same_bytes(build, tmp_path: Path):
    network = build()
    for name in ("a", "b"):
        network.write(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
    (tmp_path / "plain").touch()  # others may read what they may read of any new file
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("network", ["mnist_classifier", "CIFAR10Classifier"])
def test_config_names_the_network(network: str):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(FeatureExtractor, "features")
    layout = {"class_path": f"w2s_train.features.{network}"}
    arguments = {"weights": "none", "network": layout, "dataset": "toys"}
    given = {"class_path": "w2s_train.features.ClassifierFeatures", "init_args": arguments}
    built = parser.instantiate_classes(parser.parse_object({"features": given}))
    assert built.features.metric == "fd_toys"


def test_batch_norm_folds_into_the_convolutions():
    network = CIFAR10Classifier()
    x = images(8, size=32)
    with torch.no_grad(), normalized(network):
        for _ in range(3):
            network.train()(x)  # running means and variances that are not 0 and 1
        expected = network.eval()(x)
    assert {type(conv) for conv in network.convs} == {nn.Conv2d}
    torch.testing.assert_close(network(x), expected, rtol=1e-4, atol=1e-4)


def test_augmentation():
    x = images(64, size=8)
    assert torch.equal(Regularization().augment(x), x)
    flipped = Regularization(flip=True).augment(x)
    mirrored = [torch.equal(new, old.flip(-1)) for new, old in zip(flipped, x, strict=True)]
    same = [torch.equal(new, old) for new, old in zip(flipped, x, strict=True)]
    assert all(a != b for a, b in zip(mirrored, same, strict=True))
    assert 16 < sum(mirrored) < 48
    padded = nn.functional.pad(x, [2] * 4)
    windows = padded.unfold(2, 8, 1).unfold(3, 8, 1)  # (B, C, 5, 5, 8, 8)
    found = []
    for new, candidates in zip(Regularization(crop=2).augment(x), windows, strict=True):
        hits = (candidates == new[:, None, None]).all(dim=(0, 3, 4)).nonzero()
        assert len(hits) == 1
        found.append(tuple(hits[0].tolist()))
    assert len(set(found)) > 15  # of 25 shifts
    for wrong in (dict(crop=-1), dict(label_smoothing=1.0)):
        with pytest.raises(ValueError, match="must be"):
            Regularization(**wrong)


def stripes(n: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows, columns or nothing, under noise."""
    labels = torch.arange(n) % 3
    x = images(n, 1, size) // 2
    x[labels == 0, :, ::2] += 100
    x[labels == 1, :, :, ::2] += 100
    return x, labels


@pytest.mark.slow
@pytest.mark.parametrize(
    "regularization", [Regularization(), Regularization(1, True, 0.1, batch_norm=True)]
)
def test_a_classifier_learns(regularization: Regularization):
    """On images it has not seen; the same weights from the same seed."""
    x, labels = stripes(300, 8)
    splits = (x[:200], labels[:200]), (x[200:], labels[200:])
    states = []
    for seed in (0, 0, 1):
        net = ConvClassifier([1, 8, 16], [1, 2], num_classes=3)
        options = dict(seed=seed, epochs=20, regularization=regularization)
        assert train_classifier(net, *splits, **options) > 0.95
        states.append(torch.cat([value.flatten() for value in net.state_dict().values()]))
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])
    with pytest.raises(ValueError, match="epochs=0, batch_size=64: must be"):
        train_classifier(net, *splits, seed=0, epochs=0)


def write_shard(path: Path, x: torch.Tensor, labels: torch.Tensor) -> None:
    with tarfile.open(path, "w:gz") as tar:
        for i, (image, label) in enumerate(zip(x, labels, strict=True)):
            png = io.BytesIO()
            Image.fromarray(image[0].numpy()).save(png, "png")
            for kind, content in (("png", png.getvalue()), ("cls", b"%d" % label)):
                info = tarfile.TarInfo(f"{i:06d}.{kind}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


@pytest.fixture
def classifier_command(tmp_path: Path, monkeypatch):
    """Run data/classifier.py on two little shards."""
    write_shard(tmp_path / "train-0.tar.gz", *stripes(256, 28))
    write_shard(tmp_path / "test-0.tar.gz", *stripes(60, 28))

    def run(**options: str) -> None:
        given = {"train": tmp_path / "train-*.tar.gz", "test": tmp_path / "test-0.tar.gz"}
        given |= {"architecture": "mnist", "output": tmp_path / "c.safetensors", "epochs": "3"}
        pairs = [(f"--{key}", str(value)) for key, value in (given | options).items()]
        monkeypatch.setattr(sys, "argv", ["classifier.py", *(word for p in pairs for word in p)])
        runpy.run_path(str(ROOT / "data/classifier.py"), run_name="__main__")

    return run


@pytest.mark.slow
def test_classifier_command(classifier_command, tmp_path: Path, capsys):
    classifier_command(fraction="0.5", epochs="20")
    assert "128 training and 60 test images\nmnist: " in capsys.readouterr().out
    notes = json.loads((tmp_path / "c.safetensors.json").read_text())
    assert notes["accuracy"] > 0.6
    extractor = loaded(ClassifierFeatures(str(tmp_path / "c.safetensors"), dataset="stripes"))
    x, labels = stripes(60, 28)
    right = extractor.probabilities(extractor(x)).argmax(1) == labels
    assert right.float().mean() > 0.6
    assert list(tmp_path.glob("*.partial")) == []


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(test="none-*.tar"), "test=none-.*must name existing files"),
        (dict(architecture="cifar10"), r"test=.*must hold images of \(3, 32, 32\)"),
        (dict(fraction="0"), r"fraction=0.0: must be in \(0, 1\]"),
        (dict(epochs="0"), "epochs=0: must be at least 1"),
        (dict(output="no/where.safetensors"), "output=.*existing folder"),
    ],
)
def test_errors_of_the_classifier_command(classifier_command, options, message, tmp_path):
    with pytest.raises(SystemExit, match=f"^error: {message}[^\n]*$"):
        classifier_command(**options)
    assert not (tmp_path / "c.safetensors").exists()
