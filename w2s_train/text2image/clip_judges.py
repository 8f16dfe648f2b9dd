"""Scores that are the angle between an image and its prompt in a CLIP of transformers."""

from pathlib import Path

from PIL import Image
from torch import Tensor

from w2s_train.text2image.clip_folder import ClipFolder
from w2s_train.text2image.judge import Judge


class CLIPScore(Judge):
    """100 max(cos, 0) of the embeddings of image and prompt (Hessel et al., "CLIPScore", 2021).

    The paper has 2.5 max(cos, 0), of ViT-B/32, with "A photo depicts" before each caption. Papers
    on text-to-image print 100 times the cosine, mostly of OpenAI's ViT-L/14, of the prompt as it
    is; so does this class. A fortieth of it is the paper's scale.

    Args:
        weights: A folder of transformers with a CLIP, such as openai/clip-vit-large-patch14.
        device: Where the network computes.

    Raises:
        UserError: Something is missing in the folder, or transformers is.
    """

    name = "clip_score"

    def __init__(self, weights: str | Path, device: str = "cpu") -> None:
        source = "openai/clip-vit-large-patch14"
        self.clip = ClipFolder("weights", weights, source, None, device)
        super().__init__(self.clip.weights, device)

    def one(self, image: Image.Image, prompt: str) -> Tensor:
        return 100 * (self.clip.image(image) * self.clip.text(prompt)).sum().clamp_min(0)


class PickScore(Judge):
    """exp(s) cos of image and prompt in a CLIP of human choices (Kirstain et al., 2023).

    "Pick-a-Pic: An Open Dataset of User Preferences for Text-to-Image Generation"; s is the
    network's own ``logit_scale``, exp(s) about 100.

    Args:
        weights: The folder of yuvalkirstain/PickScore_v1, a CLIP ViT-H/14 of transformers.
        processor: Folder with the tokenizer and preprocessing of
            laion/CLIP-ViT-H-14-laion2B-s32B-b79K; None if the folder of weights has them.
        device: Where the network computes.

    Raises:
        UserError: Something is missing in a folder, or transformers is.
    """

    name = "pick_score"

    def __init__(
        self, weights: str | Path, processor: str | Path | None = None, device: str = "cpu"
    ) -> None:
        source = "yuvalkirstain/PickScore_v1"
        self.clip = ClipFolder("weights", weights, source, processor, device)
        super().__init__(self.clip.weights, device)

    def one(self, image: Image.Image, prompt: str) -> Tensor:
        cosine = (self.clip.image(image) * self.clip.text(prompt)).sum()
        return self.clip.network.logit_scale.exp() * cosine
