"""A folder with Stable Diffusion 3 or 3.5, as diffusers saves it, before its weights are read."""

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

from w2s_train.errors import UserError
from w2s_train.files import expanded, sha256_of

INDEX = "model_index.json"
KIND = "StableDiffusion3"
NETWORK = "transformer"
LIBRARIES = ("diffusers", "transformers")
SETTINGS = (".json", ".txt", ".model")  # small files, of tokenizers, too


class ModelFolder:
    """What the small files of the folder say of the pipeline in it.

    Args:
        path: The folder.

    Raises:
        UserError: There is none, it has no pipeline of this kind, or parts are missing.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = expanded("model", path)
        if not self.path.is_dir():
            raise UserError(
                f"model={path}: must be a folder with Stable Diffusion 3, such as `hf download "
                "stabilityai/stable-diffusion-3.5-medium --local-dir FOLDER` makes"
            )
        index = self._read(INDEX)
        if not str(index.get("_class_name")).startswith(KIND):
            raise UserError(
                f"model={path}: must hold a {KIND}Pipeline; {INDEX} has {index.get('_class_name')}"
            )
        named = {key: part for key, part in index.items() if isinstance(part, list)}
        self.parts = sorted(key for key, part in named.items() if part and part[0] is not None)
        self.absent = sorted(key for key in named if key not in self.parts)  # T5, often
        for part in sorted({*self.parts, NETWORK, "vae"}):
            library = str((named.get(part) or [None])[0])
            if library not in LIBRARIES:  # would be imported
                raise UserError(
                    f"model={path}: must have parts of {' and '.join(LIBRARIES)} alone; {part} is "
                    f"of {library}"
                )
            if not (self.path / part).is_dir():
                raise UserError(f"model={path}: must have {part}/, as {INDEX} says")
        self.network, vae = self._read(f"{NETWORK}/config.json"), self._read("vae/config.json")
        self.shift = self._read("scheduler/scheduler_config.json").get("shift", 1.0)
        try:
            self.factor = 2 ** (len(vae["block_out_channels"]) - 1)  # pixels a latent one, a side
            self.side = self.factor * int(self.network["patch_size"])  # pixels a token, a side
            self.default = self.factor * int(self.network["sample_size"])
            self.channels = int(self.network["in_channels"])
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"model={path}: must have whole settings, lacks {error}") from error
        self.largest = self.side * int(self.network.get("pos_embed_max_size") or 96)

    def size(self, name: str, pixels: int | None) -> int:
        """Height or width of the images; what the model is made for if none is asked for.

        Raises:
            UserError: Its network cannot make it.
        """
        found = self.default if pixels is None else pixels
        if found % self.side or not self.side <= found <= self.largest:
            raise UserError(
                f"{name}={found}: must be a multiple of {self.side} in [{self.side}, "
                f"{self.largest}], for {self.path.name}"
            )
        return found

    @functools.cached_property
    def digest(self) -> str:
        """The first 16 hexadecimal digits of a sha256, of the network's weights and all settings.

        Of other weights, names and sizes count: text encoders are large, and hardly ever changed.
        """
        found = hashlib.sha256(sha256_of(self.path / INDEX).encode())
        for part in self.parts:
            for file in sorted(each for each in (self.path / part).rglob("*") if each.is_file()):
                whole = part == NETWORK or file.suffix in SETTINGS
                content = sha256_of(file) if whole else str(file.stat().st_size)
                found.update(f"{file.relative_to(self.path)} {content}\n".encode())
        return found.hexdigest()[:16]

    def _read(self, name: str) -> dict[str, Any]:
        try:
            content = json.loads((self.path / name).read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(
                f"model={self.path}: must be a folder of diffusers; {name} cannot be read"
            ) from error
        if not isinstance(content, dict):
            raise UserError(
                f"model={self.path}: must be a folder of diffusers; {name} is another's"
            )
        return content
