"""How small a difference the judge can tell: distances between real images.

    python experiments/tiny_imagenet/floors.py data/tiny_imagenet
    python experiments/tiny_imagenet/floors.py                       the table again

Writes floors.json and floors.md beside this file: training half to the other half, training set to
the first n validation images, and to validation images that are blurred, noisy or compressed; with
the share whose class the judge tells. One pass over 100,000 images and seven over 10,000, on one
thread.
"""

import io
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from w2s_train.features import TimmFeatures
from w2s_train.features.frechet import FeatureSums, Moments, frechet_distance
from w2s_train.metrics import ImageNetAgreement
from w2s_train.scores import git_commit
from w2s_train.shards import local_shards
from w2s_train.shards.decode import decode_image
from w2s_train.shards.samples import encoded_image, read_shard

HERE = Path(__file__).parent
CLASSES, SIZE, BLOCK = 200, 96, 500
FIRST = (1_000, 2_000, 2_500, 5_000, 10_000)


def stored(folder: Path, split: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Images (N, 3, 32, 32) uint8 and labels (N,), at most BLOCK, in the order of the shards."""
    images, labels = list[Tensor](), list[int]()
    for shard in local_shards(str(folder / f"{split}-*.tar"), split):
        for sample in read_shard(shard):
            content, label = encoded_image(sample, shard, CLASSES)
            images.append(decode_image(content))
            labels.append(label)
            if len(images) == BLOCK:
                yield torch.stack(images), torch.tensor(labels)
                images, labels = [], []
    if images:
        yield torch.stack(images), torch.tensor(labels)


def by_pil(change: Callable[[Image.Image], Image.Image]) -> Callable[[Tensor], Tensor]:
    """A change of single images, for a batch."""

    def changed(images: Tensor) -> Tensor:
        made = [change(Image.fromarray(x.permute(1, 2, 0).numpy())) for x in images]
        return torch.stack([torch.from_numpy(np.array(x)).permute(2, 0, 1) for x in made])

    return changed


def blur(sigma: float) -> Callable[[Tensor], Tensor]:
    """Gaussian, in pixels."""
    return by_pil(lambda image: image.filter(ImageFilter.GaussianBlur(sigma)))


def jpeg(quality: int) -> Callable[[Tensor], Tensor]:
    """Compressed again."""

    def change(image: Image.Image) -> Image.Image:
        file = io.BytesIO()
        image.save(file, "jpeg", quality=quality)
        return Image.open(file).convert("RGB")

    return by_pil(change)


def noise(sigma: float) -> Callable[[Tensor], Tensor]:
    """Gaussian, in grey levels; the same at every call."""
    generator = torch.Generator()

    def changed(images: Tensor) -> Tensor:
        generator.manual_seed(0)
        added = sigma * torch.randn(images.shape, generator=generator)
        return (images + added).round().clamp(0, 255).to(torch.uint8)

    return changed


def table() -> str:
    """Of what floors.json holds."""
    about = json.loads((HERE / "floors.json").read_text())
    lines = ["| images | distance | class told |", "|---|---|---|"]
    for name, found in about["floors"].items():
        distance = f"{found['distance']:.1f}" if "distance" in found else "–"
        agreement = f"{found['agreement']:.3f}" if "agreement" in found else "–"
        lines.append(f"| {name} | {distance} | {agreement} |")
    return "\n".join([*lines, "", f"{about['judge']}; commit {about['git_commit'][:7]}."]) + "\n"


def seen(
    judge: TimmFeatures,
    folder: Path,
    split: str,
    change: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Features (N, F) and labels (N,) of a split, whose images are changed."""
    parts = []
    for images, labels in stored(folder, split):
        parts.append((judge(change(images) if change else images), labels))
        if len(parts) % 20 == 0:
            print(f"{split}: {BLOCK * len(parts):,} images", flush=True)
    return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])


def moments(features: Tensor) -> Moments:
    """Of features (N, F)."""
    sums = FeatureSums(features.shape[1])
    for part in features.split(1000):
        sums.update(part)
    return sums.moments()


def measure(folder: Path) -> None:
    """Measure and write."""
    torch.set_num_threads(1)
    judge = TimmFeatures("tf_efficientnet_lite0", str(folder / "judge.safetensors"), SIZE)
    judge.load()
    agreement = ImageNetAgreement(str(folder / "classes.txt"))
    agreement.check_classes(CLASSES, judge)

    features, labels = seen(judge, folder, "train")
    train, half = moments(features), len(features) // 2
    found: dict[str, dict[str, float]] = {
        "train half to other half": {
            "n": half,
            "distance": frechet_distance(moments(features[:half]), moments(features[half:])),
        },
        "train": {"n": len(features), **agreement.compute(features, features, judge, labels)},
    }
    changes = {"val": None, "blur 0.5": blur(0.5), "blur 0.75": blur(0.75), "noise 8": noise(8)}
    changes |= {"noise 16": noise(16), "JPEG 75": jpeg(75), "JPEG 40": jpeg(40)}
    for name, change in changes.items():
        features, labels = seen(judge, folder, "val", change)
        for n in FIRST if change is None else (len(features),):
            found[f"{name}, {n:,}"] = {
                "n": n,
                "distance": frechet_distance(train, moments(features[:n])),
                **agreement.compute(features[:n], features[:n], judge, labels[:n]),
            }
            print(name, found[f"{name}, {n:,}"], flush=True)
    about = {"judge": judge.describe(), "git_commit": git_commit(), "floors": found}
    (HERE / "floors.json").write_text(json.dumps(about, indent=1) + "\n")


def main() -> None:
    """Measure, if a folder is named, and write the table."""
    if sys.argv[1:]:
        measure(Path(sys.argv[1]))
    (HERE / "floors.md").write_text(table())


if __name__ == "__main__":
    main()
