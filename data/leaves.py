"""Points of the synthetic study as shards: see `w2s_train/leaves.py`.

Run ``python data/leaves.py`` or let `ShardDataModule(prepare="leaves")` do it:

    data/leaves/few-{000000..000003}.tar    16,384 points of 4 classes that fork twice
    data/leaves/many-{000000..000003}.tar   16,384 points of 24 plain classes

each with .npy (float32, 2x1x1) and .cls.
"""

import io
import tarfile
from pathlib import Path

import numpy as np
import torch

from w2s_train.leaves import Leaves

FOLDER = Path("data/leaves")
REGIMES = {"few": (4, 3), "many": (24, 1)}  # number of classes, depth
POINTS, SHARDS, SEED = 16_384, 4, 0


def write_shards(name: str, points: np.ndarray, labels: np.ndarray) -> None:
    """Write one regime as tar files; each appears under its name when it is whole."""
    for shard, rows in enumerate(np.array_split(np.arange(len(points)), SHARDS)):
        path = FOLDER / f"{name}-{shard:06d}.tar"
        with tarfile.open(path.with_suffix(".part"), "w") as tar:
            for i in rows:
                array = io.BytesIO()
                np.save(array, points[i].reshape(2, 1, 1).astype(np.float32))
                for kind, content in (("npy", array.getvalue()), ("cls", b"%d" % labels[i])):
                    info = tarfile.TarInfo(f"{i:06d}.{kind}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
        path.with_suffix(".part").rename(path)


def prepare() -> None:
    """Write what is missing; the last shard comes last, so its presence means done."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, (num_classes, depth) in REGIMES.items():
        if (FOLDER / f"{name}-{SHARDS - 1:06d}.tar").is_file():
            continue
        generator = torch.Generator().manual_seed(SEED)
        labels = torch.randint(num_classes, (POINTS,), generator=generator)
        points = Leaves(num_classes, depth).sample(labels, generator)
        write_shards(name, points.numpy(), labels.numpy())


if __name__ == "__main__":
    prepare()
