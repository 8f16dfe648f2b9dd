"""Scores of images that lie in a folder, whoever has made them."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from w2s_train.errors import UserError
from w2s_train.evaluation.fid import FID
from w2s_train.features import FeatureExtractor
from w2s_train.features.base import BLOCK
from w2s_train.features.frechet import FeatureSums
from w2s_train.metrics import FeatureMetric
from w2s_train.shards.decode import BrokenImage, decode_image

# Of `lightning sample` and `lightning imagine`, beside their images.
BESIDE = ("sampling.json", "imagine.json", "sheet.png", ".imagine.lock")


def score_folder(
    folder: str | Path,
    reference: str | Path,
    features: FeatureExtractor,
    metrics: Sequence[FeatureMetric] = (),
) -> dict[str, float]:
    """The Fréchet distance and other scores of all images below a folder, by name.

    Scores depend on the number of images, and images on how they were resized: compare at equal
    numbers, of images that were resized alike.

    Args:
        folder: Of image files, in sub-folders or not; in the order of their paths.
        reference: An ``.npz`` of ``lightning reference``, or of preparation.
        features: The extractor that the reference was made with.
        metrics: Beside the distance.

    Raises:
        UserError: No images, one that cannot be read or is of another shape, fewer than two, or a
            reference of something else.
    """
    fid = FID(str(reference), features, list(metrics))
    fid.load(None, None)
    paths = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    return score_files(fid, [path for path in paths if path.name not in BESIDE], folder)


def score_files(fid: FID, paths: Iterable[Path], folder: str | Path) -> dict[str, float]:
    """The same of these images, by a loaded FID, on its extractor's device.

    Args:
        fid: What is computed.
        paths: Of the images.
        folder: Where they lie, for errors.

    Raises:
        UserError: See `score_folder`.
    """
    device = next(fid.extractor.parameters(), torch.zeros(0)).device
    sums, kept = FeatureSums(fid.extractor.num_features, device), list[Tensor]()
    for images in _blocks(paths, folder):
        fid.check_shape(images)
        found = fid.extractor(images.to(device))
        sums.update(found)
        kept += [found] if fid.metrics else []
    if sums.count < 2:
        raise UserError(f"folder={folder}: must hold at least 2 images, has {sums.count}")
    return fid.scores(sums, kept)


def _blocks(paths: Iterable[Path], folder: str | Path) -> Iterator[Tensor]:
    """Images (N, C, H, W) uint8, N at most the block of extractors."""
    waiting = list[Tensor]()
    for path in paths:
        try:
            image = decode_image(path.read_bytes())
        except BrokenImage as error:
            raise UserError(f"folder={folder}: {path} cannot be read ({error})") from error
        if waiting and (len(waiting) == BLOCK or image.shape != waiting[0].shape):
            yield torch.stack(waiting)
            waiting = []
        waiting.append(image)
    if waiting:
        yield torch.stack(waiting)
