"""Published statistics, as clean-fid and ADM have them, become references with their provenance."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, moments
from test_fid import classifier, images  # noqa: F401 (a fixture)

from w2s_train.errors import UserError
from w2s_train.evaluation.fid import FID
from w2s_train.evaluation.reference import ReferenceWriter, read_published
from w2s_train.features import FeatureExtractor
from w2s_train.features.frechet import Reference, frechet_distance
from w2s_train.metrics import KernelDistance


@pytest.fixture
def published(classifier, tmp_path: Path) -> Path:  # noqa: F811
    """Of forty images, as those who publish have it: two arrays of float64 and nothing else."""
    x = classifier(images(40)).double().numpy()
    np.savez(tmp_path / "toys.npz", mu=x.mean(0), sigma=np.cov(x, rowvar=False))
    return tmp_path / "toys.npz"


def take_over(extractor: FeatureExtractor, path: Path, number: int | None = None) -> Path:
    fid = FID(str(path.with_name("reference.npz")), extractor)
    writer = ReferenceWriter(fid, fid.reference_path, dataset="toys", split="published", keep=9)
    writer.check()
    writer.take_over(path, number)
    return fid.reference_path


def test_they_become_a_reference(classifier, published: Path):  # noqa: F811
    """With the same distances, and with what it is known that they are of."""
    reference = Reference.load(take_over(classifier, published))
    other = moments(classifier(images(60)))
    torch.manual_seed(0)
    stored = np.load(published)
    assert np.array_equal(reference.moments.mu, stored["mu"])
    assert np.array_equal(reference.moments.sigma, stored["sigma"])
    assert frechet_distance(other, reference.moments) > 0
    digest = hashlib.sha256(published.read_bytes()).hexdigest()
    assert reference.fingerprint == {
        "dataset": "toys",
        "split": "published",
        "n": "unknown",
        "source": f"toys.npz sha256:{digest}",
        "extractor": classifier.describe(),
    }
    FID(str(published.with_name("reference.npz")), classifier).load(None, None)
    assert Reference.load(take_over(classifier, published, 40)).fingerprint["n"] == 40


def test_metrics_of_single_images_are_refused(classifier, published: Path):  # noqa: F811
    path = take_over(classifier, published)
    fid = FID(str(path), classifier, [KernelDistance()])
    with pytest.raises(UserError, match="no features of single images, which KernelDistance needs"):
        fid.load(None, None)


@pytest.mark.parametrize(
    "arrays, message",
    [
        (dict(mu=np.zeros(16)), "lacks sigma"),
        (dict(mu=np.zeros(8), sigma=np.eye(8)), r"of the 16 features of .* \(8,\) and \(8, 8\)"),
        (dict(mu=np.zeros(16), sigma=np.eye(15)), "of the 16 features"),
        (dict(mu=np.full(16, np.nan), sigma=np.eye(16)), "must be finite, and sigma symmetric"),
        (dict(mu=np.zeros(16), sigma=np.tri(16)), "must be finite, and sigma symmetric"),
        (dict(mu=np.zeros(16), sigma=-np.eye(16)), "variances of at least 0"),
        (dict(mu=np.array([{}] * 16), sigma=np.eye(16)), "must be an .npz of arrays .ValueError"),
    ],
)
def test_what_is_refused(classifier, tmp_path: Path, arrays: dict, message: str):  # noqa: F811
    path = tmp_path / "a.npz"
    np.savez(path, **arrays)
    with pytest.raises(UserError, match=f"^statistics={path}: .*{message}"):
        read_published(path, classifier)


@pytest.mark.parametrize("content", [None, b"", b"PK\3\4 no zip", b"text"])
def test_what_is_no_file_of_arrays(classifier, tmp_path: Path, content: bytes | None):  # noqa: F811
    path = tmp_path / "a.npz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=f"^statistics={path}: must be"):
        read_published(path, classifier)


class Known(FeatureExtractor):
    """Has the name and the size of an extractor whose weights are not here."""

    num_features = 4

    def __init__(self, metric: str) -> None:
        super().__init__()
        self.metric = metric

    def load(self) -> None:
        pass

    def describe(self) -> str:
        return self.metric

    def features(self, images: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


ADM = "VIRTUAL_imagenet256_labeled.npz"


@pytest.mark.parametrize(
    "metric, name, reason",
    [
        ("fid_adm", ADM, None),
        ("fid", "cifar10_clean_train_32.npz", None),
        ("fid", ADM, "ADM's evaluator"),
        ("fid_adm", "cifar10_clean_train_32.npz", "clean-fid"),
        ("fid", "cifar10_legacy_tensorflow_train_32.npz", "clean-fid in a legacy mode"),
        ("fid_adm", "cifar10_legacy_pytorch_train_32.npz", "clean-fid in a legacy mode"),
    ],
)
def test_protocols_of_equal_size(tmp_path: Path, metric: str, name: str, reason: str | None):
    """Are told apart by what else is in the file, and by how its makers name it."""
    arrays = dict(mu=np.zeros(4, np.float32), sigma=np.eye(4, dtype=np.float32))
    if name == ADM:  # which has images, too, and spatial features
        arrays |= dict(mu_s=np.zeros(3), sigma_s=np.eye(3), arr_0=np.zeros((2, 4, 4, 3), np.uint8))
    path = tmp_path / name
    np.savez(path, **arrays)
    if reason is None:
        mu, sigma = read_published(path, Known(metric))
        assert (mu.dtype, sigma.tolist()) == (torch.float64, np.eye(4).tolist())
    else:
        with pytest.raises(UserError, match=f"must be of Known .{metric}.; it is of {reason}"):
            read_published(path, Known(metric))


@pytest.mark.slow
def test_the_command(command, tmp_path: Path):
    """Takes them over, and scores state where they are from."""
    stored = Reference.load(ROOT / "data/digits/reference.npz").moments
    np.savez(tmp_path / "digits.npz", mu=stored.mu, sigma=stored.sigma)
    output = tmp_path / "reference.npz"
    options = [f"--statistics={tmp_path / 'digits.npz'}", "--images=1497", f"--output={output}"]
    command("reference", *options)
    with pytest.raises(SystemExit, match="urls=.*: must be left out where statistics"):
        command("reference", *options, "--urls=data/digits/train-*.tar")
    with pytest.raises(SystemExit, match="images=9: must come with statistics"):
        command("reference", "--images=9", f"--output={output}")
    with pytest.raises(SystemExit, match="keep_features=9: must be left out where statistics"):
        command("reference", *options, "--keep_features=9")
    callback = (
        f"--trainer.callbacks=[{{class_path: w2s_train.callbacks.FID, init_args: {{reference: "
        f"{output}, features: {{class_path: w2s_train.features.ClassifierFeatures, init_args: "
        "{weights: data/digits/classifier.safetensors}}}}]"
    )
    folder = command("fit", callback)
    plain = command("fit", folder="plain")
    scores, expected = (json.loads((f / "scores.json").read_text()) for f in (folder, plain))
    assert [s["value"] for s in scores] == [s["value"] for s in expected]
    reference = scores[0]["protocol"]["reference"]
    assert reference["source"].startswith("digits.npz sha256:")
    assert (reference["n"], reference["split"]) == (1497, "published")
