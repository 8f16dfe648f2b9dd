"""Networks as a user would write them: they inherit nothing of ours."""

from typing import NamedTuple

import torch
from torch import Tensor, nn


class Output(NamedTuple):
    velocity: Tensor


class UNet(nn.Module):
    """Down, up and across, modulated by time and class."""

    def __init__(
        self, width: int = 8, num_classes: int = 10, side: int = 8, channels: int = 1
    ) -> None:
        super().__init__()
        self.arguments = dict(width=width, num_classes=num_classes, side=side, channels=channels)
        self.shape = (channels, side, side)
        self.num_classes = self.null_class = num_classes
        self.labels = nn.Embedding(num_classes + 1, width)
        self.time = nn.Linear(2, width)
        self.enter = nn.Conv2d(channels, width, 3, padding=1)
        self.down = nn.Conv2d(width, width, 4, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.up = nn.ConvTranspose2d(width, width, 4, stride=2, padding=1)
        self.leave = nn.Conv2d(2 * width, channels, 3, padding=1)

    def forward(self, x: Tensor, time: Tensor, label: Tensor) -> Output:
        cond = self.labels(label) + self.time(torch.stack([time, time.cos()], dim=1))
        h = torch.relu(self.enter(x) + cond[:, :, None, None])
        below = torch.relu(self.norm(self.down(h)))
        return Output(self.leave(torch.cat([h, self.up(below)], dim=1)))


class Bare(nn.Module):
    """The least that a network has."""

    null_class = 10

    def __init__(self) -> None:
        super().__init__()
        self.net = UNet()

    def forward(self, x_t, t, y):
        return self.net(x_t, t, y)
