r"""Train a small classifier whose features serve a Fréchet distance, from webdataset shards.

    python data/classifier.py --train "data/mnist/train-*.tar" --test "data/mnist/test-*.tar" \
        --architecture mnist --output data/mnist/classifier.safetensors

Writes the weights and, beside them, ``OUTPUT.json``: the test accuracy and what they were trained
with. One thread, so that the same seed gives the same weights on the same processor. The config
names the result as ``w2s_train.features.ClassifierFeatures``; with ``cifar10`` it also names the
layout, ``network: {class_path: w2s_train.features.CIFAR10Classifier}``, and the data set.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from w2s_train.errors import UserError
from w2s_train.features import (
    CIFAR10Classifier,
    Classifier,
    ConvClassifier,
    Regularization,
    mnist_classifier,
    train_classifier,
)
from w2s_train.features.training import PLAIN
from w2s_train.files import atomic_write
from w2s_train.shards import local_shards
from w2s_train.shards.decode import BrokenImage, decode_image
from w2s_train.shards.samples import encoded_image, read_shard


class Architecture(NamedTuple):
    """A network, the shape (C, H, W) of its images, and how it is kept from overfitting."""

    build: Callable[[], Classifier]
    shape: tuple[int, int, int]
    regularization: Regularization
    num_classes: int = 10


ARCHITECTURES = {
    "digits": Architecture(
        lambda: ConvClassifier([1, 32, 64, 64], [1, 2, 1], 10), (1, 8, 8), PLAIN
    ),
    "mnist": Architecture(
        mnist_classifier, (1, 28, 28), Regularization(crop=2, label_smoothing=0.05, batch_norm=True)
    ),
    "cifar10": Architecture(
        CIFAR10Classifier,
        (3, 32, 32),
        Regularization(crop=4, flip=True, label_smoothing=0.05, batch_norm=True),
    ),
    "tiny_imagenet": Architecture(
        lambda: CIFAR10Classifier(200),
        (3, 32, 32),
        Regularization(crop=4, flip=True, label_smoothing=0.05, batch_norm=True),
        200,
    ),
}


def read_images(
    urls: str, name: str, architecture: Architecture, fraction: float
) -> tuple[Tensor, Tensor]:
    """Images (N, C, H, W) uint8 and labels (N,) of all shards, in their order.

    Args:
        urls: A path, a glob or a brace pattern.
        name: What the user calls it.
        architecture: Says the shape that every image must have, and how many classes there are.
        fraction: Keep the first images of every shard, this share of it.

    Raises:
        UserError: No shards, no images, or one of another shape.
    """
    images, labels, shape = [], [], architecture.shape
    for shard in local_shards(urls, name):
        samples = list(read_shard(shard))
        for sample in samples[: round(fraction * len(samples))]:
            content, label = encoded_image(sample, shard, architecture.num_classes)
            try:
                image = decode_image(content)
            except BrokenImage as error:
                key = sample["__key__"]
                raise UserError(f"{name}={shard}: {key} must be an image ({error})") from error
            if tuple(image.shape) != shape:
                raise UserError(
                    f"{name}={urls}: must hold images of {shape}, {sample['__key__']} is "
                    f"{tuple(image.shape)}"
                )
            images.append(image)
            labels.append(label)
    if not images:
        raise UserError(f"{name}={urls}: must hold images")
    return torch.stack(images), torch.tensor(labels)


def arguments() -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(
        description="Train a small classifier whose features serve a Frechet distance."
    )
    parser.add_argument("--train", required=True, metavar="GLOB", help="shards (.tar, .tar.gz)")
    parser.add_argument("--test", required=True, metavar="GLOB", help="shards to measure accuracy")
    parser.add_argument("--architecture", required=True, choices=sorted(ARCHITECTURES))
    parser.add_argument("--output", required=True, type=Path, metavar="FILE.safetensors")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fraction", type=float, default=1.0, help="share of --train to use")
    given = parser.parse_args()
    if not 0 < given.fraction <= 1:
        raise UserError(f"fraction={given.fraction}: must be in (0, 1]")
    if given.epochs < 1:
        raise UserError(f"epochs={given.epochs}: must be at least 1")
    if not given.output.parent.is_dir():
        raise UserError(f"output={given.output}: must lie in an existing folder")
    return given


def main() -> None:
    """Read, train, measure, write; the weights come last, so their presence means done."""
    given = arguments()
    architecture = ARCHITECTURES[given.architecture]
    test = read_images(given.test, "test", architecture, 1.0)
    train = read_images(given.train, "train", architecture, given.fraction)
    print(f"{len(train[0])} training and {len(test[0])} test images", flush=True)
    began = time.monotonic()
    classifier = architecture.build()
    accuracy = train_classifier(
        classifier,
        train,
        test,
        seed=given.seed,
        epochs=given.epochs,
        regularization=architecture.regularization,
        report_seconds=10,
    )
    seconds = round(time.monotonic() - began, 1)
    print(f"{given.architecture}: {accuracy:.2%} right on test images after {seconds} s")
    notes = {name: value for name, value in vars(given).items() if name != "output"}
    notes |= {"train_images": len(train[0]), "test_images": len(test[0])}
    notes |= {"accuracy": round(accuracy, 4), "seconds": seconds}
    beside = given.output.with_name(f"{given.output.name}.json")
    with atomic_write(beside) as file:
        file.write(json.dumps(notes, indent=1).encode() + b"\n")
    classifier.write(given.output)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
