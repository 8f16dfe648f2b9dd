"""Train diffusion transformers towards weak-to-strong targets and score them unguided."""

__version__ = "0.2.0"
