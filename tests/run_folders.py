"""Run folders to compare, written by hand."""

import copy
import json
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

ENTRY = {
    "schema": 1,
    "metric": "fd_digits",
    "value": 2.43,
    "step": 1800,
    "weights": "ema",
    "guidance": "none",
    "protocol": {
        "sampler": "Euler",
        "steps": 25,
        "guidance": "none",
        "weights": "ema",
        "ema_decay": 0.99,
        "autoencoder": "PixelSpace",
        "precision": "32-true",
        "step": 1800,
        "images_seen": 115200,
        "training_samples": None,
        "metric_settings": "KernelDistance(subsets=100)",
        "reference_features": 1497,
        "extractor": "classifier digits sha256:194f",
        "reference": {"dataset": "digits", "split": "train", "n": 1497},
        "n": 1000,
        "seeds": [0, 999],
        "labels": None,
        "evaluation_seconds": 3.5,
        "wall_clock_seconds": 79.0,
        "training_seconds": 58.0,
        "git_commit": "6b7eb92",
    },
}
BRANCH = [
    {
        "class_path": "w2s_train.segment.Extrapolation",
        "init_args": {"low": 0.0, "high": 1.0, "scale": 0.3},
    }
]


def write_run(
    folder: Path,
    seed: int = 0,
    values: tuple[float, ...] = (8.0, 4.0, 2.0),
    pace: float = 0.1,
    segments: list | None = None,
    entry: dict | None = None,
    grid: int | None = None,
    **settings: object,
) -> Path:
    """Write a run folder: by default a baseline, scored at steps 100, 200 and 300, 10 s each.

    Args:
        folder: Where.
        seed: Of training.
        values: Scores, one per 100 steps.
        pace: Seconds per step.
        segments: Of the objective.
        entry: Changes of the scores' protocols.
        grid: Grey value of the sample grid of step 300; None for no grid.
        **settings: Further keys of the config's model.
    """
    folder.mkdir(parents=True)
    objective = {
        "class_path": "w2s_train.objective.WeakToStrongObjective",
        "init_args": {"segments": segments},
    }
    config = {
        "seed_everything": seed,
        "trainer": {"max_steps": 300, "default_root_dir": str(folder)},
        "model": {"objective": objective, **settings},
        "data": {"train_urls": "data/digits/train.tar"},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    entries = []
    for i, value in enumerate(values):
        step = 100 * (i + 1)
        new = copy.deepcopy(ENTRY) | {"value": value, "step": step}
        new["protocol"] |= {"step": step, "images_seen": 64 * step} | (entry or {})
        new["protocol"]["training_seconds"] = pace * step
        entries.append(new)
    (folder / "scores.json").write_text(json.dumps(entries))
    if grid is not None:
        (folder / "grids").mkdir()
        image = Image.fromarray(np.full((40, 60), grid, dtype=np.uint8))
        image.save(folder / "grids" / "step-000300.png")
    return folder
