"""Scores of a folder are those that a run would give the same images."""

from pathlib import Path

import pytest
import torch
from conftest import images, loaded
from PIL import Image

from w2s_train.errors import UserError
from w2s_train.evaluation.folder import score_folder
from w2s_train.features import ClassifierFeatures, fingerprint, mnist_classifier
from w2s_train.features.frechet import Moments, Reference, frechet_distance
from w2s_train.metrics import ClassAgreement, KernelDistance, PrecisionRecall


@pytest.fixture
def features(tmp_path: Path) -> ClassifierFeatures:
    mnist_classifier().save(tmp_path / "classifier.safetensors")
    return loaded(ClassifierFeatures(str(tmp_path / "classifier.safetensors")))


def moments(x: torch.Tensor) -> Moments:
    return Moments(x.double().mean(0), torch.cov(x.double().T), len(x))


def written(folder: Path, x: torch.Tensor) -> Path:
    for i, image in enumerate(x):
        path = folder / f"{i % 3}" / f"{i:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0].numpy()).save(path)
    return folder


def test_the_scores_by_hand(features: ClassifierFeatures, tmp_path: Path):
    """In the order of paths; 130 images, which are two blocks and a half."""
    known, made = images(150, 1, 8), images(130, 1, 8)
    about = dict(dataset="toys", split="train", n=150, images="1x8x8", encoding="png")
    reference = Reference(moments(features(known)), fingerprint(features, **about), features(known))
    reference.save(tmp_path / "reference.npz")
    folder = written(tmp_path / "made", made)
    metrics = [KernelDistance(subsets=3, subset_size=50), PrecisionRecall()]
    scores = score_folder(folder, tmp_path / "reference.npz", features, metrics)

    order = sorted(range(130), key=lambda i: (i % 3, i))
    found = features(made[order])
    name = features.metric.removeprefix("fd_")
    expected = {features.metric: frechet_distance(moments(found), moments(features(known)))}
    for metric in metrics:
        for key, value in metric.compute(found, features(known), features).items():
            expected[f"{key}_{name}"] = value
    assert scores == pytest.approx(expected, rel=1e-5)

    with pytest.raises(UserError, match="ClassAgreement: must know .*, images of a folder"):
        score_folder(folder, tmp_path / "reference.npz", features, [ClassAgreement()])
    Image.fromarray(images(1, 1, 9)[0, 0].numpy()).save(folder / "odd.png")
    with pytest.raises(UserError, match="was made with images 1x8x8, must be 1x9x9"):
        score_folder(folder, tmp_path / "reference.npz", features)
    (folder / "odd.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"odd\.png cannot be read"):
        score_folder(folder, tmp_path / "reference.npz", features)
    with pytest.raises(UserError, match="must hold at least 2 images, has 0"):
        score_folder(tmp_path / "nowhere", tmp_path / "reference.npz", features)
