"""Between stored data, network and images."""

from w2s_train.autoencoder.base import Autoencoder, PixelSpace, Vectors, to_uint8
from w2s_train.autoencoder.latents import LATENTS, latents_beside
from w2s_train.autoencoder.of_diffusers import load_autoencoder, weights_digest
from w2s_train.autoencoder.vae import DiffusersVAE, StableDiffusionVAE

__all__ = [
    "LATENTS",
    "Autoencoder",
    "DiffusersVAE",
    "PixelSpace",
    "StableDiffusionVAE",
    "Vectors",
    "latents_beside",
    "load_autoencoder",
    "to_uint8",
    "weights_digest",
]
