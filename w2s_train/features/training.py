"""Training of the small classifiers."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from w2s_train.errors import UserError, require
from w2s_train.features.classifiers import Classifier


@dataclass(frozen=True)
class Regularization:
    """What keeps a classifier from learning its images by heart.

    Args:
        crop: Shift every image by up to so many pixels in each direction, over a border of zeros.
        flip: Mirror every other image at random.
        label_smoothing: Share of the target spread over all classes, in [0, 1).
        batch_norm: Normalize after every convolution while training (Ioffe & Szegedy, 2015); folded
            into the convolution afterwards, so that the layout stays the same.
    """

    crop: int = 0
    flip: bool = False
    label_smoothing: float = 0.0
    batch_norm: bool = False

    def __post_init__(self) -> None:
        require("crop", self.crop, "[0, inf)")
        require("label_smoothing", self.label_smoothing, "[0, 1)")

    def augment(self, images: Tensor) -> Tensor:
        """Crop and flip (B, C, H, W), each image by its own draw; draws nothing if both are off."""
        if not self.crop and not self.flip:
            return images
        n, _, height, width = images.shape
        rows, columns = torch.arange(height).expand(n, -1), torch.arange(width).expand(n, -1)
        if self.crop:
            images = F.pad(images, [self.crop] * 4)
            top, left = torch.randint(2 * self.crop + 1, (2, n, 1))
            rows, columns = rows + top, columns + left
        if self.flip:
            columns = torch.where(torch.rand(n, 1) < 0.5, columns.flip(1), columns)
        picked = images[torch.arange(n).view(n, 1, 1), :, rows.unsqueeze(2), columns.unsqueeze(1)]
        return picked.permute(0, 3, 1, 2).contiguous()


PLAIN = Regularization()


@contextlib.contextmanager
def single_thread() -> Iterator[None]:
    """Let torch use one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def normalized(classifier: Classifier) -> Iterator[None]:
    """Put a batch norm behind every convolution, and fold it into the convolution at the end."""
    convs = [conv for conv in classifier.convs if isinstance(conv, nn.Conv2d)]
    norms = [nn.BatchNorm2d(conv.out_channels) for conv in convs]
    for i, pair in enumerate(zip(convs, norms, strict=True)):
        classifier.convs[i] = nn.Sequential(*pair)
    yield
    for i, (conv, norm) in enumerate(zip(convs, norms, strict=True)):
        classifier.convs[i] = fuse_conv_bn_eval(conv.eval(), norm.eval())


def accuracy(classifier: Classifier, images: Tensor, labels: Tensor) -> float:
    """Share of images (N, C, H, W) uint8 whose largest logit is that of the label (N,)."""
    with torch.no_grad():
        guesses = torch.cat([classifier(part).argmax(1) for part in images.split(500)])
    return (guesses == labels).float().mean().item()


def train_classifier(
    classifier: Classifier,
    train: tuple[Tensor, Tensor],
    heldout: tuple[Tensor, Tensor],
    *,
    seed: int,
    epochs: int = 40,
    batch_size: int = 64,
    regularization: Regularization = PLAIN,
    report_seconds: float = float("inf"),
) -> float:
    """Train on images (N, C, H, W) uint8 and labels (N,); returns the held-out accuracy.

    Args:
        classifier: What to train, in place; its initialization is replaced.
        train: Images and labels, at least ``batch_size``.
        heldout: Images and labels.
        seed: Of the initialization, the order and the augmentation.
        epochs: Passes over the data, with a learning rate that falls from 2e-3 to 0.
        batch_size: Rows per step.
        regularization: Augmentation, label smoothing and batch norm.
        report_seconds: Print a line of progress about so often; never by default.

    Raises:
        UserError: No epochs, or fewer images than a batch.
    """
    if epochs < 1 or not 1 <= batch_size <= len(train[0]):
        raise UserError(
            f"epochs={epochs}, batch_size={batch_size}: must be at least 1 and at most the "
            f"{len(train[0])} images"
        )
    # Sums over several threads round differently; one thread makes the weights those of the seed.
    with single_thread(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for layer in classifier.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                layer.reset_parameters()
        with normalized(classifier) if regularization.batch_norm else contextlib.nullcontext():
            _fit(classifier.train(), train, epochs, batch_size, regularization, report_seconds)
        return accuracy(classifier.eval(), *heldout)


def _fit(
    classifier: Classifier,
    train: tuple[Tensor, Tensor],
    epochs: int,
    batch_size: int,
    regularization: Regularization,
    report_seconds: float,
) -> None:
    """All steps of AdamW under a one-cycle schedule."""
    images, labels = train
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=2e-3)
    per_epoch = len(images) // batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=epochs * per_epoch)
    began = reported = time.monotonic()
    for epoch in range(epochs):
        order = torch.randperm(len(images))[: per_epoch * batch_size]
        for step, rows in enumerate(order.split(batch_size), start=1):
            logits = classifier(regularization.augment(images[rows]))
            loss = F.cross_entropy(
                logits, labels[rows], label_smoothing=regularization.label_smoothing
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if (now := time.monotonic()) - reported >= report_seconds:
                reported = now
                print(
                    f"epoch {epoch + 1}/{epochs} step {step}/{per_epoch} "
                    f"loss {loss.item():.3f} {now - began:.0f} s",
                    flush=True,
                )
