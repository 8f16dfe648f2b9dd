"""The Fréchet distance in DINOv2's features (Stein et al., 2023)."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from w2s_train.errors import UserError
from w2s_train.features.of_timm import TimmFeatures

SIZE = 224  # pixels that the network sees, on a side
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, for values in [0, 1]


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


class DINOv2Features(TimmFeatures):
    """The class token of DINOv2 (Oquab et al., 2023), after its last norm, through timm.

    The protocol of Stein et al., "Exposing flaws of generative model evaluation metrics" (2023):
    ViT-L/14 at 224x224 after PIL's bicubic resize, ImageNet's mean and standard deviation.

    Args:
        model: A vision transformer of timm with one class token and no registers.
        weights: Its weights (``.safetensors``) as timm publishes them; timm downloads them if None.
    """

    protocol_images = 50_000
    has_probabilities = False

    def __init__(
        self, model: str = "vit_large_patch14_dinov2.lvd142m", weights: str | None = None
    ) -> None:
        super().__init__(model, weights, SIZE, "dinov2", MEAN, STD)

    def _published(self) -> nn.Module:
        """The vision transformer at the image size of its weights."""
        from timm.models.vision_transformer import VisionTransformer

        network = super()._published()
        if (
            not isinstance(network, VisionTransformer)
            or (network.num_prefix_tokens, network.no_embed_class) != (1, False)
            or network.global_pool != "token"
        ):
            raise UserError(
                f"model={self.model}: must be a vision transformer with one class token"
            )
        return network

    def _sized(self, published: Any) -> nn.Module:
        import timm

        state = published.state_dict()
        network: Any = timm.create_model(self.model, num_classes=0, img_size=SIZE)
        side = round((network.pos_embed.shape[1] - 1) ** 0.5)
        token, positions = state["pos_embed"][:, :1], state["pos_embed"][:, 1:]
        state["pos_embed"] = torch.cat([token, resample_positions(positions, side)], dim=1)
        network.load_state_dict(state)
        return network

    def describe(self) -> str:
        return f"timm {self.model} sha256:{self.digest}, class token, resize bicubic {SIZE}"
