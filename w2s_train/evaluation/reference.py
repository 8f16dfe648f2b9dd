"""Reference statistics: of images at hand, for `lightning reference`, and published ones."""

import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from w2s_train.errors import UserError
from w2s_train.evaluation.fid import FID, summed
from w2s_train.evaluation.scorer import gather
from w2s_train.features import fingerprint, shape_name
from w2s_train.features.base import KEEP, FeatureExtractor
from w2s_train.features.frechet import FeatureSums, Moments, Reference
from w2s_train.files import sha256_of

ASYMMETRY = 1e-3  # of a covariance, at most, relative to its largest value: float32 rounds


def write_reference(
    path: Path,
    extractor: FeatureExtractor,
    images: Tensor,
    *,
    dataset: str,
    split: str,
    encoding: str = "png",
) -> None:
    """Write the statistics of images (N, C, H, W) uint8, with their fingerprint."""
    features = extractor(images)
    sums = FeatureSums(extractor.num_features)
    sums.update(features)
    about = fingerprint(
        extractor,
        dataset=dataset,
        split=split,
        n=len(images),
        images=shape_name(images.shape[1:]),
        encoding=encoding,
    )
    Reference(sums.moments(), about, features[:KEEP]).save(path)


def read_published(path: Path, extractor: FeatureExtractor) -> tuple[Tensor, Tensor]:
    """Mean (F,) and covariance (F, F) float64 of an ``.npz`` as clean-fid and ADM publish them.

    Nothing in such a file says what made it: what contradicts the extractor is refused, and the
    rest is the user's word.

    Args:
        path: The file, with arrays mu and sigma; others, such as ADM's images, are not read.
        extractor: What must have made them, loaded.

    Raises:
        UserError: They cannot be read, or are not this extractor's.
    """
    if not path.is_file():
        raise UserError(f"statistics={path}: must be an existing file")
    try:
        with np.load(path, allow_pickle=False) as file:
            names = set(file.files)
            if missing := {"mu", "sigma"} - names:
                raise UserError(f"statistics={path}: lacks {', '.join(sorted(missing))}")
            mu, sigma = (torch.from_numpy(file[name]).double() for name in ("mu", "sigma"))
    except UserError:
        raise
    except (OSError, ValueError, EOFError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        reason = type(error).__name__
        raise UserError(f"statistics={path}: must be an .npz of arrays ({reason})") from error
    except zlib.error as error:
        raise UserError(f"statistics={path}: must be a whole .npz (zlib.error)") from error
    size, kind = extractor.num_features, type(extractor).__name__
    if mu.shape != (size,) or sigma.shape != (size, size):
        raise UserError(
            f"statistics={path}: must be of the {size:,} features of {kind}; mu and sigma have "
            f"shapes {tuple(mu.shape)} and {tuple(sigma.shape)}"
        )
    _check_made_by(path, names, extractor)
    finite = bool(mu.isfinite().all() and sigma.isfinite().all())
    if not finite or (sigma - sigma.T).abs().max() > ASYMMETRY * sigma.abs().max():
        raise UserError(f"statistics={path}: must be finite, and sigma symmetric")
    if sigma.diag().min() < 0:
        raise UserError(f"statistics={path}: must have variances of at least 0")
    return mu, sigma


def _check_made_by(path: Path, names: set[str], extractor: FeatureExtractor) -> None:
    """Refuse what is known to be another protocol's, of as many features."""
    makers = {"fid": "ADM's evaluator", "fid_adm": "clean-fid"}  # of the other files
    signs = {"fid": "mu_s" in names, "fid_adm": "_clean_" in path.name}
    other = makers.get(extractor.metric) if signs.get(extractor.metric) else None
    if extractor.metric in makers and "legacy" in path.name:
        other = "clean-fid in a legacy mode, which resizes otherwise"
    if other is not None:
        raise UserError(
            f"statistics={path}: must be of {type(extractor).__name__} ({extractor.describe()}); "
            f"it is of {other}"
        )


class ReferenceWriter(Callback):
    """Takes in every image of a data set once and writes its statistics.

    Args:
        fid: Whose extractor is used.
        output: File to write.
        dataset: Name of the data set.
        split: Name of its part.
        keep: Features of at most so many images are kept one by one, for metrics that compare
            single images. Which ones depends on the data set alone.
    """

    def __init__(self, fid: FID, output: Path, *, dataset: str, split: str, keep: int) -> None:
        self.extractor, self.output = fid.extractor, output
        self.dataset, self.split, self.keep = dataset, split, keep

    def check(self) -> None:
        """Refuse to write over the statistics of something else.

        Raises:
            UserError: There are some.
        """
        if not self.output.is_file():
            return
        try:
            there = Reference.load(self.output).fingerprint
        except UserError:
            return  # a broken file, which is to be made anew
        if (there["dataset"], there["split"]) != (self.dataset, self.split):
            raise UserError(
                f"output={self.output}: holds {there['dataset']} {there['split']}, must be new for "
                f"{self.dataset} {self.split}"
            )

    def take_over(self, path: Path, images: int | None) -> None:
        """Write published statistics as the reference, with where they are from.

        Args:
            path: See `read_published`.
            images: How many they were made of, if that is known.

        Raises:
            UserError: See `read_published`.
        """
        self.extractor.load()
        mu, sigma = read_published(path, self.extractor)
        about: dict[str, str | int] = {
            "dataset": self.dataset,
            "split": self.split,
            "n": images or "unknown",
            "source": f"{path.name} sha256:{sha256_of(path)}",
            "extractor": self.extractor.describe(),  # as the config says, and not as the file does
        }
        empty = torch.zeros(0, self.extractor.num_features)
        Reference(Moments(mu, sigma, images or 0), about, empty).save(self.output)
        rank_zero_info(f"{self.output}: of {path}, {self.extractor.describe()}")

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.extractor.load()
        self.extractor.to(pl_module.device)
        size = self.extractor.num_features
        self.sums = FeatureSums(size, pl_module.device)
        self.kept = (torch.zeros(0, dtype=torch.float64), torch.zeros(0, size))
        self.shapes, self.encodings = set[str](), set[str]()

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: dict[str, Any],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        features = self.extractor(outputs)  # of images (B, C, H, W) uint8
        self.sums.update(features)
        self.shapes.add(shape_name(outputs.shape[1:]))
        self.encodings |= set(batch["encoding"])
        # A random subset: the smallest of one random number an image, fixed by its place.
        numbers = [np.random.default_rng((0, *place)).random() for place in batch["place"]]
        numbered = (torch.tensor(numbers, dtype=torch.float64), features.cpu())
        self.kept = self._smallest([self.kept, numbered])

    def _smallest(self, parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        numbers = torch.cat([numbers for numbers, _ in parts])
        features = torch.cat([features for _, features in parts])
        order = numbers.argsort()[: self.keep]
        return numbers[order], features[order]

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        sums = summed(self.sums, trainer)
        kept, *names = zip(*gather((self.kept, self.shapes, self.encodings), trainer), strict=True)
        if not trainer.is_global_zero:
            return
        shapes, encodings = (sorted(set().union(*each)) for each in names)
        if len(shapes) != 1 or sums.count < 2:
            raise UserError(
                f"images={shapes}: must be two images or more of one shape (channels, height, "
                f"width); these are {sums.count}"
            )
        about = fingerprint(
            self.extractor,
            dataset=self.dataset,
            split=self.split,
            n=sums.count,
            images=shapes[0],
            encoding=", ".join(encodings),
        )
        _, features = self._smallest(list(kept))
        Reference(sums.moments(), about, features).save(self.output)
        rank_zero_info(f"{self.output}: {sums.count:,} images, {self.extractor.describe()}")
