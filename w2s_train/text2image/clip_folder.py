"""A CLIP of transformers in a local folder: network, tokenizer, preprocessing."""

import functools
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from w2s_train.errors import UserError, needed
from w2s_train.files import expanded
from w2s_train.text2image.judge import existing, filled, unreadable

NETWORK = ("config.json", "model.safetensors")
TOKENIZERS = (("tokenizer.json",), ("vocab.json", "merges.txt"))  # either


class ClipFolder:
    """Embeddings of a CLIP (Radford et al., 2021) as transformers stores it.

    config.json says its architecture. Images are resized as PIL does it, which transformers did
    when these scores were published; its present default rounds differently. Prompts are cut at
    the length that the network was made for.

    Args:
        name: Of the argument that names the folder, for errors.
        folder: With config.json and model.safetensors.
        source: The repository whose folder it is to be.
        processor: Folder with the tokenizer and preprocessor_config.json; None is the same folder.
        device: Where it computes.

    Raises:
        UserError: A file is missing, transformers is missing, or config.json is of something else.
    """

    def __init__(
        self,
        name: str,
        folder: str | Path,
        source: str,
        processor: str | Path | None,
        device: str,
    ) -> None:
        self.device = device
        self.folder = expanded(name, folder)
        self.place = f"{name}={self.folder}"
        self.source = f"a CLIP such as {source}"
        for file in NETWORK:
            existing(name, self.folder / file, f"of {source} at huggingface.co")
        self.processor = self.folder if processor is None else expanded("processor", processor)
        name = name if processor is None else "processor"
        existing(name, self.processor / "preprocessor_config.json", f"of {source}'s processor")
        if not any(all((self.processor / x).is_file() for x in files) for files in TOKENIZERS):
            raise UserError(
                f"{name}={self.processor}: must be a folder with a tokenizer, tokenizer.json or "
                f"vocab.json and merges.txt of {source}'s processor"
            )
        with needed("transformers", self.place):
            from transformers import CLIPConfig
        try:
            self.config: Any = CLIPConfig.from_pretrained(self.folder, local_files_only=True)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise unreadable(self.place, self.source, error) from error
        self.weights = self.folder / "model.safetensors"

    @functools.cached_property
    def network(self) -> Any:
        """A CLIPModel, its weights read now.

        Raises:
            UserError: They are not of config.json's architecture.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file
        from transformers import CLIPModel

        try:
            state = load_file(self.weights)
        except (OSError, SafetensorError) as error:
            raise unreadable(self.place, self.source, error) from error
        network = filled(lambda: CLIPModel(self.config), state, self.place, self.source)
        return network.to(self.device)

    @functools.cached_property
    def processors(self) -> tuple[Any, Any]:
        """Tokenizer, and the preprocessing of images.

        Raises:
            UserError: They cannot be read, or have more tokens than the network.
        """
        from transformers import CLIPImageProcessorPil, CLIPTokenizer

        try:
            tokenizer = CLIPTokenizer.from_pretrained(self.processor, local_files_only=True)
            images = CLIPImageProcessorPil.from_pretrained(self.processor, local_files_only=True)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise unreadable(f"processor={self.processor}", self.source, error) from error
        if len(tokenizer) > self.config.text_config.vocab_size:
            raise UserError(
                f"processor={self.processor}: must be of the same model; its tokenizer has "
                f"{len(tokenizer)} tokens, the network {self.config.text_config.vocab_size}"
            )
        return tokenizer, images

    def image(self, image: Image.Image) -> Tensor:
        """The embedding (1, E) of an RGB image, of length 1."""
        pixels = self.processors[1](images=image, return_tensors="pt")["pixel_values"]
        hidden = self.network.vision_model(pixel_values=pixels.to(self.device)).pooler_output
        return F.normalize(self.network.visual_projection(hidden), dim=-1)

    def text(self, prompt: str) -> Tensor:
        """The embedding (1, E) of a prompt, of length 1."""
        length = self.config.text_config.max_position_embeddings
        ids = self.processors[0](prompt, truncation=True, max_length=length, return_tensors="pt")
        hidden = self.network.text_model(**ids.to(self.device)).pooler_output
        return F.normalize(self.network.text_projection(hidden), dim=-1)
