"""Networks of the continual-learning literature: plain modules without masks, without biases, without affine norms.

Every model has `penultimate(x)`, the features that KKT compares, and an output layer `head`. ReLUs and norms are
members used once each, so that they can be swapped and hooked; pooling is a mean.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from math import prod

import torch
from torch import Tensor, nn


class LeNet300100(nn.Module):
    """LeNet-300-100: fully connected layers of 300 and 100 features and an output layer, ReLU between.

    x: (N, ...) with in_features values each, flattened here; returns logits (N, classes).
    Source: LeCun et al., "Gradient-based learning applied to document recognition", 1998.
    """

    def __init__(self, in_features: int, classes: int) -> None:
        super().__init__()
        self.hidden1 = nn.Linear(in_features, 300, bias=False)
        self.relu1 = nn.ReLU()
        self.hidden2 = nn.Linear(300, 100, bias=False)
        self.relu2 = nn.ReLU()
        self.head = nn.Linear(100, classes, bias=False)

    def penultimate(self, x: Tensor) -> Tensor:
        """Features (N, 100): the second layer's output before its ReLU."""
        features: Tensor = self.hidden2(self.relu1(self.hidden1(x.flatten(1))))
        return features

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.relu2(self.penultimate(x)))
        return logits


def _conv3x3(in_channels: int, channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, which is a 1x1 convolution where the shape changes."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv3x3(in_channels, channels, stride)
        self.norm1 = nn.BatchNorm2d(channels, affine=False)
        self.relu1 = nn.ReLU()
        self.conv2 = _conv3x3(channels, channels)
        self.norm2 = nn.BatchNorm2d(channels, affine=False)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels, affine=False)
            )
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu1(self.norm1(self.conv1(x)))
        out: Tensor = self.relu2(self.norm2(self.conv2(y)) + self.shortcut(x))
        return out


class ResNet18(nn.Module):
    """The narrow ResNet-18 of GEM for small images: four stages of two blocks, of width, 2, 4 and 8 times width.

    x: (N, in_channels, H, W) of any size; returns logits (N, classes).
    Source: Lopez-Paz & Ranzato, "Gradient Episodic Memory", NeurIPS 2017; He et al., CVPR 2016.
    """

    def __init__(self, classes: int, width: int = 20, in_channels: int = 3) -> None:
        super().__init__()
        stem = {"conv": _conv3x3(in_channels, width), "norm": nn.BatchNorm2d(width, affine=False), "relu": nn.ReLU()}
        self.stem = nn.Sequential(OrderedDict(stem))
        blocks, channels = [], width
        for stage in range(4):
            for stride in (1 if stage == 0 else 2, 1):
                blocks.append(BasicBlock(channels, width << stage, stride))
                channels = width << stage
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(channels, classes, bias=False)

    def penultimate(self, x: Tensor) -> Tensor:
        """Features (N, 8 * width): the last stage, averaged over H and W."""
        return torch.mean(self.blocks(self.stem(x)), dim=(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.penultimate(x))
        return logits


MODELS: dict[str, Callable[[Sequence[int], int], nn.Module]] = {
    "lenet-300-100": lambda shape, classes: LeNet300100(prod(shape), classes),
    "resnet18": lambda shape, classes: ResNet18(classes, in_channels=shape[0]),
}
"""Constructors by name: (shape of one input without the batch, number of outputs) -> model."""
