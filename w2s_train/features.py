"""Feature extractors for Fréchet distances.

`InceptionFeatures` makes the distance the FID of clean-fid. Where nothing can be downloaded, a
small classifier trained on the data set itself serves: its distances are *not* FID and are named
differently (`FeatureExtractor.metric`).
"""

import abc
import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from cleanfid.downloads_helper import check_download_inception
from cleanfid.inception_torchscript import InceptionV3W
from cleanfid.resize import build_resizer
from filelock import FileLock
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from w2s_train.errors import UserError
from w2s_train.frechet import Moments, Reference

# Convolutions of some libraries round differently for some batch sizes. Features are computed in
# blocks of one size, so that they depend on the image alone.
BLOCK = 50


class FeatureExtractor(nn.Module, abc.ABC):
    """Images to feature vectors.

    The config builds an extractor before its weights may exist; `load` reads them.
    """

    metric: str = ""  # name of the Fréchet distance in these features
    num_features: int = 0  # F, known once loaded

    def check_files(self) -> None:
        """Refuse files that are not there and cannot be fetched, without reading them.

        Raises:
            UserError: The weights are missing.
        """
        return None

    @abc.abstractmethod
    def load(self) -> None:
        """Read the weights.

        Raises:
            ValueError: They are missing or of another form.
        """

    @abc.abstractmethod
    def describe(self) -> str:
        """Name and version of weights and resizing; equal only if features are comparable."""

    @abc.abstractmethod
    def features(self, images: Tensor) -> Tensor:
        """(B, C, H, W) uint8 to (B, F) float32."""

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Features (N, F) of any number of images (N, C, H, W) uint8, whatever their grouping."""
        parts = []
        for block in images.split(BLOCK):
            padded = torch.cat([block, block[:1].expand(BLOCK - len(block), -1, -1, -1)])
            parts.append(self.features(padded)[: len(block)])
        return torch.cat(parts)


class InceptionFeatures(FeatureExtractor):
    """clean-fid's Inception-v3 (the weights of the original FID) after its anti-aliased resize.

    Args:
        folder: Where the weights are kept (``inception-2015-12-05.pt``, 91 MB); clean-fid
            downloads them there on first use.
    """

    metric = "fid"

    def __init__(self, folder: str = "~/.cache/w2s_train") -> None:
        super().__init__()
        self.folder = Path(folder).expanduser()

    def load(self) -> None:
        target = self.folder / "inception-2015-12-05.pt"
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock"):  # one process of several fetches, whole or not at all
            if not target.is_file():
                partial = self.folder / "partial"
                partial.mkdir(exist_ok=True)
                (partial / target.name).unlink(missing_ok=True)
                os.replace(check_download_inception(str(partial)), target)
        self.network = InceptionV3W(str(self.folder), download=False).requires_grad_(False)
        self.resize = build_resizer("clean")
        self.num_features = 2048

    def describe(self) -> str:
        return "clean-fid 0.1.35 inception-2015-12-05, resize clean 299"

    def features(self, images: Tensor) -> Tensor:
        rgb = images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).cpu().numpy()
        resized = torch.from_numpy(np.stack([self.resize(image) for image in rgb]))
        return self.network(resized.permute(0, 3, 1, 2).to(images.device))


class ConvClassifier(nn.Module):
    """Convolutions 3x3 with ReLU, the mean over height and width, and a linear layer.

    Args:
        channels: Channels of the input and of each convolution.
        strides: One per convolution.
        num_classes: Number of classes.
    """

    def __init__(self, channels: list[int], strides: list[int], num_classes: int) -> None:
        super().__init__()
        self.spec = dict(channels=channels, strides=strides, num_classes=num_classes)
        sizes = zip(channels[:-1], channels[1:], strides, strict=True)
        self.convs = nn.ModuleList(nn.Conv2d(i, o, 3, s, padding=1) for i, o, s in sizes)
        self.fc = nn.Linear(channels[-1], num_classes)

    def features(self, images: Tensor) -> Tensor:
        """(B, C, H, W) uint8 to (B, channels[-1])."""
        h = images.to(self.fc.weight) / 255
        for conv in self.convs:
            h = F.relu(conv(h))
        return h.mean((2, 3))

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) uint8 to logits (B, num_classes)."""
        return self.fc(self.features(images))

    def save(self, path: Path) -> "ClassifierFeatures":
        """Write weights and layout, and return the extractor that reads them."""
        state = {key: value.contiguous() for key, value in self.state_dict().items()}
        save_file(state, path, metadata={"spec": json.dumps(self.spec)})
        extractor = ClassifierFeatures(str(path))
        extractor.load()
        return extractor


