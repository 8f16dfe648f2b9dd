"""Scores of generated images beside the Fréchet distance, from the same features.

Each depends on the number of images: compare at equal numbers only.
"""

import abc
import hashlib
from pathlib import Path

import torch
from torch import Tensor

from w2s_train.errors import UserError, require
from w2s_train.features import FeatureExtractor, imagenet_ids
from w2s_train.files import expanded

NOTHING = torch.zeros(0, dtype=torch.long)
NEAR = 1e-4  # of the norms: doubles leave eight digits to farther ones


class FeatureMetric(abc.ABC):
    """One or more scores of feature vectors."""

    needs_reference: bool = True  # compares with the features of single reference images
    needs_labels: bool = False  # compares with the classes that images were asked for

    def check(self, generated: int | None, reference: int, extractor: FeatureExtractor) -> None:
        """Refuse what cannot be computed, before any image is made.

        Args:
            generated: Number of images to come, if that is known.
            reference: Number of single reference images.
            extractor: Where features come from.

        Raises:
            UserError: Too few images, or an extractor without what the metric needs.
        """
        return None

    def check_classes(self, classes: int, extractor: FeatureExtractor) -> None:
        """Refuse a data set whose classes the metric cannot tell apart.

        Args:
            classes: Of the data set.
            extractor: Where features come from, loaded.

        Raises:
            UserError: It cannot.
        """
        return None

    def describe(self) -> str:
        """Name and settings, for the record of a score."""
        settings = ", ".join(f"{key}={value}" for key, value in vars(self).items())
        return f"{type(self).__name__}({settings})"

    @abc.abstractmethod
    def compute(
        self,
        generated: Tensor,
        reference: Tensor,
        extractor: FeatureExtractor,
        labels: Tensor = NOTHING,
    ) -> dict[str, float]:
        """Scores by name.

        Args:
            generated: Features (N, F) float32 in the order of the generation plan.
            reference: Features (M, F) float32; empty where no reference is needed.
            extractor: Where both come from.
            labels: (N,) int64, the asked classes; empty where none are needed.
        """


class KernelDistance(FeatureMetric):
    """KID: the squared maximum mean discrepancy with the kernel (x.y / F + 1)^3, unbiased
    (Binkowski et al., 2018), averaged over random subsets. 0 at best, and below 0 by chance.

    Args:
        subsets: How many.
        subset_size: Images in a subset, at least 2; no more than there are.
        seed: Of the subsets.

    Raises:
        UserError: A number out of its range.
    """

    def __init__(self, subsets: int = 100, subset_size: int = 1000, seed: int = 0) -> None:
        self.subsets = require("subsets", subsets, "[1, inf)")
        self.subset_size = require("subset_size", subset_size, "[2, inf)")
        self.seed = seed

    def compute(
        self,
        generated: Tensor,
        reference: Tensor,
        extractor: FeatureExtractor,
        labels: Tensor = NOTHING,
    ) -> dict[str, float]:
        size = min(self.subset_size, len(generated), len(reference))
        generator = torch.Generator().manual_seed(self.seed)
        distances = []
        for _ in range(self.subsets):
            one, other = (
                x[torch.randperm(len(x), generator=generator)[:size].to(x.device)].double()
                for x in (generated, reference)
            )
            distances.append(squared_mmd(other, one))
        return {"kid": float(torch.stack(distances).mean())}


class InceptionScore(FeatureMetric):
    """exp(E KL(p(class | image) || p(class))) (Salimans et al., 2016), the mean over parts of the
    images in the order of the plan. 1 at worst, the number of classes at best.

    Args:
        splits: Number of parts, at least 1.

    Raises:
        UserError: A number out of its range; in `check`, an extractor without classes.
    """

    needs_reference = False

    def __init__(self, splits: int = 10) -> None:
        self.splits = require("splits", splits, "[1, inf)")

    def check(self, generated: int | None, reference: int, extractor: FeatureExtractor) -> None:
        if not extractor.has_probabilities:
            extractor.probabilities(torch.zeros(0, 0))  # says so

    def compute(
        self,
        generated: Tensor,
        reference: Tensor,
        extractor: FeatureExtractor,
        labels: Tensor = NOTHING,
    ) -> dict[str, float]:
        scores = []
        for part in generated.tensor_split(min(self.splits, len(generated))):
            p = torch.cat([extractor.probabilities(rows) for rows in part.split(1000)]).double()
            kl = torch.xlogy(p, p).sum(1) - torch.xlogy(p, p.mean(0)).sum(1)
            scores.append(kl.mean().exp())
        return {"inception_score": float(torch.stack(scores).mean())}


class PrecisionRecall(FeatureMetric):
    """Share of generated images near reference images, and the other way round.

    "Near" an image is within the distance to its k-th nearest neighbour of its own set
    (Kynkäänniemi et al., 2019).

    Args:
        neighbours: k, at least 1.

    Raises:
        UserError: A number out of its range; in `check`, too few images.
    """

    def __init__(self, neighbours: int = 3) -> None:
        self.neighbours = require("neighbours", neighbours, "[1, inf)")

    def check(self, generated: int | None, reference: int, extractor: FeatureExtractor) -> None:
        fewest = reference if generated is None else min(generated, reference)
        if fewest <= self.neighbours:
            raise UserError(
                f"neighbours={self.neighbours}: must be below the number of images, {fewest}"
            )

    def compute(
        self,
        generated: Tensor,
        reference: Tensor,
        extractor: FeatureExtractor,
        labels: Tensor = NOTHING,
    ) -> dict[str, float]:
        self.check(len(generated), len(reference), extractor)
        return {
            "precision": self._share_inside(generated, reference),
            "recall": self._share_inside(reference, generated),
        }

    def _share_inside(self, x: Tensor, support: Tensor) -> float:
        """Share of rows of ``x`` that are near some row of ``support``."""
        support = support.double()
        # The nearest of its own set is the row itself.
        radii = torch.cat(
            [
                exact_distances(rows, support).kthvalue(self.neighbours + 1, dim=1).values
                for rows in support.split(500)
            ]
        )
        inside = [
            (exact_distances(rows.double(), support) <= radii).any(1) for rows in x.split(500)
        ]
        return float(torch.cat(inside).double().mean())


