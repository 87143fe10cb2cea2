"""Networks of the continual-learning literature: plain modules without masks, biases and affine norms.

Every model has an output layer `head` and a method `penultimate(x)`, which returns the features that KKT compares. Each
ReLU and each norm is a module of its own that is called once, so it can be swapped and hooked.

Images are (N, C, H, W). Texts are (N, L, E + 1): E features per token, then an entry that is 1 for a token and 0 for
padding. In evaluation mode, the logits do not depend on the features of padding, nor on its length.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from math import prod

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class LeNet300100(nn.Module):
    """LeNet-300-100: fully connected layers of 300 and 100 features and an output layer, with ReLUs between them.

    The model takes x (N, ...) with in_features values per item, flattens it, and returns logits (N, classes).

    Source: LeCun et al., "Gradient-based learning applied to document recognition", 1998.

    Args:
        in_features: Number of values per item.
        classes: Number of classes.
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
        return self.hidden2(self.relu1(self.hidden1(x.flatten(1))))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.relu2(self.penultimate(x)))


def _conv3x3(in_channels: int, channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)


def _conv1x1(in_channels: int, channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, channels, 1, stride, bias=False)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, affine=False)


def _shortcut(in_channels: int, channels: int, stride: int) -> nn.Module:
    """The identity, or a 1x1 convolution and a norm if the shape changes."""
    if stride == 1 and in_channels == channels:
        return nn.Identity()
    return nn.Sequential(_conv1x1(in_channels, channels, stride), _norm(channels))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, which is a 1x1 convolution if the shape changes.

    Args:
        in_channels: Channels of the input.
        channels: Channels of both convolutions and of the output.
        stride: Stride of the first convolution.
    """

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv3x3(in_channels, channels, stride)
        self.norm1 = _norm(channels)
        self.relu1 = nn.ReLU()
        self.conv2 = _conv3x3(channels, channels)
        self.norm2 = _norm(channels)
        self.shortcut = _shortcut(in_channels, channels, stride)
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu1(self.norm1(self.conv1(x)))
        return self.relu2(self.norm2(self.conv2(y)) + self.shortcut(x))


class Bottleneck(nn.Module):
    """A 1x1, a 3x3 and a 1x1 convolution and a shortcut, which is a 1x1 convolution if the shape changes.

    Args:
        in_channels: Channels of the input.
        channels: Channels of the first two convolutions. The output has four times as many.
        stride: Stride of the 3x3 convolution.
    """

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        out_channels = self.expansion * channels
        self.conv1 = _conv1x1(in_channels, channels)
        self.norm1 = _norm(channels)
        self.relu1 = nn.ReLU()
        self.conv2 = _conv3x3(channels, channels, stride)
        self.norm2 = _norm(channels)
        self.relu2 = nn.ReLU()
        self.conv3 = _conv1x1(channels, out_channels)
        self.norm3 = _norm(out_channels)
        self.shortcut = _shortcut(in_channels, out_channels, stride)
        self.relu3 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu1(self.norm1(self.conv1(x)))
        y = self.relu2(self.norm2(self.conv2(y)))
        return self.relu3(self.norm3(self.conv3(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """A stem, stages of residual blocks, a mean over the image, and an output layer.

    Each stage but the first halves the image and doubles the channels. The model takes x (N, in_channels, H, W) of any
    size and returns logits (N, classes).

    Source: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016.

    Args:
        classes: Number of classes.
        block: Type of the residual blocks.
        depths: Number of blocks in each stage.
        width: Channels of the first stage.
        in_channels: Channels of the images.
        large: Whether the stem is that for large images: a 7x7 convolution of stride 2 and a 3x3 max pool of stride 2.
            Otherwise it is a 3x3 convolution.
    """

    def __init__(
        self, classes: int, block: type[BasicBlock] | type[Bottleneck], depths: Sequence[int], width: int,
        in_channels: int = 3, large: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        first = nn.Conv2d(in_channels, width, 7, 2, padding=3, bias=False) if large else _conv3x3(in_channels, width)
        stem: dict[str, nn.Module] = {"conv": first, "norm": _norm(width), "relu": nn.ReLU()}
        if large:
            stem["pool"] = nn.MaxPool2d(3, 2, padding=1)
        self.stem = nn.Sequential(OrderedDict(stem))
        blocks: list[nn.Module] = []
        channels = width
        for stage, depth in enumerate(depths):
            for number in range(depth):
                blocks.append(block(channels, width << stage, 2 if stage > 0 and number == 0 else 1))
                channels = (width << stage) * block.expansion
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(channels, classes, bias=False)

    def penultimate(self, x: Tensor) -> Tensor:
        """Features (N, channels): the last stage, averaged over H and W."""
        return torch.mean(self.blocks(self.stem(x)), dim=(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.penultimate(x))


class ResNet18(ResNet):
    """The ResNet-18 of GEM for small images: four stages of two basic blocks, with 8 * width features.

    Source: Lopez-Paz & Ranzato, "Gradient Episodic Memory", NeurIPS 2017.

    Args:
        classes: Number of classes.
        width: Channels of the first stage; 20 in GEM, 64 in the usual ResNet-18.
        in_channels: Channels of the images.
    """

    def __init__(self, classes: int, width: int = 20, in_channels: int = 3) -> None:
        super().__init__(classes, BasicBlock, (2, 2, 2, 2), width, in_channels)


class ResNet50(ResNet):
    """ResNet-50 with the stem for large images and 2048 features. The last stage sees a 64x64 image as 2x2.

    Source: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016.

    Args:
        classes: Number of classes.
        in_channels: Channels of the images.
    """

    def __init__(self, classes: int, in_channels: int = 3) -> None:
        super().__init__(classes, Bottleneck, (3, 4, 6, 3), 64, in_channels, large=True)


class SmallResNet(ResNet):
    """Three stages of one basic block for 28x28 characters, with 4 * width features.

    At the default width it has 305 k weights without the head.

    Args:
        classes: Number of classes.
        width: Channels of the first stage.
        in_channels: Channels of the images.
    """

    def __init__(self, classes: int, width: int = 32, in_channels: int = 1) -> None:
        super().__init__(classes, BasicBlock, (1, 1, 1), width, in_channels)


def _tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """Features (N, E, L), zero at padding, and the padding mask (N, 1, L) of texts (N, L, E + 1)."""
    mask = x[..., -1:]
    return x[..., :-1].where(mask > 0, 0).transpose(1, 2), mask.transpose(1, 2)


class TextCNN(nn.Module):
    """Convolutions over 3, 4 and 5 tokens, a ReLU, the maximum over the text, and an output layer.

    The model takes texts (N, L, features + 1) and returns logits (N, classes). A window belongs to its middle token; in
    a window of 4, that is the third. Outside the text, a window reads zeros. The features of an empty text are zeros.

    Source: Kim, "Convolutional Neural Networks for Sentence Classification", EMNLP 2014.

    Args:
        features: Features per token (E).
        classes: Number of classes.
        filters: Filters of each of the three convolutions.
    """

    def __init__(self, features: int, classes: int, filters: int = 200) -> None:
        super().__init__()
        sizes = (3, 4, 5)
        self.convs = nn.ModuleList(nn.Conv1d(features, filters, n, padding=n // 2, bias=False) for n in sizes)
        self.relus = nn.ModuleList(nn.ReLU() for _ in sizes)
        self.head = nn.Linear(filters * len(sizes), classes, bias=False)

    def penultimate(self, x: Tensor) -> Tensor:
        """Features (N, 3 * filters): the maximum of each filter over the text."""
        tokens, mask = _tokens(x)
        length = tokens.shape[2]  # the output of the window of 4 is one longer
        maps = [relu(conv(tokens))[..., :length] for conv, relu in zip(self.convs, self.relus, strict=True)]
        return torch.cat([(y * mask).max(2).values for y in maps], dim=1)  # all values are >= 0, so padding never wins

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.penultimate(x))


class TextBlock(nn.Module):
    """Two convolutions over 3 tokens and a shortcut, with zeros at padding.

    The block takes x (N, in_channels, L) and a padding mask (N, 1, L), and returns (N, channels, L).

    Args:
        in_channels: Channels of the input.
        channels: Channels of the output.
    """

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(in_channels, channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm1d(channels, affine=False)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv1d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm1d(channels, affine=False)
        self.shortcut: nn.Module = nn.Identity()
        if in_channels != channels:
            convolution = nn.Conv1d(in_channels, channels, 1, bias=False)
            self.shortcut = nn.Sequential(convolution, nn.BatchNorm1d(channels, affine=False))
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = self.relu1(self.norm1(self.conv1(x))) * mask
        return self.relu2(self.norm2(self.conv2(y)) + self.shortcut(x)) * mask


_BLOCKS = {9: (1, 1, 1, 1), 17: (2, 2, 2, 2), 29: (5, 5, 2, 2), 49: (8, 8, 5, 3)}  # depth -> blocks in each stage
_KEPT = 8  # number of values per channel that the last pool keeps


class VDCNN(nn.Module):
    """Very deep convolutional network for text: 9, 17, 29 or 49 convolutions, two hidden layers and an output layer.

    The stages have 64, 128, 256 and 512 channels. A max pool between two stages halves the text. After the last stage,
    k-max pooling keeps the 8 largest values of each channel in their order. Ties go to the earlier value. Shorter
    texts are filled with zeros. In training, the norms' statistics include padding.

    The model takes texts (N, L, features + 1) and returns logits (N, classes).

    Source: Conneau et al., "Very Deep Convolutional Networks for Text Classification", EACL 2017, with shortcuts.

    Args:
        features: Features per token (E).
        classes: Number of classes.
        depth: Number of convolutions: 9, 17, 29 or 49.
        hidden: Features of the two hidden layers.

    Raises:
        ValueError: For another depth.
    """

    def __init__(self, features: int, classes: int, depth: int = 9, hidden: int = 2048) -> None:
        super().__init__()
        if depth not in _BLOCKS:
            raise ValueError(f"VDCNN: depth must be one of {', '.join(map(str, _BLOCKS))}, got {depth}")
        self.first = nn.Conv1d(features, 64, 3, padding=1, bias=False)
        channels = 64
        self.stages = nn.ModuleList()
        for stage, blocks in enumerate(_BLOCKS[depth]):
            width = 64 << stage
            self.stages.append(nn.ModuleList(TextBlock(width if n else channels, width) for n in range(blocks)))
            channels = width
        self.pools = nn.ModuleList(nn.MaxPool1d(3, 2, padding=1) for _ in self.stages[1:])
        self.hidden1 = nn.Linear(_KEPT * channels, hidden, bias=False)
        self.relu1 = nn.ReLU()
        self.hidden2 = nn.Linear(hidden, hidden, bias=False)
        self.relu2 = nn.ReLU()
        self.head = nn.Linear(hidden, classes, bias=False)

    def penultimate(self, x: Tensor) -> Tensor:
        """Features (N, hidden): the second hidden layer after its ReLU."""
        x, mask = _tokens(x)
        x = self.first(x) * mask
        for stage, pool in zip(self.stages, (None, *self.pools), strict=True):
            if pool is not None:
                x, mask = pool(x), mask[..., ::2]  # the mask of each window's middle; padding is 0 and never wins
            for block in stage:  # type: ignore[attr-defined]
                x = block(x, mask)
        x = F.pad(x, (0, max(0, _KEPT - x.shape[2])))
        largest = x.sort(dim=2, descending=True, stable=True).indices[..., :_KEPT]  # stable: padding comes last
        x = x.gather(2, largest.sort(dim=2).values)
        return self.relu2(self.hidden2(self.relu1(self.hidden1(x.flatten(1)))))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.penultimate(x))


Constructor = Callable[[Sequence[int], int], nn.Module]


def _images(model: Callable[..., nn.Module], name: str, **options: int) -> Constructor:
    def make(shape: Sequence[int], classes: int) -> nn.Module:
        if len(shape) != 3:
            raise ValueError(f"{name} is for images (C, H, W), got items of shape {tuple(shape)}")
        return model(classes, in_channels=shape[0], **options)

    return make


def _texts(model: Callable[..., nn.Module], name: str, **options: int) -> Constructor:
    def make(shape: Sequence[int], classes: int) -> nn.Module:
        if len(shape) != 2 or shape[1] < 2:
            raise ValueError(f"{name} is for texts (L, E + 1), got items of shape {tuple(shape)}")
        return model(shape[1] - 1, classes, **options)

    return make


MODELS: dict[str, Constructor] = {
    "lenet-300-100": lambda shape, classes: LeNet300100(prod(shape), classes),
    "resnet18": _images(ResNet18, "resnet18"),
    "resnet18-64": _images(ResNet18, "resnet18-64", width=64),
    "resnet50": _images(ResNet50, "resnet50"),
    "resnet-small": _images(SmallResNet, "resnet-small"),
    "text-cnn": _texts(TextCNN, "text-cnn"),
} | {f"vdcnn-{depth}": _texts(VDCNN, f"vdcnn-{depth}", depth=depth) for depth in _BLOCKS}
"""Constructors by name: (shape of one input without the batch, number of outputs) -> model. Images are (C, H, W), texts
(L, E + 1). A constructor raises ValueError for a shape that its model does not take."""
