"""Small networks and streams that the tests of layers and pipeline share."""

import torch
from torch import Tensor, nn

from exssnet.nn import convert
from exssnet.tasks import Labelled, Task, split_by_class


class SmallNet(nn.Module):
    """Everything that a user's model may have: a bias, an affine norm, a pool, a grouped convolution."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.pool = nn.MaxPool2d(2)
        self.grouped = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=2, bias=False)
        self.head = nn.Linear(32, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.norm(self.conv(x)).relu())
        out: Tensor = self.head(self.grouped(x).relu().flatten(1))
        return out


def small_net(density: float = 0.3, **options: object) -> nn.Module:
    """A converted `SmallNet` with fixed random weights."""
    torch.manual_seed(0)
    return convert(SmallNet(), density, **options)  # type: ignore[arg-type]


def images(count: int = 24, seed: int = 0) -> Tensor:
    """(count, 1, 8, 8) for `SmallNet`."""
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def stream(tasks: int = 3, classes: int = 2, per_class: int = 40, validation: float = 0.25) -> list[Task]:
    """Separable classes: noisy copies of one random image each."""
    generator = torch.Generator().manual_seed(7)
    centres = torch.randn(tasks * classes, 1, 8, 8, generator=generator)

    def drawn(count: int) -> Labelled:
        labels = torch.arange(tasks * classes).repeat_interleave(count)
        noise = torch.randn(len(labels), 1, 8, 8, generator=generator)
        return Labelled(centres[labels] + noise, labels)

    return split_by_class(drawn(per_class), drawn(20), tasks, validation=validation)
