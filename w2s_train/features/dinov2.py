"""The Fréchet distance in DINOv2's features (Stein et al., 2023)."""

import hashlib
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F

from w2s_train.errors import UserError
from w2s_train.features.base import FeatureExtractor

SIZE = 224  # pixels that the network sees, on a side
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, for values in [0, 1]


def resize_bicubic(images: Tensor, size: int) -> Tensor:
    """(B, C, H, W) uint8 to (B, C, size, size), 0 ... 255 in float32, anti-aliased.

    As PIL does it on 8-bit images: first the rows, then the columns, each pass rounded and clipped.
    """
    for shape in ((images.shape[-2], size), (size, size)):
        images = F.interpolate(images.float(), shape, mode="bicubic", antialias=True)
        images = images.round().clamp(0, 255)
    return images


def resample_positions(positions: Tensor, side: int) -> Tensor:
    """Position embeddings (1, S^2, D) of an S x S grid for one of side x side: (1, side^2, D).

    As in DINOv2's own code: bicubic, not anti-aliased, at a scale of (side + 0.1) / S. timm
    resamples with anti-aliasing, which gives other features.
    """
    old = round(positions.shape[1] ** 0.5)
    if old == side:
        return positions
    grid = positions.unflatten(1, (old, old)).permute(0, 3, 1, 2)
    scale = (side + 0.1) / old
    grid = F.interpolate(grid, scale_factor=(scale, scale), mode="bicubic")
    return grid.permute(0, 2, 3, 1).flatten(1, 2)


class DINOv2Features(FeatureExtractor):
    """The class token of DINOv2 (Oquab et al., 2023), after its last norm, through timm.

    The protocol of Stein et al., "Exposing flaws of generative model evaluation metrics" (2023):
    ViT-L/14 at 224x224 after PIL's bicubic resize, ImageNet's mean and standard deviation.

    Args:
        model: A vision transformer of timm with one class token and no registers.
        weights: Its weights (``.safetensors``) as timm publishes them; timm downloads them if None.
    """

    metric = "fd_dinov2"
    protocol_images = 50_000
    has_tokens = True

    def __init__(
        self, model: str = "vit_large_patch14_dinov2.lvd142m", weights: str | None = None
    ) -> None:
        import timm  # late: seconds

        super().__init__(weights)
        if not timm.is_model(model):
            raise UserError(f"model={model}: must be a model of timm")
        self.model = model

    def check_files(self) -> None:
        super().check_files()
        if self.weights is not None and self.weights.suffix != ".safetensors":
            raise UserError(f"weights={self.weights}: must be a .safetensors file")

    def load(self) -> None:
        import timm

        self.check_files()
        published = self._published()
        state = published.state_dict()
        sha = hashlib.sha256()
        for key in sorted(state):
            sha.update(key.encode() + state[key].numpy().tobytes())
        self.digest = sha.hexdigest()[:12]
        network: Any = timm.create_model(self.model, num_classes=0, img_size=SIZE)
        side = round((network.pos_embed.shape[1] - 1) ** 0.5)
        token, positions = state["pos_embed"][:, :1], state["pos_embed"][:, 1:]
        state["pos_embed"] = torch.cat([token, resample_positions(positions, side)], dim=1)
        network.load_state_dict(state)
        self.network = network.eval().requires_grad_(False)
        # On the device: torchvision's `normalize` would make the host wait for it.
        self.mean, self.std = (nn.Buffer(torch.tensor(v).view(3, 1, 1)) for v in (MEAN, STD))
        self.num_features = network.num_features

    def _published(self) -> nn.Module:
        """The vision transformer at the image size of its weights."""
        import timm
        from timm.models.vision_transformer import VisionTransformer

        path = "" if self.weights is None else str(self.weights)
        try:
            network = timm.create_model(
                self.model, pretrained=self.weights is None, checkpoint_path=path, num_classes=0
            )
        except OSError as error:  # of the network
            raise UserError(
                f"weights={self.weights}: must be a local file where {self.model} cannot be "
                f"fetched ({error})"
            ) from error
        except (RuntimeError, SafetensorError) as error:
            raise UserError(f"weights={path}: must be weights of {self.model}") from error
        if (
            not isinstance(network, VisionTransformer)
            or (network.num_prefix_tokens, network.no_embed_class) != (1, False)
            or network.global_pool != "token"
        ):
            raise UserError(
                f"model={self.model}: must be a vision transformer with one class token"
            )
        return network

    def describe(self) -> str:
        return f"timm {self.model} sha256:{self.digest}, class token, resize bicubic {SIZE}"

    def features(self, images: Tensor) -> Tensor:
        return self.network(self._pixels(images))

    def tokens(self, images: Tensor) -> Tensor:
        """Patch tokens (B, 256, F) after the last norm, for patches of 14 pixels."""
        return self.network.forward_features(self._pixels(images))[:, 1:]

    def _pixels(self, images: Tensor) -> Tensor:
        """(B, C, H, W) uint8 as the network takes them, in the type of its weights."""
        x = resize_bicubic(images.expand(-1, 3, -1, -1), SIZE) / 255
        return ((x - self.mean) / self.std).to(self.network.pos_embed.dtype)
