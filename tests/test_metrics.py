"""KID, Inception Score, precision and recall against closed forms and other implementations."""

from pathlib import Path

import cleanfid.fid
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchmetrics.image.inception import InceptionScore as TorchmetricsInceptionScore
from torchmetrics.image.kid import poly_mmd

from w2s_train.errors import UserError
from w2s_train.features import FeatureExtractor, imagenet_ids
from w2s_train.metrics import (
    ClassAgreement,
    ImageNetAgreement,
    InceptionScore,
    KernelDistance,
    PrecisionRecall,
    exact_distances,
    squared_mmd,
)

NONE = torch.zeros(0, 0)


class Logits(FeatureExtractor):
    """Features that are logits."""

    metric, num_features, has_probabilities = "fd_toys", 5, True

    def load(self) -> None:
        """Nothing."""

    def describe(self) -> str:
        return "logits"

    def features(self, images: Tensor) -> Tensor:
        return images.flatten(1).float()

    def probabilities(self, features: Tensor) -> Tensor:
        return features.softmax(1)


@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_kernel_distance_is_clean_fids(shift: float):
    """One subset of everything leaves nothing to chance; theirs is float32."""
    x, y = torch.randn(60, 7), torch.randn(60, 7) + shift
    ours = KernelDistance(subsets=1, subset_size=60).compute(x, y, Logits())["kid"]
    theirs = cleanfid.fid.kernel_distance(y.numpy(), x.numpy(), num_subsets=1, max_subset_size=60)
    assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)


def test_kernel_distance_is_torchmetrics():
    """To the last digit: recorded scores were made with theirs."""
    x, y = torch.randn(2, 90, 7, dtype=torch.float64)
    assert torch.equal(squared_mmd(x, y + 0.3), poly_mmd(x, y + 0.3))


def test_kernel_distance_is_unbiased_and_repeats():
    """Zero in the mean for equal distributions, and the same at every call."""
    values = [
        KernelDistance(20, 50).compute(torch.randn(200, 4), torch.randn(200, 4), Logits())["kid"]
        for _ in range(30)
    ]
    assert abs(np.mean(values)) < 3 * np.std(values) / 30**0.5
    x, y = torch.randn(80, 4), torch.randn(90, 4) + 1
    metric = KernelDistance(5, 30)
    assert metric.compute(x, y, Logits()) == metric.compute(x, y, Logits())
    assert metric.compute(x, y, Logits())["kid"] > max(values)


def test_inception_score_at_its_ends():
    """Certain and even predictions give the number of classes, constant ones give 1."""
    certain = 1e3 * torch.eye(5).repeat(20, 1)
    assert InceptionScore(4).compute(certain, NONE, Logits())["inception_score"] == pytest.approx(5)
    constant = torch.randn(1, 5).expand(100, -1)
    score = InceptionScore(4).compute(constant, NONE, Logits())["inception_score"]
    assert score == pytest.approx(1)


def test_inception_score_is_torchmetrics():
    x = torch.randn(200, 5) * 3
    theirs = TorchmetricsInceptionScore(feature=nn.Identity(), splits=1)
    theirs.update(x)
    ours = InceptionScore(1).compute(x, NONE, Logits())["inception_score"]
    assert ours == pytest.approx(float(theirs.compute()[0]), rel=1e-5)


def brute_force(x: np.ndarray, support: np.ndarray, k: int) -> float:
    """Kynkäänniemi et al., eq. 1 and 2, image by image."""
    inside = 0
    for row in x:
        for centre in support:
            radius = sorted(np.linalg.norm(support - centre, axis=1))[k]
            if np.linalg.norm(row - centre) <= radius:
                inside += 1
                break
    return inside / len(x)


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_by_brute_force(k: int):
    x, y = torch.randn(40, 3), torch.randn(50, 3) * 0.7 + 0.3
    found = PrecisionRecall(k).compute(x, y, Logits())
    assert found["precision"] == brute_force(x.double().numpy(), y.double().numpy(), k)
    assert found["recall"] == brute_force(y.double().numpy(), x.double().numpy(), k)


