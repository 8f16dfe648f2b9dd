"""scikit-learn's bundled handwritten digits as shards, with a classifier and reference statistics.

The data set (UCI "Optical Recognition of Handwritten Digits", test part; Alpaydin & Kaynak, 1998)
comes inside the scikit-learn package: 1,797 grey images of 8x8 pixels with values 0 ... 16, ten
classes. Run ``python data/digits.py`` or let `ShardDataModule(prepare="digits")` do it:

    data/digits/train-{000000..000007}.tar   1,497 images: .png (8x8, grey) and .cls
    data/digits/heldout-000000.tar             300 images
    data/digits/index.json                   samples, bytes and sha256 of each shard
    data/digits/classes.txt                  class names, one a line
    data/digits/classifier.safetensors       a small network trained on the train split
    data/digits/reference.npz                mean and covariance of its features on the train split
    data/digits/heldout.npz                  the same on the held-out split
"""

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits

from w2s_train.evaluation.reference import write_reference
from w2s_train.features import ConvClassifier, train_classifier
from w2s_train.shards import ShardWriter, write_index
from w2s_train.shards.format import CLASSES

FOLDER = Path("data/digits")
TRAIN_SHARDS, HELD_OUT, SEED = 8, 300, 0


def split_digits() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Images (N, 8, 8) uint8 and labels (N,) of both splits, in a fixed shuffled order."""
    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    order = np.random.RandomState(SEED).permutation(len(images))
    parts = {"heldout": order[:HELD_OUT], "train": order[HELD_OUT:]}
    return {name: (images[rows], digits.target[rows]) for name, rows in parts.items()}


def write_shards(name: str, images: np.ndarray, labels: np.ndarray, shards: int) -> None:
    """Write one split as shards."""
    for shard, rows in enumerate(np.array_split(np.arange(len(images)), shards)):
        with ShardWriter(FOLDER / f"{name}-{shard:06d}.tar") as writer:
            for i in rows:
                png = io.BytesIO()
                Image.fromarray(images[i]).save(png, "png")
                writer.write(f"{i:06d}", labels[i], png=png.getvalue())


def prepare() -> None:
    """Write what is missing; the reference statistics come last, so their presence means done."""
    if (FOLDER / "reference.npz").is_file():
        return
    FOLDER.mkdir(parents=True, exist_ok=True)
    splits = split_digits()
    write_shards("train", *splits["train"], TRAIN_SHARDS)
    write_shards("heldout", *splits["heldout"], 1)
    write_index(FOLDER)
    (FOLDER / CLASSES).write_text("".join(f"{digit}\n" for digit in range(10)))
    tensors = {
        name: (torch.from_numpy(images).unsqueeze(1), torch.from_numpy(labels))
        for name, (images, labels) in splits.items()
    }
    classifier = ConvClassifier(channels=[1, 32, 64, 64], strides=[1, 2, 1], num_classes=10)
    accuracy = train_classifier(classifier, tensors["train"], tensors["heldout"], seed=SEED)
    print(f"digits: classifier for Frechet distances, {accuracy:.1%} right on held-out images")
    extractor = classifier.save(FOLDER / "classifier.safetensors")
    for name, target in (("heldout", "heldout.npz"), ("train", "reference.npz")):
        write_reference(FOLDER / target, extractor, tensors[name][0], dataset="digits", split=name)


if __name__ == "__main__":
    prepare()
