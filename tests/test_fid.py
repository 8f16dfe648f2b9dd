"""The Fréchet distance against closed forms, and features that depend on the image alone."""

import json
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from conftest import moments

from w2s_train.evaluation.fid import FID
from w2s_train.evaluation.reference import write_reference
from w2s_train.features import ClassifierFeatures, ConvClassifier, FeatureExtractor
from w2s_train.features.frechet import FeatureSums, Moments, Reference, frechet_distance


def random_covariance(rank: int, size: int = 12) -> torch.Tensor:
    a = torch.randn(size, rank, dtype=torch.float64)
    return a @ a.T


def test_moments_are_numpys():
    x = torch.randn(50, 7, dtype=torch.float64) + 3
    ours = moments(x)
    np.testing.assert_allclose(ours.mu, x.mean(0))
    np.testing.assert_allclose(ours.sigma, np.cov(x.numpy(), rowvar=False), rtol=1e-10, atol=1e-12)


def test_commuting_covariances():
    """Diagonal: |mu|^2 + sum (sqrt a - sqrt b)^2."""
    a, b = torch.rand(2, 9, dtype=torch.float64)
    mu = torch.randn(9, dtype=torch.float64)
    zero = torch.zeros(9, dtype=torch.float64)
    distance = frechet_distance(Moments(mu, a.diag(), 9), Moments(zero, b.diag(), 9))
    expected = mu.square().sum() + (a.sqrt() - b.sqrt()).square().sum()
    assert distance == pytest.approx(expected.item(), rel=1e-10)


@pytest.mark.parametrize("rank, tolerance", [(12, 1e-9), (5, 1e-5)])
def test_equals_the_matrix_square_root(rank: int, tolerance: float):
    """Full rank and deficient (fewer samples than features) against SciPy's sqrtm."""
    a, b = random_covariance(rank), random_covariance(rank)
    mu_a, mu_b = torch.randn(2, 12, dtype=torch.float64)
    root = np.real(scipy.linalg.sqrtm((a @ b).numpy()))
    expected = (mu_a - mu_b).square().sum() + a.trace() + b.trace() - 2 * np.trace(root)
    ours = frechet_distance(Moments(mu_a, a, 9), Moments(mu_b, b, 9))
    assert ours == pytest.approx(float(expected), rel=tolerance)
    assert ours == pytest.approx(frechet_distance(Moments(mu_b, b, 9), Moments(mu_a, a, 9)))


def test_distance_to_itself_is_zero():
    a = Moments(torch.randn(12, dtype=torch.float64), random_covariance(5), 9)
    assert abs(frechet_distance(a, a)) < 1e-6


def test_sums_do_not_depend_on_the_grouping():
    """Nor on who saw what; none at all add nothing."""
    x = torch.randn(60, 5)
    whole, parts = FeatureSums(5), [FeatureSums(5) for _ in range(3)]
    whole.update(x)
    for i, part in enumerate(x.split(7)):
        parts[i % 2].update(part)
    for part in parts[1:]:
        parts[0].add(**part.state())
    assert parts[0].count == whole.count == 60
    ours, theirs = parts[0].moments(), moments(x)
    torch.testing.assert_close(ours.mu, theirs.mu, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(ours.sigma, theirs.sigma, rtol=1e-13, atol=1e-14)


@pytest.fixture
def classifier(tmp_path: Path) -> ClassifierFeatures:
    folder = tmp_path / "toys"
    folder.mkdir()
    return ConvClassifier([1, 8, 16], [1, 2], num_classes=3).save(folder / "classifier.safetensors")


def images(n: int) -> torch.Tensor:
    return torch.randint(0, 256, (n, 1, 8, 8), dtype=torch.uint8)


def test_features_depend_on_the_image_alone(classifier):
    """Bitwise: whatever the batch, and wherever in it."""
    x = images(120)
    whole = classifier(x)
    assert whole.shape == (120, 16)
    for size in (1, 3, 50, 77):
        assert torch.equal(torch.cat([classifier(part) for part in x.split(size)]), whole)
    order = torch.randperm(120)
    assert torch.equal(classifier(x[order]), whole[order])


def test_reference_round_trip(classifier, tmp_path: Path):
    x = images(40)
    write_reference(tmp_path / "r.npz", classifier, x, dataset="toys", split="train")
    loaded = Reference.load(tmp_path / "r.npz")
    assert loaded.fingerprint["n"] == loaded.moments.n == 40
    assert frechet_distance(loaded.moments, moments(classifier(x))) == pytest.approx(0, abs=1e-9)
    assert list(tmp_path.glob("*.partial*")) == []


def test_a_reference_of_another_extractor_is_refused(classifier, tmp_path: Path):
    write_reference(tmp_path / "r.npz", classifier, images(40), dataset="toys", split="train")
    (tmp_path / "other").mkdir()
    other = ConvClassifier([1, 8, 16], [1, 2], 3).save(
        tmp_path / "other" / "classifier.safetensors"
    )
    with pytest.raises(ValueError, match="was made with .*classifier toys .* must be .* other"):
        FID(str(tmp_path / "r.npz"), other).setup(None, None, "fit")


def test_missing_files(classifier, tmp_path: Path):
    with pytest.raises(ValueError, match="reference=.*must be an existing file"):
        Reference.load(tmp_path / "none.npz")
    with pytest.raises(ValueError, match="weights=.*must be an existing file"):
        ClassifierFeatures(str(tmp_path / "none.safetensors")).load()
    np.savez(tmp_path / "clean_fid.npz", mu=np.zeros(3), sigma=np.eye(3))
    with pytest.raises(ValueError, match="lacks fingerprint, n"):
        Reference.load(tmp_path / "clean_fid.npz")


def test_only_inception_is_called_fid(classifier):
    assert classifier.metric == "fd_toys"
    assert isinstance(classifier, FeatureExtractor)


def scores(folder: Path) -> list[dict]:
    return json.loads((folder / "scores.json").read_text())


@pytest.mark.slow
def test_scores_do_not_depend_on_the_batch_size(command):
    """Faults row 17, in one process: identical to the last stored digit."""
    folder = command("fit")
    for size in ("1", "7", "90"):
        command("validate", "--ckpt_path=last", f"--data.generation_batch_size={size}")
    fitted, *validated = [s for s in scores(folder) if s["step"] == 6]
    assert len(validated) == 3
    assert {s["value"] for s in validated} == {fitted["value"]}
    assert fitted["protocol"]["images_seen"] == 6 * 16


def test_score_entries_state_their_protocol(tiny_run: Path):
    first = scores(tiny_run)[0]
    assert first["metric"] == "fd_digits"
    assert (first["step"], first["weights"], first["guidance"]) == (3, "ema", "none")
    protocol = first["protocol"]
    assert protocol["n"] == 90
    assert protocol["seeds"] == [0, 89]
    assert protocol["reference"]["extractor"] == protocol["extractor"]
    assert protocol["reference"]["split"] == "train"
    assert (protocol["sampler"], protocol["steps"]) == ("Euler", 2)
    assert protocol["wall_clock_seconds"] > 0
    assert "git_commit" in protocol
