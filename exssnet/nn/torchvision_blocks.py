"""torchvision's residual blocks with fused norms. Imported only if torchvision is, because it is no dependency."""

from collections.abc import Mapping

from torch import nn
from torchvision.models import resnet

from .blocks import ResidualBlock


class _BasicBlock(ResidualBlock, resnet.BasicBlock):  # type: ignore[misc]
    _steps = (("conv1", "bn1", "relu"), ("conv2", "bn2", "relu"))
    _shortcut_name = "downsample"


class _Bottleneck(ResidualBlock, resnet.Bottleneck):  # type: ignore[misc]
    _steps = (("conv1", "bn1", "relu"), ("conv2", "bn2", "relu"), ("conv3", "bn3", "relu"))
    _shortcut_name = "downsample"


SWAPPED: Mapping[type[nn.Module], type[nn.Module]] = {
    resnet.BasicBlock: _BasicBlock,
    resnet.Bottleneck: _Bottleneck,
}
