"""What a guider does, for the protocol of images: in words, and as plain values."""

import inspect
from pathlib import Path
from typing import Any

from diffusers.guiders import BaseGuidance

from w2s_train.errors import UserError
from w2s_train.files import expanded, sha256_of
from w2s_train.text2image.base import Guider

FILES = ("weak", "path")  # arguments of ours that name files, whose content counts


def described(guider: BaseGuidance) -> str:
    """As ours say it themselves; of others the class, and the arguments that are no defaults."""
    if isinstance(guider, Guider):
        return guider.describe()
    defaults = inspect.signature(type(guider).__init__).parameters
    given = [
        f"{name}={value}"
        for name, value in _arguments(guider).items()
        if name not in defaults or value != defaults[name].default
    ]
    return f"{type(guider).__name__}({', '.join(given)})"


def settings_of(guider: BaseGuidance) -> dict[str, Any]:
    """Class and all arguments, and a hash of what files among them hold.

    Raises:
        UserError: It has not registered its arguments.
    """
    arguments = _arguments(guider)
    hashes = {
        f"{name}_sha256": _digest(expanded(name, value))
        for name, value in arguments.items()
        if name in FILES and isinstance(value, str)
    }
    return {"class": f"{type(guider).__module__}.{type(guider).__name__}"} | arguments | hashes


def _arguments(guider: BaseGuidance) -> dict[str, Any]:
    config = getattr(guider, "config", None)
    if config is None:
        raise UserError(
            f"guidance={type(guider).__name__}: must register its arguments, by diffusers' "
            "register_to_config"
        )
    return {name: value for name, value in config.items() if not name.startswith("_")}


def _digest(path: Path) -> str:
    files = sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]
    return "-".join(sha256_of(file)[:12] for file in files)
