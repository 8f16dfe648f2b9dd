"""Points of the mixture in `leaves.py` as shards; takes a few seconds.

    python experiments/leaves/make.py

    data/leaves/few-{000000..000003}.tar    16,384 points of 4 classes that fork twice
    data/leaves/many-{000000..000003}.tar   16,384 points of 24 plain classes

each with .npy (float32, 2x1x1) and .cls.
"""

import io
from pathlib import Path

import numpy as np
import torch
from leaves import Leaves

from w2s_train.shards import ShardWriter, write_index

FOLDER = Path("data/leaves")
REGIMES = {"few": (4, 3), "many": (24, 1)}  # number of classes, depth
POINTS, SHARDS, SEED = 16_384, 4, 0


def write_shards(name: str, points: np.ndarray, labels: np.ndarray) -> None:
    """Write one regime as shards."""
    for shard, rows in enumerate(np.array_split(np.arange(len(points)), SHARDS)):
        with ShardWriter(FOLDER / f"{name}-{shard:06d}.tar") as writer:
            for i in rows:
                array = io.BytesIO()
                np.save(array, points[i].reshape(2, 1, 1).astype(np.float32))
                writer.write(f"{i:06d}", labels[i], npy=array.getvalue())


def prepare() -> None:
    """Write what is missing; the index comes last, so its presence means done."""
    if (FOLDER / "index.json").is_file():
        return
    for name, (num_classes, depth) in REGIMES.items():
        generator = torch.Generator().manual_seed(SEED)
        labels = torch.randint(num_classes, (POINTS,), generator=generator)
        points = Leaves(num_classes, depth).sample(labels, generator)
        write_shards(name, points.numpy(), labels.numpy())
    write_index(FOLDER)


if __name__ == "__main__":
    prepare()
