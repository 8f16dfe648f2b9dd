"""How far the head's prediction moves with the scale that the network is told.

    python experiments/mnist_drawn/shift.py runs/mnist_drawn/head_tokens-10 [...]

Prints |head(w) - head(0)| / |d|, root mean squares with d = strong - head at w, for a few w, on 512
training images at uniform times, with the averaged weights.
"""

import sys
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from w2s_train.loading import load_module
from w2s_train.module import DiffusionModule
from w2s_train.shards import ShardFiles, Storage
from w2s_train.shards.index import find_shards
from w2s_train.shards.order import Places

ROOT = Path(__file__).resolve().parents[2]
SCALES = (0.2, 0.4, 0.6, 0.75)


@torch.no_grad()
def shifts(folder: str) -> list[float]:
    """The ratio at each of `SCALES`."""
    module = load_module(DiffusionModule, f"{folder}/checkpoints/last.ckpt", ["experiments"])
    shards = find_shards([str(ROOT / "data/mnist/train-000000.tar")], Storage(None, None, False))
    rows = ShardFiles(shards, Storage(None, None, False)).read(Places.of(range(512)))
    x, y = module.autoencoder.encode(rows.image), rows.label
    torch.manual_seed(0)
    objective: Any = module.objective
    noisy, network = objective.draw(x), cast(Any, module.ema.module)
    source = next(s.weak for s in objective.segments if s.name == "head")
    column = network.scales.index("head")

    def both(w: float) -> tuple[Tensor, Tensor]:
        scales = torch.zeros(len(x), len(network.scales))
        scales[:, column] = w
        out = network(noisy.x_t, noisy.t, y, keep_hidden=source.keep_hidden, scales=scales)
        return out.velocity, source.predict(network, noisy, y, out)

    plain, found = both(0.0)[1], []
    for w in SCALES:
        strong, head = both(w)
        found.append(float((head - plain).norm() / (strong - head).norm()))
    return found


def main() -> None:
    """Print the ratios of each run."""
    for folder in sys.argv[1:]:
        cells = [f"{w}: {ratio:.3f}" for w, ratio in zip(SCALES, shifts(folder), strict=True)]
        print(folder, ", ".join(cells))


if __name__ == "__main__":
    main()