class ClassifierFeatures(FeatureExtractor):
    """The last features of a `ConvClassifier`; distances in them are not FID.

    Args:
        weights: A file written by `ConvClassifier.save`; its folder names the data set.
    """

    def __init__(self, weights: str) -> None:
        super().__init__()
        self.weights = Path(weights)
        self.metric = f"fd_{self.weights.parent.name}"

    def check_files(self) -> None:
        if not self.weights.is_file():
            raise UserError(f"weights={self.weights}: must be an existing file")

    def load(self) -> None:
        self.check_files()
        with safe_open(self.weights, framework="pt") as file:
            spec = json.loads(file.metadata()["spec"])
            self.network = ConvClassifier(**spec).requires_grad_(False).eval()
            self.network.load_state_dict({key: file.get_tensor(key) for key in file.keys()})
        self.num_features = spec["channels"][-1]
        self.digest = hashlib.sha256(self.weights.read_bytes()).hexdigest()[:12]

    def describe(self) -> str:
        return f"classifier {self.weights.parent.name} sha256:{self.digest}"

    def features(self, images: Tensor) -> Tensor:
        return self.network.features(images)


@contextlib.contextmanager
def single_thread() -> Iterator[None]:
    """Let torch use one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def train_classifier(
    classifier: ConvClassifier,
    train: tuple[Tensor, Tensor],
    heldout: tuple[Tensor, Tensor],
    *,
    seed: int,
    epochs: int = 40,
    batch_size: int = 64,
) -> float:
    """Train on images (N, C, H, W) uint8 and labels (N,); returns the held-out accuracy.

    Args:
        classifier: What to train, in place; its initialization is replaced.
        train: Images and labels.
        heldout: Images and labels.
        seed: Of the initialization and the order.
        epochs: Passes over the data, with a learning rate that falls from 2e-3 to 0.
        batch_size: Rows per step.
    """
    images, labels = train
    # Sums over several threads round differently; one thread makes the weights those of the seed.
    with single_thread(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for layer in classifier.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                layer.reset_parameters()
        optimizer = torch.optim.AdamW(classifier.parameters(), lr=2e-3)
        steps = epochs * (len(images) // batch_size)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
        for _ in range(epochs):
            order = torch.randperm(len(images))[: steps // epochs * batch_size]
            for rows in order.split(batch_size):
                loss = F.cross_entropy(classifier(images[rows]), labels[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    with torch.no_grad():
        return (classifier(heldout[0]).argmax(1) == heldout[1]).float().mean().item()


def write_reference(
    path: Path, extractor: FeatureExtractor, images: Tensor, *, dataset: str, split: str
) -> None:
    """Write the statistics of images (N, C, H, W) uint8, with their fingerprint."""
    features = extractor(images).double()
    moments = Moments.from_sums(features.sum(0), features.T @ features, len(features))
    fingerprint: dict[str, str | int] = {
        "dataset": dataset,
        "split": split,
        "n": len(images),
        "resize": f"none, {images.shape[-2]}x{images.shape[-1]}",
        "extractor": extractor.describe(),
    }
    Reference(moments, fingerprint).save(path)
