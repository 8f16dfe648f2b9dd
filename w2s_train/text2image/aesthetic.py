"""The aesthetic score of LAION, version 2."""

import functools
from itertools import pairwise
from pathlib import Path

from PIL import Image
from torch import Tensor, nn

from w2s_train.checkpoint_file import read_file
from w2s_train.errors import UserError
from w2s_train.features.base import digest
from w2s_train.files import expanded
from w2s_train.text2image.clip_folder import ClipFolder
from w2s_train.text2image.judge import Judge, existing, filled

WIDTHS = (768, 1024, 128, 64, 16, 1)  # of the published head
FILE = "sac+logos+ava1-l14-linearMSE.pth"
SOURCE = f"{FILE} of github.com/christophschuhmann/improved-aesthetic-predictor"


class AestheticScore(Judge):
    """LAION-Aesthetics V2 (Schuhmann, 2022): how people would rate an image, from 1 to 10.

    A head of linear layers, without any activation, on the normalized embedding of the image by
    OpenAI's CLIP ViT-L/14. The prompt plays no part.

    Args:
        weights: The head, sac+logos+ava1-l14-linearMSE.pth.
        clip: A folder of transformers with openai/clip-vit-large-patch14.
        widths: Of the head's layers, from the embedding to the score.
        device: Where the networks compute.

    Raises:
        UserError: A file is missing or transformers is, or the CLIP's embeddings are of another
            size.
    """

    name = "aesthetic"

    def __init__(
        self,
        weights: str | Path,
        clip: str | Path,
        widths: tuple[int, ...] = WIDTHS,
        device: str = "cpu",
    ) -> None:
        super().__init__(existing("weights", expanded("weights", weights), SOURCE), device)
        self.widths = widths
        self.clip = ClipFolder("clip", clip, "openai/clip-vit-large-patch14", None, device)
        if self.clip.config.projection_dim != widths[0]:
            raise UserError(
                f"{self.clip.place}: must be a CLIP with embeddings of {widths[0]} numbers, as "
                f"openai/clip-vit-large-patch14; these have {self.clip.config.projection_dim}"
            )

    @functools.cached_property
    def fingerprint(self) -> str:
        return f"{digest(self.weights)}-{digest(self.clip.weights)}"

    @functools.cached_property
    def head(self) -> nn.Module:
        """Embeddings (B, 768) to scores (B, 1), its weights read now.

        Raises:
            UserError: The file is damaged, or of something else.
        """
        place = f"weights={self.weights}"
        return filled(lambda: linear_head(self.widths), read_file(self.weights), place, SOURCE).to(
            self.device
        )

    def one(self, image: Image.Image, prompt: str) -> Tensor:
        return self.head.get_submodule("layers")(self.clip.image(image)).squeeze()


def linear_head(widths: tuple[int, ...]) -> nn.Module:
    """The published layout: linear layers with dropout between all but the last two.

    Args:
        widths: From the embedding to the score.
    """
    layers = list[nn.Module]()
    for i, (before, after) in enumerate(pairwise(widths), start=1):
        layers.append(nn.Linear(before, after))
        if i < len(widths) - 2:
            layers.append(nn.Dropout(0.1))  # takes a place in the names of the file
    return nn.ModuleDict({"layers": nn.Sequential(*layers)})
