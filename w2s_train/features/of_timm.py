"""Features of the networks of timm: pooled, as their last layer makes classes of them."""

import hashlib
import re
from collections.abc import Sequence
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F

from w2s_train.errors import UserError, one_line, require
from w2s_train.features.base import FeatureExtractor


def resize_bicubic(images: Tensor, size: int) -> Tensor:
    """(B, C, H, W) uint8 to (B, C, size, size), 0 ... 255 in float32, anti-aliased.

    As PIL does it on 8-bit images: first the rows, then the columns, each pass rounded and clipped.
    """
    for shape in ((images.shape[-2], size), (size, size)):
        images = F.interpolate(images.float(), shape, mode="bicubic", antialias=True)
        images = images.round().clamp(0, 255)
    return images


class TimmFeatures(FeatureExtractor):
    """What a network of timm has before its last layer; a linear one gives probabilities as well.

    Images are resized to one size, grey ones spread over three channels, and normalized as the
    network was trained. One that was trained on other images than those it judges is independent
    of them, an ImageNet classifier unless they are ImageNet's. Its distances are not FID.

    Args:
        model: Of timm, such as ``tf_efficientnet_lite0``.
        weights: Of it (``.safetensors``), in timm's names; timm downloads them if None.
        size: Height and width in pixels that images are resized to; None: those of its training.
        name: Names the distance, "fd_<name>", of a-z, 0-9 and _; None: model and size do.
        mean: Three numbers, subtracted from values in [0, 1]; None: those of its training.
        std: Three numbers, which these are divided by; the same.
        num_classes: Of weights whose last layer has another number than the published ones.

    Raises:
        UserError: No such model or name, a size or number below 1, not three numbers around 0 ... 1
            and stds above 0, or a number of classes without weights.
    """

    has_tokens, has_probabilities = True, True

    def __init__(
        self,
        model: str,
        weights: str | None = None,
        size: int | None = None,
        name: str | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        num_classes: int | None = None,
    ) -> None:
        import timm  # late: seconds

        super().__init__(weights)
        if not timm.is_model(model) or ("." in model and not timm.is_model_pretrained(model)):
            raise UserError(f"model={model}: must be a model of timm; timm.list_models() has all")
        known: Any = timm.get_pretrained_cfg(model)
        self.model = model
        self.size = known.input_size[-1] if size is None else require("size", size, "[1, inf)")
        self.numbers = (
            tuple(known.mean if mean is None else mean),
            tuple(known.std if std is None else std),
        )
        if {len(each) for each in self.numbers} != {3} or not all(
            -10 < m < 10 and 0 < s < 10 for m, s in zip(*self.numbers, strict=True)
        ):
            rule = "must be three numbers each, of values in [0, 1], and std above 0"
            raise UserError(f"mean={mean}, std={std}: {rule}")
        if name is not None and (name == "fid" or not re.fullmatch("[a-z0-9_]+", name)):
            raise UserError(f"name={name}: must be of a-z, 0-9 and _, and not fid")
        self.metric = "fd_" + (name or f"{model.partition('.')[0]}_{self.size}")
        self.options = dict[str, Any]()
        if num_classes is not None:
            if weights is None:
                raise UserError(f"num_classes={num_classes}: must be null unless weights are given")
            self.options = {"num_classes": require("num_classes", num_classes, "[1, inf)")}

    def check_files(self) -> None:
        super().check_files()
        if self.weights is not None and self.weights.suffix != ".safetensors":
            raise UserError(f"weights={self.weights}: must be a .safetensors file")

    def load(self) -> None:
        self.check_files()
        published: Any = self._published()
        state = published.state_dict()
        sha = hashlib.sha256()
        for key in sorted(state):
            sha.update(key.encode() + state[key].numpy().tobytes())
        self.digest = sha.hexdigest()[:12]
        # On the device: torchvision's `normalize` would make the host wait for it.
        self.mean, self.std = (nn.Buffer(torch.tensor(v).view(3, 1, 1)) for v in self.numbers)
        self.network: Any = published
        self.num_features = self._tried()
        last = self.network.get_classifier()
        fits = isinstance(last, nn.Linear) and last.in_features == self.num_features
        self.has_probabilities = type(self).has_probabilities and fits
        if self.has_probabilities:  # as far as that layer is all that makes classes of them
            images = torch.arange(3072).view(1, 3, 32, 32).to(torch.uint8)
            with torch.no_grad():
                whole, ours = self.network(self._pixels(images)), last(self.features(images))
            self.has_probabilities = isinstance(whole, Tensor) and whole.allclose(ours, 1e-3, 1e-4)

    def _tried(self) -> int:
        """The number of features of an image, once the network takes images of this size.

        Raises:
            UserError: The network takes no images of this size, or does not pool.
        """
        rule = f"model={self.model}, size={self.size}: must be a network of timm that takes such"
        try:
            self.network = self._sized(self.network).eval().requires_grad_(False)
            with torch.no_grad():
                features = self.features(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
        except (AssertionError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(f"{rule} images ({one_line(error)[:200]})") from error
        if not features.isfinite().all():
            raise UserError(f"weights={self.weights}: must give finite features, are damaged")
        if features.ndim != 2:
            raise UserError(f"{rule} images and pools them, gives {tuple(features.shape)}")
        return features.shape[1]

    def _published(self) -> nn.Module:
        """The network as its weights are.

        Raises:
            UserError: They cannot be fetched, or are not its own.
        """
        import timm

        path = "" if self.weights is None else str(self.weights)
        options = self.options if type(self).has_probabilities else {"num_classes": 0}
        try:
            return timm.create_model(
                self.model, pretrained=self.weights is None, checkpoint_path=path, **options
            )
        except (OSError, RuntimeError, SafetensorError) as error:
            local = "a local file where they cannot be fetched, " * isinstance(error, OSError)
            raise UserError(
                f"weights={path or 'null'}: must be {local}weights of {self.model} "
                f"({one_line(error)[:200]})"
            ) from error

    def _sized(self, published: Any) -> nn.Module:
        """The same for images of `size`: position embeddings are resampled as timm does it."""
        if hasattr(published, "set_input_size"):
            published.set_input_size(img_size=(self.size, self.size))
        return published

    def describe(self) -> str:
        mean, std = self.numbers
        return (
            f"timm {self.model} sha256:{self.digest}, pooled, resize bicubic {self.size}, "
            f"mean {mean}, std {std}"
        )

    def features(self, images: Tensor) -> Tensor:
        x = self.network.forward_features(self._pixels(images))
        return self.network.forward_head(x, pre_logits=True)

    def tokens(self, images: Tensor) -> Tensor:
        """What is pooled, (B, N, F), of the patches or of the cells of the last convolution."""
        x = self.network.forward_features(self._pixels(images))
        if x.ndim == 4:
            backwards = getattr(self.network, "output_fmt", "NCHW") == "NHWC"
            x = x.flatten(1, 2) if backwards else x.flatten(2).transpose(1, 2)
        else:
            x = x[:, self.network.num_prefix_tokens :]
        if x.shape[2] != self.num_features:
            raise UserError(
                f"model={self.model}: must have tokens as wide as its features to be an encoder, "
                f"has {x.shape[2]} and {self.num_features}"
            )
        return x

    def probabilities(self, features: Tensor) -> Tensor:
        """Softmax of the last layer, (B, F) to (B, num_classes)."""
        if not self.has_probabilities:
            return super().probabilities(features)  # refuses
        return self.network.get_classifier()(features).softmax(1)

    def _pixels(self, images: Tensor) -> Tensor:
        """(B, C, H, W) uint8 as the network takes them, in the type of its weights."""
        x = resize_bicubic(images.expand(-1, 3, -1, -1), self.size) / 255
        return ((x - self.mean) / self.std).to(next(self.network.parameters()).dtype)


def imagenet_ids() -> list[str]:
    """WordNet ids of ImageNet's 1,000 classes, in the order of classifiers' outputs."""
    from timm.data import ImageNetInfo

    known = ImageNetInfo()
    return [known.index_to_label_name(i) for i in range(known.num_classes())]
