"""Small classifiers, and the Fréchet distances in their last features; these are not FID."""

import abc
import json
import re
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

from w2s_train.errors import UserError
from w2s_train.features.base import FeatureExtractor, digest
from w2s_train.files import atomic_write


class Classifier(nn.Module, abc.ABC):
    """Convolutions ``convs``, each followed by ReLU, a mean over height and width, and ``fc``.

    Args:
        layers: Input channels, output channels and stride of each 3x3 convolution, padding 1.
        num_classes: Number of classes.
    """

    def __init__(self, layers: list[tuple[int, int, int]], num_classes: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(i, o, 3, s, padding=1) for i, o, s in layers)
        self.num_features = layers[-1][1]
        self.fc = nn.Linear(self.num_features, num_classes)

    @abc.abstractmethod
    def cells(self, images: Tensor) -> Tensor:
        """(B, C, H, W) uint8 to (B, num_features, h, w)."""

    def features(self, images: Tensor) -> Tensor:
        """(B, C, H, W) uint8 to (B, num_features)."""
        return self.cells(images).mean((2, 3))

    def layout(self) -> dict[str, str]:
        """What a file of the weights says about their layout; empty if the class says it all."""
        return {}

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) uint8 to logits (B, num_classes)."""
        return self.fc(self.features(images))

    def write(self, path: Path) -> None:
        """Write weights and layout, whole or not at all; same weights, same bytes."""
        state = {key: value.contiguous() for key, value in self.state_dict().items()}
        with atomic_write(path) as file:
            file.write(save(state, metadata=self.layout()))


class ConvClassifier(Classifier):
    """A chain of convolutions on u = x / 255.

    Args:
        channels: Channels of the input and of each convolution.
        strides: One per convolution.
        num_classes: Number of classes.
    """

    def __init__(self, channels: list[int], strides: list[int], num_classes: int) -> None:
        sizes = zip(channels[:-1], channels[1:], strides, strict=True)
        super().__init__(list(sizes), num_classes)
        self.spec = dict(channels=channels, strides=strides, num_classes=num_classes)

    def cells(self, images: Tensor) -> Tensor:
        h = images.to(self.fc.weight) / 255
        for conv in self.convs:
            h = F.relu(conv(h))
        return h

    def layout(self) -> dict[str, str]:
        # One key only: safetensors writes several in random order, and the hash names the file.
        return {"spec": json.dumps(self.spec)}

    def save(self, path: Path) -> "ClassifierFeatures":
        """Write weights and layout, and return the extractor that reads them."""
        self.write(path)
        extractor = ClassifierFeatures(str(path))
        extractor.load()
        return extractor


def mnist_classifier(num_classes: int = 10) -> ConvClassifier:
    """The layout of ``mnist_classifier.safetensors``: 28x28 grey images to 128 features."""
    return ConvClassifier([1, 16, 32, 64, 128], [1, 2, 2, 1], num_classes)


class CIFAR10Classifier(Classifier):
    """The layout of ``cifar10_classifier.safetensors``: 32x32 RGB images to 192 features.

    u = (x / 255 - 0.5) * 4; convolutions 1 to 3; pool; convolution 4; pool; h + c6(c5(h)).

    Args:
        num_classes: Number of classes.
    """

    def __init__(self, num_classes: int = 10) -> None:
        layers = [(3, 32, 1), (32, 64, 2), (64, 96, 1), (96, 192, 1), (192, 192, 1), (192, 192, 1)]
        super().__init__(layers, num_classes)

    def cells(self, images: Tensor) -> Tensor:
        h = (images.to(self.fc.weight) / 255 - 0.5) * 4
        for i, conv in enumerate(self.convs[:4]):
            h = F.relu(conv(h))
            if i >= 2:
                h = F.max_pool2d(h, 2)
        residual = h
        for conv in self.convs[4:]:
            residual = F.relu(conv(residual))
        return h + residual


class ClassifierFeatures(FeatureExtractor):
    """The last features of a classifier; distances in them are not FID.

    Args:
        weights: A file written by `Classifier.write`, or one of ``shared/features`` (float16, cast
            to float32; convolution n is ``conv<n>`` there and ``convs.<n-1>`` here).
        network: The layout of the weights; None: a `ConvClassifier` whose layout the file states,
            or a `CIFAR10Classifier` if the weights have its shapes.
        dataset: Names the distance, "fd_<dataset>"; None: the folder of the weights names it.
    """

    has_probabilities, has_tokens = True, True

    def __init__(
        self, weights: str, network: Classifier | None = None, dataset: str | None = None
    ) -> None:
        super().__init__(weights)
        if network is not None and dataset is None:
            raise UserError("dataset=None: must name the training data, as `network` is given")
        self.layout, self.dataset = network, dataset or Path(weights).parent.name
        self.metric = f"fd_{self.dataset}"

    def load(self) -> None:
        self.check_files()
        path = self.weights
        assert path is not None
        try:
            with safe_open(path, framework="pt") as file:
                stated = (file.metadata() or {}).get("spec")
                state = {_ours(key): file.get_tensor(key).float() for key in file.keys()}
        except SafetensorError as error:
            raise UserError(f"weights={path}: must be a safetensors file") from error
        network = self.layout
        if network is None:
            network = ConvClassifier(**json.loads(stated)) if stated else _recognized(state)
        if network is None:
            raise UserError(f"network=None: must be a classifier, as {path} states no layout")
        try:
            network.load_state_dict(state)
        except RuntimeError as error:
            raise UserError(f"weights={path}: must fit {type(network).__name__}") from error
        self.network = network.requires_grad_(False).eval()
        self.num_features = network.num_features
        self.digest = digest(path)

    def describe(self) -> str:
        return f"classifier {self.dataset} sha256:{self.digest}"

    def features(self, images: Tensor) -> Tensor:
        return self.network.features(images)

    def tokens(self, images: Tensor) -> Tensor:
        return self.network.cells(images).flatten(2).transpose(1, 2)

    def probabilities(self, features: Tensor) -> Tensor:
        """Softmax of the last layer, (B, F) to (B, num_classes)."""
        return self.network.fc(features).softmax(1)


def _recognized(state: dict[str, Tensor]) -> Classifier | None:
    """The layout of a file that states none, if it can be told by the shapes."""
    network = CIFAR10Classifier(len(state.get("fc.bias", ())) or 1)
    theirs, ours = ({k: x.shape for k, x in d.items()} for d in (state, network.state_dict()))
    return network if theirs == ours else None


def _ours(key: str) -> str:
    """``conv<n>.`` as ``convs.<n-1>.``."""
    return re.sub(r"^conv(\d+)\.", lambda match: f"convs.{int(match[1]) - 1}.", key)
