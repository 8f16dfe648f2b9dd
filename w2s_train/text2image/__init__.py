"""Guidance, without training, for text-to-image models that diffusers' pipelines run."""
