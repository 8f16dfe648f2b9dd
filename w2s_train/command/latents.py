"""What the shards of latents say about themselves, where the config leaves it out."""

from typing import Any

from w2s_train.autoencoder import DiffusersVAE, StableDiffusionVAE, latents_beside
from w2s_train.errors import UserError
from w2s_train.imports import found
from w2s_train.shards import Storage, expand_urls


def fill_in(model: Any, data: Any) -> None:
    """Give a `DiffusersVAE` mean and std of each channel, as measured on the run's own shards.

    They are numbers of the run from then on: its config, its checkpoints and what is made of
    them have them. With neither measured nor stated ones the autoencoder's config counts.

    Args:
        model: Part ``model`` of a config; changed.
        data: Part ``data``.

    Raises:
        UserError: Shards of several encodings.
    """
    autoencoder = model.autoencoder
    kind = found(autoencoder.class_path) if autoencoder else None
    if not (isinstance(kind, type) and issubclass(kind, DiffusersVAE)):
        return
    settings = autoencoder.init_args
    if issubclass(kind, StableDiffusionVAE) or settings.mean or settings.std:
        return
    urls = expand_urls(data.train_urls, "train_urls", allow_pipe=data.allow_pipe)
    storage = Storage(data.cache, data.cache_gigabytes, data.allow_pipe)
    made = latents_beside(urls, storage)
    if len({str(each["statistics"]) for each in made.values()}) > 1:
        raise UserError(f"train_urls={data.train_urls}: must be of one encoding, not {[*made]}")
    for each in made.values():
        settings.mean, settings.std = (list(each["statistics"][key]) for key in ("mean", "std"))
