"""Train diffusion transformers towards weak-to-strong targets and score them unguided."""

__version__ = "0.1.0"
