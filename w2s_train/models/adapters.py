"""Transformers of diffusers as networks of ours; `models.network` says what that takes.

Both predict the velocity, embed ``time_scale * t`` and never drop a label themselves. They are made
anew from the settings of diffusers' class, or read from a folder that it has saved.
"""

from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from w2s_train.errors import UserError, needed, one_line


class Velocity(NamedTuple):
    """What a pass returns."""

    velocity: Tensor  # (B, C, H, W)


class DiffusersDiT(nn.Module):
    """diffusers' ``DiTTransformer2DModel``, by class.

    Args:
        config: Arguments of diffusers' class, such as ``num_layers``; None to read a folder.
        path: A local folder, as its ``save_pretrained`` writes it, with safetensors.
        time_scale: What t in [0, 1] is multiplied by: 1 as `lightning export` writes it, 1000 for
            timesteps as diffusers' schedulers count them.

    Raises:
        UserError: Both or neither given, settings that the class refuses, an unreadable folder, or
            diffusers cannot be imported.
    """

    def __init__(
        self,
        config: dict[str, Any] | None = None,
        path: str | None = None,
        time_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.transformer = _made("DiTTransformer2DModel", config, path)
        for block in self.transformer.transformer_blocks:  # each has a table of labels
            block.norm1.emb.class_embedder.dropout_prob = 0.0
        made, self.time_scale = self.transformer.config, time_scale
        self.arguments = dict(config=_plain(made), time_scale=time_scale)
        self.null_class = self.num_classes = made.num_embeds_ada_norm
        self.shape = (made.in_channels, made.sample_size, made.sample_size)

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor) -> Velocity:
        """The velocity; of a network that predicts a variance, without it."""
        out = self.transformer(x_t, timestep=self.time_scale * t, class_labels=y).sample
        return Velocity(out[:, : self.shape[0]])


class LabelledSD3(nn.Module):
    """diffusers' ``SD3Transformer2DModel`` with tables of classes in the place of text encoders.

    Args:
        num_classes: Labels are 0 ... num_classes - 1; ``null_class`` = num_classes.
        tokens: Length of the sequence that a class becomes.
        config: Arguments of diffusers' class, such as ``num_layers``; None to read a folder.
        path: A local folder, as its ``save_pretrained`` writes it, with safetensors.
        time_scale: What t in [0, 1] is multiplied by; 1000 as in SD3.

    Raises:
        UserError: As for `DiffusersDiT`.
    """

    def __init__(
        self,
        num_classes: int,
        tokens: int = 1,
        config: dict[str, Any] | None = None,
        path: str | None = None,
        time_scale: float = 1000.0,
    ) -> None:
        super().__init__()
        self.transformer = _made("SD3Transformer2DModel", config, path)
        made, self.time_scale, self.tokens = self.transformer.config, time_scale, tokens
        self.arguments = dict(num_classes=num_classes, tokens=tokens, config=_plain(made))
        self.arguments |= dict(time_scale=time_scale)
        self.null_class = self.num_classes = num_classes
        self.shape = (made.in_channels, made.sample_size, made.sample_size)
        self.sequence = nn.Embedding(num_classes + 1, tokens * made.joint_attention_dim)
        self.pooled = nn.Embedding(num_classes + 1, made.pooled_projection_dim)
        for table in (self.sequence, self.pooled):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor) -> Velocity:
        """The velocity."""
        condition = dict(
            encoder_hidden_states=self.sequence(y).unflatten(1, (self.tokens, -1)),
            pooled_projections=self.pooled(y),
        )
        return Velocity(self.transformer(x_t, timestep=self.time_scale * t, **condition).sample)


def _made(name: str, config: dict[str, Any] | None, path: str | None) -> Any:
    """A model of diffusers, made anew or read."""
    if (config is None) == (path is None):
        raise UserError(f"path={path}: must be given, or else config, but not both")
    with needed("diffusers", f"network={name}"):
        import diffusers  # optional, and takes seconds to import

        cls = getattr(diffusers, name)
    if path is not None and not Path(path).is_dir():
        raise UserError(f"path={path}: must be a folder that diffusers' {name} has saved")
    try:
        if path is None:
            return cls(**(config or {}))
        return cls.from_pretrained(path, local_files_only=True, use_safetensors=True)
    except (TypeError, ValueError, OSError, RuntimeError) as error:
        key = "config" if path is None else f"path={path}"
        raise UserError(f"{key}: must fit diffusers' {name} ({one_line(error)[:200]})") from error


def _plain(config: Any) -> dict[str, Any]:
    """The settings as plain values, less diffusers' own notes."""
    return {k: _listed(v) for k, v in config.items() if not k.startswith("_")}


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