class ClassAgreement(FeatureMetric):
    """Share of images whose most probable class is the one that was asked for ("agreement").

    For an extractor that was trained on the data set's own classes. 1 / classes by chance, 1 at
    best; of real images the extractor's accuracy.
    """

    needs_reference, needs_labels = False, True

    def check_classes(self, classes: int, extractor: FeatureExtractor) -> None:
        if not extractor.has_probabilities:
            raise UserError(
                f"{type(self).__name__}: needs an extractor with class probabilities, "
                f"{type(extractor).__name__} has none"
            )
        known = self._among(torch.zeros(1, extractor.num_features), extractor).shape[1]
        if known != classes:
            raise UserError(
                f"{type(self).__name__}: must tell the data set's {classes} classes apart, it "
                f"knows {known}"
            )

    def compute(
        self,
        generated: Tensor,
        reference: Tensor,
        extractor: FeatureExtractor,
        labels: Tensor = NOTHING,
    ) -> dict[str, float]:
        guesses = [self._among(rows, extractor).argmax(1).cpu() for rows in generated.split(1000)]
        return {"agreement": float((torch.cat(guesses) == labels.cpu()).double().mean())}

    def _among(self, features: Tensor, extractor: FeatureExtractor) -> Tensor:
        """Probabilities (N, classes) of features (N, F)."""
        return extractor.probabilities(features.to(next(extractor.parameters(), features).device))


class ImageNetAgreement(ClassAgreement):
    """The same by a classifier of ImageNet, among the data set's classes alone.

    Args:
        classes: A text file whose line n (from 0) begins with the WordNet id of class n.

    Raises:
        UserError: In `check_classes`: no such file, a line without an id of ImageNet's, or one
            twice; an extractor without ImageNet's 1,000 classes.
    """

    def __init__(self, classes: str) -> None:
        self.path, self.columns = Path(classes), list[int]()

    def check_classes(self, classes: int, extractor: FeatureExtractor) -> None:
        self.columns = self._read()
        if (n := len(self.columns)) != classes:
            raise UserError(f"classes={self.path}: must have {classes} lines, one a class, has {n}")
        super().check_classes(classes, extractor)

    def _read(self) -> list[int]:
        """Of each class its place among ImageNet's."""
        path = expanded("classes", self.path)
        if not path.is_file():
            raise UserError(f"classes={path}: must be an existing file")
        try:
            lines = path.read_text("utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise UserError(f"classes={path}: must be a text in UTF-8") from error
        ids = [(line.replace(",", " ").split() or [""])[0] for line in lines]
        known = {name: i for i, name in enumerate(imagenet_ids())}
        if wrong := [name for name in ids if name not in known]:
            raise UserError(
                f"classes={path}: must have a WordNet id of ImageNet's in each line, "
                f"{wrong[0][:40] or 'an empty line'} is none"
            )
        if len(set(ids)) < len(ids):
            raise UserError(f"classes={path}: must name each class once")
        return [known[name] for name in ids]

    def describe(self) -> str:
        digest = hashlib.sha256(repr(self.columns).encode()).hexdigest()[:12]
        return f"ImageNetAgreement({len(self.columns)} classes sha256:{digest})"

    def _among(self, features: Tensor, extractor: FeatureExtractor) -> Tensor:
        found = super()._among(features, extractor)
        if found.shape[1] != 1000:
            raise UserError(
                f"ImageNetAgreement: needs an extractor of ImageNet's 1,000 classes, this one has "
                f"{found.shape[1]:,}"
            )
        return found[:, self.columns]


def squared_mmd(x: Tensor, other: Tensor) -> Tensor:
    """The unbiased one of two sets (N, F), N >= 2, with the kernel (x.y / F + 1)^3: ()."""

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T * (1.0 / a.shape[1]) + 1.0) ** 3

    def within(a: Tensor) -> Tensor:
        of_all = kernel(a, a)
        return (of_all.sum(1) - of_all.diag()).sum()

    n = len(x)
    between = kernel(x, other).sum(0).sum()
    return (within(x) + within(other)) / (n * (n - 1)) - 2 * between / n**2


def exact_distances(x: Tensor, other: Tensor) -> Tensor:
    """Distances (N, M) between rows: by matrix products, but for small ones, which those round to
    nothing. Sixteen times as fast as all one by one.
    """
    centre = other.mean(0)
    x, other = x - centre, other - centre
    found = torch.cdist(x, other, compute_mode="use_mm_for_euclid_dist")
    size = x.norm(dim=1).unsqueeze(1) + other.norm(dim=1)
    for i, j in (pairs.unbind(1) for pairs in (found <= NEAR * size).nonzero().split(4096)):
        found[i, j] = (x[i] - other[j]).norm(dim=1)
    return found
