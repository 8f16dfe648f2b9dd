"""The human preference score, version 2.1."""

import functools
import inspect
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as V

from w2s_train.checkpoint_file import read_file
from w2s_train.errors import UserError, needed
from w2s_train.files import expanded
from w2s_train.text2image.judge import Judge, existing, filled

SOURCE = "HPS_v2.1_compressed.pt of xswu/HPSv2 at huggingface.co"


class HPSv21(Judge):
    """100 cos of image and prompt in a CLIP ViT-H/14 of human choices (Wu et al., 2023).

    "Human Preference Score v2: A Solid Benchmark for Evaluating Human Preferences of
    Text-to-Image Synthesis"; its tables have 100 times the cosine, the function ``score`` of its
    package the cosine. The image is seen whole: its longer side becomes 224 pixels, the rest is
    black before normalization. (Other CLIPs cut a square out of the middle.)

    Args:
        weights: HPS_v2.1_compressed.pt.
        model: The architecture, by open_clip's name.
        device: Where the network computes.

    Raises:
        UserError: The file is missing, open_clip is, or it has no such model.
    """

    name = "hps_v2.1"

    def __init__(self, weights: str | Path, model: str = "ViT-H-14", device: str = "cpu") -> None:
        super().__init__(existing("weights", expanded("weights", weights), SOURCE), device)
        with needed("open-clip-torch", f"weights={self.weights}"):
            import open_clip
        config = open_clip.get_model_config(model)
        if config is None:
            raise UserError(f"model={model}: must be a model of open_clip, such as ViT-H-14")
        if not _is_plain(config, open_clip.CLIP):
            raise UserError(f"model={model}: must be a plain CLIP of open_clip, such as ViT-H-14")
        self.config: dict[str, Any] = config
        self.size: int = config["vision_cfg"]["image_size"]
        self.tokens = open_clip.get_tokenizer(model)

    @functools.cached_property
    def network(self) -> Any:
        """A CLIP of open_clip, its weights read now.

        Raises:
            UserError: The file is damaged, or of something else.
        """
        import open_clip

        place = f"weights={self.weights}"
        state = read_file(self.weights).get("state_dict")
        if not isinstance(state, dict):
            raise UserError(f'{place}: must hold {SOURCE}, a dict with the key "state_dict"')
        return filled(lambda: open_clip.CLIP(**self.config), state, place, SOURCE).to(self.device)

    def pixels(self, image: Image.Image) -> Tensor:
        """An RGB image as the network takes it, (1, 3, 224, 224)."""
        from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

        x = V.to_tensor(image)
        scale = self.size / max(x.shape[1:])
        height, width = (max(round(side * scale), 1) for side in x.shape[1:])
        x = V.resize(x, [height, width], InterpolationMode.BICUBIC, antialias=True)
        left, top = (self.size - width) // 2, (self.size - height) // 2
        x = V.pad(x, [left, top, self.size - width - left, self.size - height - top])
        return V.normalize(x, OPENAI_DATASET_MEAN, OPENAI_DATASET_STD).unsqueeze(0)

    def one(self, image: Image.Image, prompt: str) -> Tensor:
        pixels, tokens = self.pixels(image).to(self.device), self.tokens([prompt]).to(self.device)
        seen = self.network.encode_image(pixels, normalize=True)
        said = self.network.encode_text(tokens, normalize=True)
        return 100 * torch.sum(seen * said)


def _is_plain(config: dict[str, Any], cls: type) -> bool:
    """Two towers of open_clip's own."""
    others = config["vision_cfg"].get("timm_model_name"), config["text_cfg"].get("hf_model_name")
    return {*config} <= {*inspect.signature(cls).parameters} and not any(others)
