"""What each part of an evaluation costs; see sample.py."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from common import ROOT, synchronize

from w2s_train.command.run import compose
from w2s_train.evaluation.fid import FID
from w2s_train.features.frechet import FeatureSums, frechet_distance

DIGITS = str(ROOT / "configs" / "digits_w2s.yaml")


def evaluation(rounds: int) -> dict[str, Any]:
    """Milliseconds of each part of an evaluation, per image; of the distance, once."""
    command = compose(["fit", "-c", DIGITS], run=False)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    module, data = command.model.to(device).eval(), command.datamodule
    fid = next(c for c in command.trainer.callbacks if isinstance(c, FID))  # type: ignore[attr-defined]
    data.prepare_data()
    fid.load(module, data)
    fid.extractor.to(device)
    sums, n = FeatureSums(fid.extractor.num_features, device), data.generation_batch_size
    assert fid.reference is not None
    times: dict[str, list[float]] = {
        name: [] for name in ("generation", "features", "sums", "distance")
    }

    def timed(name: str, function: Callable[..., Any], *given: Any) -> Any:
        synchronize()
        began = time.perf_counter()
        result = function(*given)
        synchronize()
        times[name].append(1000 * (time.perf_counter() - began))
        return result

    for i in range(rounds + 1):
        seeds = list(range(i * n, (i + 1) * n))
        labels = [seed % module.network.num_classes for seed in seeds]
        images = timed("generation", module.generate, seeds, labels)
        features = timed("features", fid.extractor, images)
        timed("sums", sums.update, features)
        timed("distance", frechet_distance, sums.moments(), fid.reference.moments)
    medians = {name: statistics.median(found[1:]) for name, found in times.items()}
    per_image = {f"{name}_ms": medians[name] / n for name in ("generation", "features", "sums")}
    whole = sum(per_image.values())
    return {
        "network": "digits_w2s",
        "part": "evaluation",
        "batch": n,
        "steps": module.sampler.steps,
        **per_image,
        "distance_ms": medians["distance"],
        "generation_share": per_image["generation_ms"] / whole,
        "images_per_second": 1000 / whole,
        "rounds": rounds,
    }
