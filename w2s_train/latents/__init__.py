"""Latents of images: made by an autoencoder, written as shards, and described beside them."""