def test_distances_are_exact_also_between_rows_that_are_nearly_equal():
    """Where a matrix product would leave no digit: far from the origin, 1e-9 apart, or equal."""
    y = 1e4 + torch.rand(300, 64, dtype=torch.float64)
    x = torch.cat([y[:20], y[20:40] + 1e-9 * torch.randn(20, 64), y[40:60] + 1e-5, 1e4 + y[:40]])
    one_by_one = torch.stack([(row - y).norm(dim=1) for row in x])
    torch.testing.assert_close(exact_distances(x, y), one_by_one, rtol=1e-11, atol=0)
    same = torch.full((100, 3), 7.0, dtype=torch.float64)
    assert exact_distances(same, same).max() == 0


def test_precision_and_recall_of_a_lost_mode():
    """Half of the modes, each well: precision 1, recall a half."""
    modes = 100 * torch.eye(4).repeat_interleave(50, 0)
    reference = modes + torch.randn(200, 4)
    rows = torch.randint(0, 100, (300,))
    generated = reference[rows] + 1e-4 * torch.randn(300, 4)
    found = PrecisionRecall().compute(generated, reference, Logits())
    assert found["precision"] == 1 and 0.4 < found["recall"] <= 0.5
    same = PrecisionRecall().compute(reference, reference, Logits())
    assert same == {"precision": 1, "recall": 1}


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: KernelDistance(subsets=0), "subsets=0"),
        (lambda: KernelDistance(subset_size=1), "subset_size=1"),
        (lambda: InceptionScore(splits=0), "splits=0"),
        (lambda: PrecisionRecall(neighbours=0), "neighbours=0"),
        (
            lambda: PrecisionRecall(3).compute(torch.zeros(3, 2), torch.zeros(9, 2), Logits()),
            "neighbours=3: must be below the number of images, 3",
        ),
    ],
)
def test_bad_arguments(make, message: str):
    with pytest.raises(UserError, match=message):
        make()


class Named(Logits):
    """ImageNet's classes, one feature each."""

    num_features = 1000


def test_agreement_is_the_share_of_asked_classes():
    features = torch.eye(5)[[0, 1, 2, 3, 4, 0]] * 4
    asked = torch.tensor([0, 1, 2, 4, 3, 0])
    metric = ClassAgreement()
    metric.check_classes(5, Logits())
    assert metric.compute(features, NONE, Logits(), asked) == {"agreement": pytest.approx(4 / 6)}
    with pytest.raises(ValueError, match="must tell the data set's 7 classes apart, it knows 5"):
        metric.check_classes(7, Logits())


def test_agreement_among_the_data_sets_classes(tmp_path: Path):
    """What ImageNet's other classes would say counts for nothing; lines give the order."""
    ids = imagenet_ids()
    path = tmp_path / "classes.txt"
    path.write_text("".join(f"{ids[i]} a name, another\n" for i in (900, 3, 40)))
    features = torch.zeros(4, 1000)
    features[:, 500] = 9  # of no class here
    features[torch.arange(4), torch.tensor([900, 3, 3, 40])] = 5
    metric = ImageNetAgreement(str(path))
    metric.check_classes(3, Named())
    found = metric.compute(features, NONE, Named(), torch.tensor([0, 1, 2, 2]))
    assert found == {"agreement": pytest.approx(3 / 4)}
    with pytest.raises(ValueError, match="must have 4 lines, one a class, has 3"):
        metric.check_classes(4, Named())
    with pytest.raises(ValueError, match="needs an extractor of ImageNet's 1,000 classes"):
        metric.check_classes(3, Logits())
    path.write_text(f"{ids[0]}\n{ids[1]}\n{ids[0]}\n")
    with pytest.raises(ValueError, match="must name each class once"):
        metric.check_classes(3, Named())
    path.write_text(f"{ids[0]}, tench\n\n{ids[1]}\n")
    with pytest.raises(ValueError, match="an empty line is none"):
        metric.check_classes(2, Named())
    path.write_bytes(ids[0].encode("utf-16"))
    with pytest.raises(ValueError, match="must be a text in UTF-8"):
        metric.check_classes(1, Named())
    path.write_text("n00000000 nothing\n")
    with pytest.raises(ValueError, match="n00000000 is none"):
        metric.check_classes(1, Named())
    with pytest.raises(ValueError, match="must be an existing file"):
        ImageNetAgreement(str(tmp_path / "none.txt")).check_classes(3, Named())
