"""The data sets of torchvision, as it downloads and reads them."""

import io
from pathlib import Path

import numpy as np
import torchvision.datasets
from PIL import Image

from w2s_train.errors import UserError
from w2s_train.preparation.base import Identity, Images, digest

SPLITS = {
    "CIFAR10": ("train", "test"),
    "CIFAR100": ("train", "test"),
    "MNIST": ("train", "test"),
    "ImageNet": ("train", "val"),
}


def torchvision_images(name: str, root: Path, split: str, *, download: bool) -> Images:
    """A data set by its name.

    Args:
        name: One of ``SPLITS``.
        root: Folder that torchvision reads, and downloads to.
        split: One of its splits.
        download: Fetch it if it is missing; ImageNet has to be fetched by hand.

    Raises:
        UserError: An unknown split, or a data set that is missing or damaged.
    """
    if split not in SPLITS[name]:
        raise UserError(f"split={split}: must be one of {', '.join(SPLITS[name])} for {name}")
    if name == "ImageNet" and download:
        raise UserError("download: not for ImageNet; put its archives, unpacked or not, in --root")
    try:
        if name == "ImageNet":
            return ImageFiles(torchvision.datasets.ImageNet(root, split=split), split)
        kind = getattr(torchvision.datasets, name)
        return ImageArrays(kind(root, train=split == "train", download=download), split)
    except (RuntimeError, OSError) as error:
        hint = "" if download or name == "ImageNet" else "; --download fetches it"
        reason = " ".join(str(error).split()).partition(". You can use")[0]
        raise UserError(f"root={root}: must hold {name}{hint} ({reason})") from error


def _identity(
    dataset: torchvision.datasets.VisionDataset, split: str, content: list[str]
) -> Identity:
    return {"source": type(dataset).__name__, "part": split, "files": digest(content)}


class ImageArrays(Images):
    """A data set that torchvision holds in memory: CIFAR-10, CIFAR-100, MNIST.

    Args:
        dataset: The data set.
        split: Which part of it this is.
    """

    def __init__(self, dataset: torchvision.datasets.VisionDataset, split: str) -> None:
        self.pixels = np.asarray(dataset.data)
        self.labels = np.asarray(dataset.targets, np.int64)
        self.classes = list(dataset.classes)
        self.identity = _identity(dataset, split, [self.labels.tobytes().hex()])
        self.notes = []

    def name(self, index: int) -> str:
        return f"image {index}"

    def content(self, index: int) -> bytes:
        # A format without compression, which no shard holds: `Conversion` encodes it, once.
        file = io.BytesIO()
        Image.fromarray(self.pixels[index]).save(file, "ppm")
        return file.getvalue()


class ImageFiles(Images):
    """A data set of files: ImageNet.

    Args:
        dataset: The data set.
        split: Which part of it this is.
    """

    def __init__(self, dataset: torchvision.datasets.ImageNet, split: str) -> None:
        self.folder = Path(dataset.split_folder)
        self.files = [str(Path(path).relative_to(self.folder)) for path, _ in dataset.samples]
        self.labels = np.array(dataset.targets, np.int64)
        self.classes = [", ".join(names) for names in dataset.classes]
        self.identity = _identity(dataset, split, self.files)
        self.notes = []

    def name(self, index: int) -> str:
        return self.files[index]

    def content(self, index: int) -> bytes:
        return (self.folder / self.files[index]).read_bytes()
